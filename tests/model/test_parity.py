"""Logits equal transformers' on random tiny checkpoints of every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model_helpers import PagedRequests, loaded_decoder
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

TOLERANCE = 1e-4

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def heads(query: int, key: int, head_dim: int | None = None) -> dict[str, int]:
    sizes = {"num_attention_heads": query, "num_key_value_heads": key}
    return sizes if head_dim is None else sizes | {"head_dim": head_dim}


CASES: dict[str, PretrainedConfig] = {
    "llama heads 1:1 untied": LlamaConfig(**SIZES, **heads(4, 4)),
    "llama heads 4:1 tied": LlamaConfig(**SIZES, **heads(4, 1), tie_word_embeddings=True),
    "llama rope llama3": LlamaConfig(**SIZES, **heads(4, 2), rope_parameters=LLAMA3_ROPE),
    "llama rope linear": LlamaConfig(
        **SIZES,
        **heads(4, 2),
        rope_parameters={"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
    ),
    "llama with every bias": LlamaConfig(
        **SIZES, **heads(6, 2, 12), attention_bias=True, mlp_bias=True
    ),
    "qwen2 heads 2:1 untied": Qwen2Config(**SIZES, **heads(4, 2)),
    "qwen2 heads 6:1 tied": Qwen2Config(**SIZES, **heads(6, 1), tie_word_embeddings=True),
    "qwen3 heads 3:1 tied": Qwen3Config(**SIZES, **heads(6, 2, 16), tie_word_embeddings=True),
    "qwen3 heads 2:1 with bias": Qwen3Config(**SIZES, **heads(4, 2, 24), attention_bias=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(request, tmp_path_factory) -> tuple[Path, list[int], torch.Tensor]:
    """(folder, a text of 133 tokens, transformers' logits of it)."""
    torch.manual_seed(sum(map(ord, request.param)))
    model = AutoModelForCausalLM.from_config(
        CASES[request.param], dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a missing one.
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    text = [random.Random(5).randrange(3, 160) for _ in range(133)]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([text])).logits[0]
    return folder, text, logits


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return float((ours - theirs).abs().max())


def test_the_whole_prompt_has_the_logits_of_transformers(checkpoint) -> None:
    folder, text, theirs = checkpoint
    requests = PagedRequests(loaded_decoder(folder), [text])
    requests.step([(0, len(text))])
    assert theirs.abs().max() > 1.0, "logits near zero would prove nothing"
    assert worst(requests.result(), theirs) < TOLERANCE


def test_a_chunked_prompt_has_the_logits_of_transformers(checkpoint) -> None:
    folder, text, theirs = checkpoint
    requests = PagedRequests(loaded_decoder(folder), [text])
    for count in (3, 33, 1, 64, 15, 16, 1):
        requests.step([(0, count)])
    assert worst(requests.result(), theirs) < TOLERANCE


def test_token_by_token_through_scattered_pages_has_the_logits_of_transformers(checkpoint) -> None:
    folder, text, theirs = checkpoint
    decoder = loaded_decoder(folder)
    requests = PagedRequests(decoder, [text[:70], text], page_tokens=16)
    for _ in range(70):
        requests.step([(1, 1), (0, 1)])
    for _ in range(63):
        requests.step([(1, 1)])
    assert worst(requests.result(1), theirs) < TOLERANCE
    assert worst(requests.result(0), theirs[:70]) < TOLERANCE


def test_the_bundled_model_has_the_logits_of_transformers() -> None:
    from holdfast.model.spec import resolve_model

    folder = resolve_model(None)
    decoder = loaded_decoder(folder)
    text = [random.Random(6).randrange(3, 6000) for _ in range(90)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([text])).logits[0]
    requests = PagedRequests(decoder, [text], page_tokens=16)
    for count in (70, 1, 19):
        requests.step([(0, count)])
    assert worst(requests.result(), theirs) < TOLERANCE


def test_a_sharded_checkpoint_is_the_same_decoder(tmp_path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CASES["qwen2 heads 2:1 untied"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = loaded_decoder(tmp_path / "one"), loaded_decoder(tmp_path / "many")
    text = [3, 4, 5, 6, 7]
    first, second = PagedRequests(one, [text]), PagedRequests(many, [text])
    first.step([(0, 5)])
    second.step([(0, 5)])
    assert torch.equal(first.result(), second.result())
