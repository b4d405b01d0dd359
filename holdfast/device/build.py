"""Runners as the options ask for them: which decoder, row state, capture, attention and draws.

Decides what goes together on a device. Called by proc.worker and `LLM`; owns nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.config import HOST_PLANNED, Limits
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
from holdfast.device.mixed import HostMixed, MixedDecoder, MixedGraphs, MixedLayout
from holdfast.device.runner import DecoderLike, Runner
from holdfast.errors import OptionError
from holdfast.model.decoder import Decoder
from holdfast.model.layer_ops import LayerOps, make_ops
from holdfast.model.spec import ModelSpec
from holdfast.ops.mixed_config import token_buckets
from holdfast.ops.sampler import Sampler


def build_engine(
    spec: ModelSpec,
    limits: Limits,
    weights: dict[str, torch.Tensor],
    memory: DeviceMemory,
    *,
    kernels: str = "reference",
    graphs: bool = False,
    **options: Any,
) -> Runner:
    """A runner of a model, not warm yet; `options` are Runner's own.

    weights: views of the memory's slab. kernels: of config.KERNELS, let through by check_kernels.
    Raises OptionError("--graphs") where graphs are asked for and cannot be had.
    """
    device = memory.pool.device

    def pieces() -> LayerOps:
        return make_ops(kernels, spec, device, limits, memory.pool.element_size())

    decoder = Decoder(spec, weights, pieces())
    options["rehearsal"] = decoder.rehearsal()
    if not graphs:
        return build_runner(limits, decoder, memory, graphs=None, **options)
    # Of their own: their scratch is baked in; steps of other shapes would make it grow and move.
    ops = pieces()
    made: dict[str, Any] = {}
    if kernels == "triton":
        # Imported late: it imports triton.
        from holdfast.device.graph_kernels import DeviceAttention, KernelDraw
        from holdfast.ops.kernels.sample import KeyedDraws

        # One workspace for both: steps follow each other on one stream, and copy what they drew.
        draws = KeyedDraws(limits.vocab_size, limits.rows_max, device)
        made = {
            "attention": DeviceAttention(ops.attention, limits),
            "draw": KernelDraw(draws),
            "plain": draws,
        }
    ladder = token_buckets(
        layers=spec.layers,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        prefill_tokens=limits.prefill_tokens,
        rows_max=limits.rows_max,
    )
    if ladder:
        # Attention is the eager decoder's, with its workspaces and what it gathers in; the scratch
        # is of its own, since larger steps make the eager one grow and move.
        beside = decoder.beside()
        attention = beside.ops.attention if kernels == "triton" else None
        made["mixed"] = Mixed(beside, ladder, beside.rehearsal(), attention)
    replayed = Decoder(spec, weights, ops)
    made["graphs_rehearsal"] = replayed.rehearsal()
    return build_runner(limits, decoder, memory, graphs=replayed, **made, **options)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Graphs of steps with prompts, to be made: a decoder of their own, the tokens of their
    buckets, what runs in the decoder's place before a capture (MixedGraphs' `rehearsal`), and the
    decoder's attention."""

    decoder: MixedDecoder
    ladder: Sequence[int]
    rehearsal: MixedDecoder | None = None
    attention: Any = None


def build_runner(
    limits: Limits,
    decoder: DecoderLike,
    memory: DeviceMemory,
    *,
    graphs: GraphDecoder | None,
    graphs_rehearsal: GraphDecoder | None = None,
    attention: BucketAttention | None = None,
    draw: Draw | None = None,
    mixed: Mixed | None = None,
    **options: Any,
) -> Runner:
    """A runner over a decoder, not warm yet; `options` are Runner's own.

    graphs: None for none; else a decoder of their own over the same weights, and
    graphs_rehearsal what runs in its place before a capture (StepGraphs' `rehearsal`).
    attention, draw: of the graphs. With attention that reads the bucket on the device row state
    lies there too; without any it is the reference, planned on the host, which no GPU can capture.
    Without `draw` the general sampler runs behind each body. mixed: None: steps with prompts run
    eagerly.
    Raises OptionError("--graphs") where graphs are asked for and cannot be had.
    """
    if graphs is None:
        return Runner(limits, decoder, memory, **options)
    device = memory.pool.device
    rows: Rows
    layout: MixedLayout | None = None
    if attention is None:
        if device.type != "cpu":
            raise OptionError("--graphs", HOST_PLANNED)
        rows = HostRows(limits, device)
        attention = ReferenceAttention(rows, limits, device)
        draw = draw or ReferenceDraw(Sampler(limits.vocab_size, device))
        if mixed is not None:
            layout = HostMixed(rows, limits, device, mixed.ladder[-1])
    else:
        # Imported late: they import triton.
        from holdfast.device.device_rows import DeviceRows
        from holdfast.device.mixed_kernels import DeviceMixed

        rows = DeviceRows(limits, device)
        if mixed is not None:
            given = memory.pool, mixed.decoder.embed.dtype, mixed.ladder[-1]
            layout = DeviceMixed(rows, mixed.attention, limits, *given)
    capture: Capture = Rerun() if device.type == "cpu" else CudaCapture(device)
    made_mixed = None
    if mixed is not None and layout is not None:
        made_mixed = MixedGraphs(
            limits,
            mixed.decoder,
            mixed.ladder,
            layout,
            memory.pool,
            memory.weights,
            capture=capture,
            rehearsal=mixed.rehearsal,
        )
    made = StepGraphs(
        limits,
        rows,
        graphs,
        memory.pool,
        memory.weights,
        capture=capture,
        attention=attention,
        draw=draw,
        rehearsal=graphs_rehearsal,
        mixed=made_mixed,
    )
    return Runner(limits, decoder, memory, rows=rows, graphs=made, **options)
