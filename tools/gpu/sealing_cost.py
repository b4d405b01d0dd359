"""What sealing pages costs a decode step: tools/gpu/sealing_cost.py MODEL [MODEL ...].

    PYTHONPATH=. python3 tools/gpu/sealing_cost.py MODEL ... [--batch 64] [--tokens 256]
        [--repeats 5] [--json FILE]

One LLM a model, random weights, the fast path. The same decode with sealing and without, turn by
turn, so that clocks and heat are the same for both: milliseconds a step, of the steps between the
8th and the last token. Without, nobody asks for the sum of a page (core.commit `_want_seals`), in
this script alone: an engine has no such option. The figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from holdfast.core import commit
from holdfast.llm import LLM, SamplingParams

LIMITS = {"rows_max": 64, "prefill_tokens": 8192, "context_tokens": 2048}
PROMPT_TOKENS, FIRST = 512, 8
_want_seals = commit.Commit._want_seals


def seconds(llm: LLM, batch: int, tokens: int, tenant: str) -> float:
    """Of a generation of so many tokens a row. tenant: nothing is found in the cache of another."""
    prompts = [[11 + row % 7, 5, 3 + row] * (PROMPT_TOKENS // 3) for row in range(batch)]
    params = [SamplingParams(max_tokens=tokens, temperature=0.6, ignore_eos=True)] * batch
    started_s = time.perf_counter()
    llm.generate(prompts, params, tenant=tenant)
    return time.perf_counter() - started_s


def step_ms(llm: LLM, batch: int, tokens: int, tenant: str) -> float:
    short = seconds(llm, batch, FIRST, tenant + " short")
    return (seconds(llm, batch, FIRST + tokens, tenant) - short) / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=64, help="64 at most")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "sealing.json"
    )
    asked = parser.parse_args()
    found = []
    for model in asked.models:
        steps: dict[str, list[float]] = {"with": [], "without": []}
        with LLM(str(model), device=asked.device, load="dummy", **LIMITS) as llm:
            step_ms(llm, asked.batch, 16, "warm")
            for run in range(asked.repeats):
                for kind, each in steps.items():
                    if kind == "without":
                        commit.Commit._want_seals = lambda *_, **__: None
                    try:
                        each.append(step_ms(llm, asked.batch, asked.tokens, f"{kind} {run}"))
                    finally:
                        commit.Commit._want_seals = _want_seals
        medians = {kind: statistics.median(each) for kind, each in steps.items()}
        cost = medians["with"] / medians["without"] - 1
        found.append({"model": model.name, "batch": asked.batch, "step_ms": steps, "cost": cost})
        shown = ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in medians.items())
        print(f"{model.name} batch {asked.batch}: {shown}: sealing costs {cost:+.2%}", flush=True)
    asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
