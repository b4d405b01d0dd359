"""The residual stream and its norm in one pass: x += delta, then rms_norm(x) * weight.

A step's stream is read and written once instead of four times, and two launches a layer are one.
The twin is what model.layers.rms_norm computes behind `x.add_(delta)`: the sum is rounded to the
stream's type before it is squared, and the normed value is rounded before it is weighed.

One program a row, the whole row in registers: 16,384 elements at most. The width is a constant of
the model, so it is compiled in; the number of rows is the grid and compiles nothing. Called by
model.kernel_ops. Floor: 4 * hidden elements a row (3 without delta), 8 KiB a row each of an 8B
model in bfloat16, which at 64 rows is half a microsecond: a launch rules.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.dependent import launch_dependents, launch_options, wait_for_previous
from holdfast.ops.kernels.launch import launch, power_of_two

HIDDEN_MAX = 16_384
# Elements of a row that a warp holds at most before another warp helps: 16 a lane.
_WARP_ELEMENTS = 512
_WARPS_MAX = 16


@triton.jit
def _add_rms_norm(
    x,
    delta,
    weight,
    out,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        launch_dependents()
        wait_for_previous()
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    lane = tl.arange(0, BLOCK)
    inside = lane < HIDDEN
    value = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + start + lane, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(x.dtype.element_ty)
        tl.store(x + start + lane, stored, mask=inside)
        value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) * (1.0 / HIDDEN) + eps)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    weighed = normed * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + lane, weighed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """x += delta (None: nothing) in place; out = x over its root mean square, times weight.

    x, delta, out: [rows, hidden], packed; weight: [hidden]. Returns out, which may not be x.
    """
    rows, hidden = x.shape
    assert hidden <= HIDDEN_MAX, f"a row of {hidden} elements"
    assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape, (x, out)
    assert delta is None or (delta.shape == x.shape and delta.is_contiguous()), delta
    block = power_of_two(hidden)
    launch(
        _add_rms_norm,
        (rows,),
        x,
        x if delta is None else delta,
        weight,
        out,
        float(eps),
        HIDDEN=hidden,
        BLOCK=block,
        ADD=delta is not None,
        num_warps=warps_for(block),
        **launch_options(x.device),
    )
    return out


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of `block` elements, a power of two."""
    return max(1, min(_WARPS_MAX, block // _WARP_ELEMENTS))
