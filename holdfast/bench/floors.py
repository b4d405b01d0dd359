"""Floors: what a machine's bandwidth and arithmetic alone would give, without any engine.

decode: every weight that a step multiplies and the KV cache of every row, read once at the copy
speed of the machine. prefill: two operations a weight and token, and attention's four a pair of
query and visible key element, at the speed of its matrix products. offline: the prompts, then the
decode of all requests at once, as many steps as the longest asks. The ceilings are measured ones.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.bench.decode import SHORT_TOKENS, Decode
from holdfast.bench.offline import Offline
from holdfast.bench.prefill import Prefill
from holdfast.bench.timed import Bench, Value
from holdfast.bench.workload import Work
from holdfast.model.spec import ModelSpec, item_bytes


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes_per_s: device copy, read and write counted. flops: of a large bf16 matrix product."""

    bytes_per_s: float
    flops: float


# By the name that nvidia-smi gives: measured on 2026-11-21, driver 580.159 (docs/benches.md).
MACHINES = {"NVIDIA H200": Ceilings(4.24e12, 786e12)}


def of(
    spec: ModelSpec, dtype: str, gpu: str | None, benches: tuple[Bench, ...]
) -> Callable[[Value], float | None]:
    """The floor of a value, in its unit; None on a machine nobody has measured."""
    ceilings = MACHINES.get(gpu or "")
    if ceilings is None:
        return lambda value: None
    by_name = {bench.name: bench for bench in benches}

    def floor(value: Value) -> float | None:
        bench = by_name.get(value.work)
        if isinstance(bench, Decode) and value.batch is not None:
            tokens = bench.context + SHORT_TOKENS + bench.steps / 2
            return decode_ms(spec, dtype, ceilings, value.batch, tokens)
        if isinstance(bench, Prefill):
            return prefill_rate(spec, ceilings, bench.tokens)
        if isinstance(bench, Offline) and value.metric == "output rate":
            return offline_rate(spec, dtype, ceilings, bench.work)
        return None

    return floor


def read_bytes(spec: ModelSpec, dtype: str) -> int:
    """Weights that a decode step reads: all but the embedding, of which it takes a few rows. Tied
    to the output matrix it is read, as that."""
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    return spec.weights_bytes(dtype) - embedding * item_bytes(dtype)


def decode_ms(
    spec: ModelSpec, dtype: str, ceilings: Ceilings, batch: int, context_tokens: float
) -> float:
    """Milliseconds of a step of `batch` rows with so many tokens each."""
    moved = read_bytes(spec, dtype) + batch * context_tokens * spec.kv_token_bytes(dtype)
    return moved / ceilings.bytes_per_s * 1e3


def prefill_rate(spec: ModelSpec, ceilings: Ceilings, prompt_tokens: int) -> float:
    """Prompt tokens a second. A token multiplies every weight but the two vocabulary matrices."""
    vocabulary = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    weights = spec.weights_bytes("float32") // 4 - vocabulary
    attention = 4 * spec.layers * spec.heads * spec.head_dim * prompt_tokens / 2
    return ceilings.flops / (2 * weights + attention)


def offline_rate(spec: ModelSpec, dtype: str, ceilings: Ceilings, work: Work) -> float:
    """Output tokens a second."""
    pairs = zip(work.prompts, work.output_tokens, strict=True)
    seen = sum(len(prompt) * count + count * count / 2 for prompt, count in pairs)
    moved = seen * spec.kv_token_bytes(dtype) + max(work.output_tokens) * read_bytes(spec, dtype)
    prompts_s = sum(len(p) / prefill_rate(spec, ceilings, len(p)) for p in work.prompts)
    return work.total_output_tokens / (prompts_s + moved / ceilings.bytes_per_s)
