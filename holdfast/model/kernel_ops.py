"""KernelOps: a layer as fused Triton kernels around products, of cuBLAS or of few rows.

A layer is four products, attention and four launches besides: add + norm (twice), norm + rotate +
append, gate. A product of few rows is ops.kernels.small_matmul's where that is faster. No piece
allocates once the largest step was seen, and none waits for the device: all go to torch's current
stream. Rows are not padded, for nothing here depends on their number but grids. Attention is any
backend's (model.layer_ops.Attention). Imports triton, so who wants it asks
model.layer_ops.make_ops.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.model.layer_ops import Attention, ReferenceAttention
from holdfast.model.layers import rotation_frequencies
from holdfast.model.spec import ModelSpec
from holdfast.ops.attention import AttentionBatch, MixedBatch, Scratch, StaticBatch
from holdfast.ops.kernels import gate, norm, rope
from holdfast.ops.kernels.small_matmul import SmallMatmul


@dataclass(frozen=True, slots=True)
class KernelStep:
    """positions, slots: int64[t], device; plan: of the attention backend; rows: of the stream.

    A graph's step is made of the buffers it was captured with, the same object for every replay.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    plan: Any
    rows: int


class KernelOps:
    """A LayerOps (model.layer_ops) whose pieces are kernels."""

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        attention: Attention | None = None,
        context_tokens: int | None = None,
        small: SmallMatmul | None = None,
    ) -> None:
        """context_tokens: no position reaches it (None: the model's own); head_dim * 4 bytes of
        device memory each. small: computes products of few rows; None leaves all to cuBLAS."""
        self.spec = spec
        self.scratch = Scratch(device)
        self.attention: Attention = attention or ReferenceAttention()
        self._small = small
        frequencies = rotation_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        self._table = rope.rotation_table(
            frequencies.to(device), context_tokens or spec.context_tokens
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        small = () if self._small is None else self._small.addresses
        return (self._table.data_ptr(), *small, *self.attention.addresses, *self.scratch.addresses)

    def beside(self) -> KernelOps:
        other = copy.copy(self)
        other.scratch = Scratch(self._table.device)
        return other

    def padded_rows(self, count: int) -> int:
        return count

    def begin(
        self,
        positions: torch.Tensor,
        attention: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> KernelStep:
        plan = self.attention.plan(
            attention, pool, self.spec.heads, self.spec.kv_heads, dtype, self.scratch
        )
        own = attention.tokens
        return KernelStep(positions, attention.slots, plan, own if rows is None else rows)

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if out is None:
            out = self.scratch.take("normed", tuple(x.shape), x.dtype)
        return norm.add_rms_norm(x, delta, weight, self.spec.norm_eps, out)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, into: str | None
    ) -> torch.Tensor:
        shape = (x.shape[0], weight.shape[0])
        if into is None:
            out = torch.empty(shape, dtype=x.dtype, device=x.device)
        else:
            out = self.scratch.take(into, shape, x.dtype)
        if self._small is not None:
            config = self._small.config(weight.shape[0], weight.shape[1], x.shape[0])
            if config is not None:
                return self._small.run(x, weight, bias, out, config)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    def attend(
        self,
        step: KernelStep,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Rows of padding stay as they are in `out`: all else works row by row, so nothing of them
        reaches a row of the step, be they not finite."""
        rope.rotate_append(
            qkv,
            q_norm,
            k_norm,
            self.spec.norm_eps,
            step.positions,
            self._table,
            step.slots,
            pool,
            layer,
        )
        self.attention.attend(step.plan, pool, layer, qkv, out=out)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        shape = (gate_up.shape[0], gate_up.shape[1] // 2)
        return gate.silu_mul(gate_up, self.scratch.take("gated", shape, gate_up.dtype))
