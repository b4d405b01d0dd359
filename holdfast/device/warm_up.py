"""Inputs that make a GPU load every kernel of the sampler before a stream waits for it.

A GPU loads a kernel's code when it is first launched, milliseconds each; a worker that takes over
would load forty of them in its first step. Called by device.runner; pure, and any device will do.
"""

from __future__ import annotations

import numpy as np

from holdfast.ops.sampler import Pairs, SamplerInputs

# One row greedy, one plain draw, one with every filter and logprobs, one with every edit.
ROWS = 4
TOP_COUNT = 2


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
