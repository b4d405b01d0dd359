"""Inputs that make a GPU load every kernel of a step before a stream waits for it.

A GPU loads a kernel's code when it is first launched, milliseconds each; a worker that takes over
would load forty of the sampler's in its first step. Called by device.runner; pure, and any device
will do.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.ops.sampler import Pairs, SamplerInputs

# One row greedy, one plain draw, one with every filter and logprobs, one with every edit.
ROWS = 4
TOP_COUNT = 2


def step_shapes(limits: Limits, *, on_gpu: bool) -> list[np.ndarray]:
    """int32[n] query lengths of each step to compute; on a GPU full chunks, full batches and mixed
    steps as well."""
    shapes = {(1,), (min(limits.page_tokens, limits.context_tokens),)}
    if on_gpu:
        shapes.add((min(limits.prefill_tokens, limits.context_tokens),))
        rows = {2**power for power in range(1, limits.rows_max.bit_length())}
        rows.add(limits.rows_max)
        shapes.update((1,) * count for count in rows)
        # A short chunk and a long one may have kernels of their own (ops.attention_triton).
        shapes.add((min(2, limits.context_tokens),))
        # Beside a chunk rows that decode lie elsewhere, for which attention has other kernels.
        chunk = min(max(2, limits.page_tokens), limits.context_tokens)
        shapes.update((1,) * (count - 1) + (chunk,) for count in rows)
    return [np.array(shape, np.int32) for shape in sorted(shapes)]


def sampler_inputs() -> SamplerInputs:
    """Parameters of ROWS rows that between them take every road through the sampler."""

    def floats(*values: float) -> np.ndarray:
        return np.array(values, np.float32)

    one = np.array([3], np.int64)
    edit = Pairs(one, np.zeros(1, np.int64))
    return SamplerInputs(
        seeds=np.arange(ROWS, dtype=np.uint64),
        positions=np.arange(ROWS, dtype=np.int64),
        temperature=floats(0, 1, 1, 1),
        top_p=floats(1, 1, 0.9, 1),
        min_p=floats(0, 0, 0.1, 0),
        top_k=np.array([0, 0, 5, 0], np.int32),
        repetition=floats(1, 1, 1, 1.1),
        presence=floats(0, 0, 0, 0.1),
        frequency=floats(0, 0, 0, 0.1),
        top_logprobs=np.array([-1, -1, TOP_COUNT, -1], np.int32),
        bias=edit,
        bias_values=floats(1),
        stops=Pairs(one, np.ones(1, np.int64)),
        seen=edit,
        output_counts=floats(1),
    )
