"""LayerOps: what a decoder's layers are made of, so that their order is written once.

model.decoder says which piece follows which; an implementation here or in model.kernel_ops says how
a piece is computed and in whose memory. `ReferenceOps` is plain torch and the definition: on a CPU
in float32 a row's bits do not depend on its batch (model.layers, ops.attention). `make_ops` picks
by name (`--kernels`). Knows no weights' names and no order of layers.

The residual stream. A block's result is not added where it is made but handed to the norm that
comes next (`add_norm`), which reads and writes the stream anyway: the reference adds first and
norms then, as ever, a kernel does both at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from holdfast.config import Limits
from holdfast.model.layers import (
    Rotation,
    gated,
    linear,
    padded_rows,
    rms_norm,
    rotation_frequencies,
)
from holdfast.model.spec import ModelSpec
from holdfast.ops.attention import (
    AttentionBatch,
    AttentionPlan,
    MixedBatch,
    Scratch,
    StaticBatch,
    append_kv,
    attend,
    plan_attention,
)


class Attention(Protocol):
    """Attention over pages, as any backend offers it. A plan is what all layers of a step share.

    on_device: takes a StaticBatch or a MixedBatch too, and then reads everything of the step on the
    device.
    addresses: of its workspaces.
    """

    on_device: bool

    @property
    def addresses(self) -> tuple[int, ...]: ...

    def plan(
        self,
        batch: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        scratch: Scratch,
    ) -> Any: ...

    def attend(
        self, plan: Any, pool: torch.Tensor, layer: int, qkv: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [t, heads * head_dim] of the step's t tokens, whose K and V are in the pool."""
        ...


class ReferenceAttention:
    """ops.attention as an Attention."""

    on_device = False
    addresses: tuple[int, ...] = ()
    plan = staticmethod(plan_attention)
    attend = staticmethod(attend)


class Step(Protocol):
    """What all layers of one step share; only the ops that made it look further inside."""

    @property
    def rows(self) -> int:
        """Rows of the stream: the step's tokens, then padding."""
        ...


class LayerOps(Protocol):
    """The pieces of a layer. What they return is valid until the next call that returns the same
    piece, or names the same `into`; x is the residual stream [rows, hidden], packed."""

    scratch: Scratch

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer of its own that a step's kernels are given."""
        ...

    def beside(self) -> LayerOps:
        """The same over the same tables and attention, with a scratch of its own."""
        ...

    def padded_rows(self, count: int) -> int:
        """Rows that a product of `count` rows is computed with; those behind are zeros."""
        ...

    def begin(
        self,
        positions: torch.Tensor,
        attention: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> Step:
        """Work out a step of t tokens at positions int64[t], whose activations are of `dtype`, in a
        stream of `rows` (of `padded_rows`, t or more; None: padded_rows(t)). A StaticBatch is for
        those whose attention is `on_device`."""
        ...

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x += delta, in place; x over its root mean square times weight, in `out` if given."""
        ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, into: str | None
    ) -> torch.Tensor:
        """x [rows, in] times weight [out, in], plus bias; rows are of `padded_rows`.

        into: names the memory of the result; None for a tensor of its own.
        """
        ...

    def attend(
        self,
        step: Any,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Norm (where given) and rotate q and k, store K and V, attend.

        qkv: [rows, (heads + 2 * kv_heads) * head_dim], overwritten. out: [rows, heads * head_dim];
        what its rows of padding hold afterwards is anybody's, zeros or what they held.
        """
        ...

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of gate_up [rows, 2 * width]."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """rows: of the stream; rotation and attention: of the step's tokens."""

    rows: int
    rotation: Rotation
    attention: AttentionPlan


class ReferenceOps:
    """Every piece in plain torch, one after another, on any device."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.spec = spec
        self.scratch = Scratch(device)
        self.frequencies = rotation_frequencies(
            spec.head_dim, spec.rope_theta, spec.rope_scaling
        ).to(device)

    @property
    def addresses(self) -> tuple[int, ...]:
        return self.scratch.addresses

    def beside(self) -> ReferenceOps:
        other = copy.copy(self)
        other.scratch = Scratch(self.frequencies.device)
        return other

    def padded_rows(self, count: int) -> int:
        return padded_rows(count)

    def begin(
        self,
        positions: torch.Tensor,
        attention: AttentionBatch,
        pool: torch.Tensor,
        dtype: torch.dtype,
        rows: int | None = None,
    ) -> ReferenceStep:
        return ReferenceStep(
            rows=padded_rows(attention.tokens) if rows is None else rows,
            rotation=Rotation(positions, self.frequencies),
            attention=plan_attention(
                attention, pool, self.spec.heads, self.spec.kv_heads, dtype, self.scratch
            ),
        )

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if delta is not None:
            x.add_(delta)
        if out is None:
            out = self.scratch.take("normed", tuple(x.shape), x.dtype)
        return rms_norm(x, weight, self.spec.norm_eps, out=out)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, into: str | None
    ) -> torch.Tensor:
        """Always a tensor of its own: oneDNN's product takes no other."""
        return linear(x, weight, bias)

    def attend(
        self,
        step: ReferenceStep,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        plan = step.attention
        self._rotate(qkv, step.rotation, plan.tokens, q_norm, k_norm)
        append_kv(plan, pool, layer, qkv)
        attend(plan, pool, layer, qkv, out=out[: plan.tokens])
        out[plan.tokens :].zero_()

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated(gate_up, self.scratch)

    def _rotate(
        self,
        qkv: torch.Tensor,
        rotation: Rotation,
        tokens: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        """Norm (where the family has it) and rotate q and k of the first `tokens` rows, in place.

        q and k heads lie side by side, so both are done at once.
        """
        heads, kv_heads, head_dim = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        both = heads + kv_heads
        qk = qkv[:tokens, : both * head_dim].view(tokens, both, head_dim)
        if q_norm is None or k_norm is None:
            rotation.apply(qk, out=qk)
            return
        weight = torch.cat((q_norm.expand(heads, head_dim), k_norm.expand(kv_heads, head_dim)))
        normed = self.scratch.take("qk", (tokens, both, head_dim), qkv.dtype)
        rotation.apply(rms_norm(qk, weight, self.spec.norm_eps, out=normed), out=qk)


def make_ops(
    kernels: str, spec: ModelSpec, device: torch.device, limits: Limits, pool_itemsize: int
) -> LayerOps:
    """The LayerOps of a name in config.KERNELS, which config.check_kernels let through.

    pool_itemsize: bytes of an element of the KV pool.
    """
    if kernels == "reference":
        return ReferenceOps(spec, device)
    assert kernels == "triton", kernels
    from holdfast.model.kernel_ops import KernelOps
    from holdfast.ops.attention_triton import TritonAttention
    from holdfast.ops.kernels.matmul_config import layer_products
    from holdfast.ops.kernels.small_matmul import SmallMatmul

    attention = TritonAttention(
        device,
        rows_max=limits.rows_max,
        query_len_max=1,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_tokens=limits.page_tokens,
        context_max=limits.table_columns * limits.page_tokens,
        itemsize=pool_itemsize,
    )
    small = None
    if pool_itemsize == 2:
        products = layer_products(
            vocab=spec.vocab_size,
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
        )
        small = SmallMatmul(device, products, limits.rows_max)
    return KernelOps(spec, device, attention, context_tokens=limits.context_tokens, small=small)
