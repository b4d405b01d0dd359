"""Runners as the options ask for them: the reference alone, or steps in graphs over fast row state.

Decides which row state, capture, attention and sampler go together on a device. Called by
proc.worker and `LLM`; owns nothing afterwards.
"""

from __future__ import annotations

from typing import Any

from holdfast.config import Limits
from holdfast.device.batch import HostRows, Rows
from holdfast.device.capture import Capture, CudaCapture, Rerun
from holdfast.device.graphs import (
    BucketAttention,
    Draw,
    GraphDecoder,
    ReferenceAttention,
    ReferenceDraw,
    StepGraphs,
)
from holdfast.device.memory import DeviceMemory
from holdfast.device.runner import DecoderLike, Runner
from holdfast.errors import OptionError
from holdfast.ops import kernels
from holdfast.ops.sampler import Sampler


def build_runner(
    limits: Limits,
    decoder: DecoderLike,
    memory: DeviceMemory,
    *,
    graphs: GraphDecoder | None,
    attention: BucketAttention | None = None,
    draw: Draw | None = None,
    **options: Any,
) -> Runner:
    """A runner, not warm yet; `options` are Runner's own.

    graphs: None for none; else a decoder of their own over the same weights. Its scratch is baked
    into them, and steps of other shapes would make it grow and move.
    attention, draw: kernels for the graphs of a GPU; without `draw` the general sampler runs behind
    each. On a CPU graphs are functions that run again, over the reference.
    Raises OptionError("--graphs") where graphs are asked for and cannot be had.
    """
    if graphs is None:
        return Runner(limits, decoder, memory, **options)
    device = memory.pool.device
    rows: Rows
    capture: Capture
    if device.type == "cpu":
        rows, capture = HostRows(limits, device), Rerun()
        attention = attention or ReferenceAttention(rows, limits, device)
        draw = draw or ReferenceDraw(Sampler(limits.vocab_size, device))
    else:
        if not kernels.available():
            raise OptionError("--graphs", "on a GPU needs triton, which is not installed")
        if attention is None:
            raise OptionError(
                "--graphs", "the reference attention plans each step on the host; no graph can"
            )
        # Imported late: it imports triton.
        from holdfast.device.device_rows import DeviceRows

        rows, capture = DeviceRows(limits, device), CudaCapture(device)
    made = StepGraphs(
        limits,
        rows,
        graphs,
        memory.pool,
        memory.weights,
        capture=capture,
        attention=attention,
        draw=draw,
    )
    return Runner(limits, decoder, memory, rows=rows, graphs=made, **options)
