"""Greedy tokens of ours against transformers' logits, on random checkpoints of real shapes.

    PYTHONPATH=. python3 tools/gpu/compare_transformers.py CONFIG_FOLDER [--layers N] [--device D]
        [--prompts N] [--tokens N] [--json FILE]

transformers draws a model of the folder's config.json (its own initialisation, seed 0, bfloat16),
and saves it; ours loads that file and answers prompts of several lengths greedily with its fast
path, with the logprobs of its best tokens. transformers then computes the same sequences in one
forward pass each. Where our token is not its best, the gap between the two in its own logits must
be no more than twice the largest difference of logprobs seen: then rounding explains it. Exit code
1 when a token stays unexplained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers

from holdfast.llm import LLM, SamplingParams

TOP = 20


def make_checkpoint(config: Path, layers: int | None, device: str, folder: str) -> object:
    """A random model of the config, saved to folder; the model."""
    settings = transformers.AutoConfig.from_pretrained(config)
    if layers:
        settings.num_hidden_layers = layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.bfloat16 if device != "cpu" else torch.float32
        )
    model.eval().save_pretrained(folder)
    # Every id a word: only ids are asked for.
    words = {f"t{one}": one for one in range(settings.vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0")).save(
        f"{folder}/tokenizer.json"
    )
    return model


def compared(model: object, result: object, device: str) -> dict:
    """What transformers says of one answer of ours. Differences are of logprobs."""
    ids = torch.tensor([result.prompt_token_ids + result.token_ids], device=device)
    with torch.inference_mode():
        logits = model(ids).logits[0].float()
    first = len(result.prompt_token_ids) - 1
    theirs = torch.log_softmax(logits[first:-1], -1)
    worst, differ, gaps = 0.0, 0, []
    for row, token, said in zip(theirs, result.token_ids, result.logprobs, strict=True):
        pairs = [(token, said.logprob), *zip(said.top_ids, said.top_logprobs, strict=True)]
        worst = max(worst, *(abs(float(row[one]) - logprob) for one, logprob in pairs))
        if int(row.argmax()) != token:
            differ += 1
            gaps.append(float(row.max() - row[token]))
    return {"tokens": len(result.token_ids), "differ": differ, "worst": worst, "gaps": gaps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    on_gpu = asked.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(asked.config, asked.layers, asked.device, folder)
        torch.manual_seed(1)
        vocab = model.config.vocab_size
        prompts = [
            torch.randint(0, vocab, (1 + 61 * at % 700,)).tolist() for at in range(asked.prompts)
        ]
        params = SamplingParams(
            max_tokens=asked.tokens, temperature=0.0, ignore_eos=True, logprobs=TOP
        )
        options = {"kernels": "triton", "graphs": True} if on_gpu else {}
        with LLM(
            folder,
            device=asked.device,
            rows_max=asked.prompts,
            context_tokens=2048,
            pages=asked.prompts * 60 + 2,
            **options,
        ) as llm:
            results = llm.generate(prompts, params)
    found = [compared(model, result, asked.device) for result in results]
    worst = max(one["worst"] for one in found)
    gaps = [gap for one in found for gap in one["gaps"]]
    unexplained = sum(gap > 2 * worst for gap in gaps)
    tokens, differ = (sum(one[name] for one in found) for name in ("tokens", "differ"))
    report = {
        "model": str(asked.config.name),
        "layers": model.config.num_hidden_layers,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": os.environ.get("HOLDFAST_COMMIT", ""),
        "tokens": tokens,
        "not their best": differ,
        "largest gap of those": max(gaps, default=0.0),
        "largest difference of a logprob": worst,
        "unexplained": unexplained,
    }
    print(json.dumps(report), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(report | {"answers": found}, indent=1))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
