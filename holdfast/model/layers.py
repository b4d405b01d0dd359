"""The pieces of a decoder, as functions of tensors: norm, rotation, products, gate.

Owns the arithmetic between attention calls and its equality: a row's result never depends on the
other rows of the batch. Called by model.decoder. Knows no pages, no weights' names and no files.

Measured (torch 2.13, AVX-512, float32; tests/model/test_equality.py repeats it):
- oneDNN's product, which inductor's code uses too, gave bit-equal rows for any number of rows from
  2 to 1024, any place of a row, the bundled model's shapes, odd ones and inner lengths to 4096,
  with 1 to 16 threads and between them. One row takes a kernel of its own.
- MKL's (torch.mm) did so for every multiple of 8 rows in 8..1024 with 1 and 2 threads: 1 to 3 rows
  take other kernels, and 2 threads split 5, 6, 7 and 9 rows so that one has such few.
- With weights that lie in memory rather than in cache, as in a step, MKL packs them first: all
  products of a step of the bundled model took 6.7 ms at 8 and 15.0 at 64 rows, oneDNN's 4.4 and
  10.3 (2 threads; reading the weights alone takes 1.2).
- torch.exp is the same wherever an element lies; silu, sigmoid, exp2 are not: the vector code and
  the scalar code of its tail round differently, and where the tail falls depends on the batch.
- Sums over the last dimension run row by row in an order that depends on its length alone.
"""

from __future__ import annotations

import math

import torch

from holdfast.model.spec import RopeScaling
from holdfast.ops.attention import Scratch

# Rows of a product are padded to a multiple of this; see above.
ROWS_ALIGN = 8
# Rows of one product at most: as far as the measurement goes. Larger batches run in pieces.
ROWS_MAX = 1024
# A build of torch without oneDNN (or a version that renames the operator) takes torch.mm. A process
# uses the one or the other throughout: their results differ in the last bits.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def padded_rows(rows: int) -> int:
    """`rows` rounded up to what products want; at least one block."""
    return max(1, -(-rows // ROWS_ALIGN)) * ROWS_ALIGN


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times weight [out, in], plus bias [out]: a new tensor [rows, out].

    rows must be a multiple of ROWS_ALIGN.
    """
    assert x.shape[0] % ROWS_ALIGN == 0, f"{x.shape[0]} rows"
    pieces = [_product(some, weight, bias) for some in x.split(ROWS_MAX)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    out = torch.mm(x, weight.t())
    return out if bias is None else out.add_(bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """x over its root mean square in the last dimension, times weight; computed in float32."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    if out.dtype == torch.float32:
        return torch.mul(wide, scale, out=out).mul_(weight)
    return out.copy_(wide * scale).mul_(weight)


def gated(gate_up: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width]; [rows, width], valid until the next call.

    silu is written out with exp: torch's own depends on where in the tensor an element lies. It is
    computed in float32: of three roundings to bfloat16 each would cost as much as the result's own.
    """
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    out = scratch.take("gated", (gate_up.shape[0], width), gate_up.dtype)
    if out.dtype != torch.float32:
        wide = gate.float()
        return out.copy_(wide.div_(wide.neg().exp_().add_(1.0)).mul_(up))
    torch.neg(gate, out=out).exp_().add_(1.0)
    torch.div(gate, out, out=out)
    return out.mul_(up)


def rotation_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """float32[head_dim / 2]: radians a position, of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    # How often a wave fits the original context: few times = slow = divided by the factor.
    turns = scaling.original_context_tokens * frequencies / (2.0 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class Rotation:
    """Cosines and sines of one step's positions; applied to q and k of every layer.

    cos, sin: float32[t, 1, head_dim]; the first half of sin is negated, so that rotating a pair
    (a, b) is (a, b) * cos + (b, a) * sin.
    """

    __slots__ = ("cos", "half", "sin")

    def __init__(self, positions: torch.Tensor, frequencies: torch.Tensor) -> None:
        angles = positions.to(torch.float32)[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), dim=-1)
        self.sin = torch.cat((-sin, sin), dim=-1)
        self.half = frequencies.numel()

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Rotate x [t, heads, head_dim] into `out` of the same shape; x is overwritten."""
        swapped = torch.roll(x, self.half, dims=-1).mul_(self.sin)
        torch.add(x.mul_(self.cos), swapped, out=out)
