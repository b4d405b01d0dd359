"""The decoder: one forward pass for Llama 3, Qwen2 and Qwen3, in plain torch.

Owns the order of operations and the scratch it runs in. Built by device.runner from a spec and
views of the weights slab; forward takes everything else it reads as arguments. Invariant: on a CPU
in float32 a token's hidden state and logits are the same bits in every batch, chunking and cache
layout (see model.layers and ops.attention for what that takes). Knows no requests, plans or files.
Not for two threads at once: a decoder has one scratch.
"""

from __future__ import annotations

import torch

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
    Scratch,
    append_kv,
    attend,
    plan_attention,
)


class Layer:
    """One block: attention and gated MLP, each behind a norm and added to the stream `x`."""

    def __init__(self, spec: ModelSpec, index: int, weights: dict[str, torch.Tensor]) -> None:
        own = f"layers.{index}."
        self.spec = spec
        self.index = index
        self.input_norm = weights[own + "input_norm"]
        self.qkv = weights[own + "qkv"]
        self.qkv_bias = weights.get(own + "qkv_bias")
        self.q_norm = weights.get(own + "q_norm")
        self.k_norm = weights.get(own + "k_norm")
        self.output = weights[own + "output"]
        self.output_bias = weights.get(own + "output_bias")
        self.mlp_norm = weights[own + "mlp_norm"]
        self.gate_up = weights[own + "gate_up"]
        self.gate_up_bias = weights.get(own + "gate_up_bias")
        self.down = weights[own + "down"]
        self.down_bias = weights.get(own + "down_bias")

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        attention: AttentionPlan,
        pool: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        """Advance x [rows, hidden] in place; the step's t tokens are its first t rows."""
        rows, dtype = x.shape[0], x.dtype
        normed = scratch.take("normed", tuple(x.shape), dtype)
        rms_norm(x, self.input_norm, self.spec.norm_eps, out=normed)
        qkv = linear(normed, self.qkv, self.qkv_bias)
        self._rotate(qkv, rotation, attention.tokens, scratch)
        append_kv(attention, pool, self.index, qkv)
        attended = scratch.take("attended", (rows, self.output.shape[1]), dtype)
        attend(attention, pool, self.index, qkv, out=attended[: attention.tokens])
        attended[attention.tokens :].zero_()
        x.add_(linear(attended, self.output, self.output_bias))

        rms_norm(x, self.mlp_norm, self.spec.norm_eps, out=normed)
        gate_up = linear(normed, self.gate_up, self.gate_up_bias)
        x.add_(linear(gated(gate_up, scratch), self.down, self.down_bias))

    def _rotate(self, qkv: torch.Tensor, rotation: Rotation, tokens: int, scratch: Scratch) -> None:
        """Norm (where the family has it) and rotate q and k of the first `tokens` rows, in place.

        q and k heads lie side by side, so both are done at once.
        """
        heads, kv_heads, head_dim = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        both = heads + kv_heads
        qk = qkv[:tokens, : both * head_dim].view(tokens, both, head_dim)
        if self.q_norm is None or self.k_norm is None:
            rotation.apply(qk, out=qk)
            return
        weight = torch.cat(
            (self.q_norm.expand(heads, head_dim), self.k_norm.expand(kv_heads, head_dim))
        )
        normed = scratch.take("qk", (tokens, both, head_dim), qkv.dtype)
        rotation.apply(rms_norm(qk, weight, self.spec.norm_eps, out=normed), out=qk)


class Decoder:
    """All layers, embedding and head over `weights`, the views of a WeightsLayout's slab."""

    def __init__(self, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> None:
        self.spec = spec
        self.embed = weights["embed"]
        self.norm = weights["norm"]
        self.head = weights.get("head", self.embed)
        self.layers = [Layer(spec, index, weights) for index in range(spec.layers)]
        self.frequencies = rotation_frequencies(
            spec.head_dim, spec.rope_theta, spec.rope_scaling
        ).to(self.embed.device)
        self._scratch = Scratch(self.embed.device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the scratch, which moves when a larger step makes it grow."""
        return self._scratch.addresses

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        pool: torch.Tensor,
    ) -> torch.Tensor:
        """Compute t query tokens and store their K and V in the pool.

        tokens, positions: int64[t]; pool: [pages, layers, 2, page_tokens, kv_heads, head_dim].
        Returns the normed hidden states [t, hidden], a tensor of its own.
        """
        count = tokens.numel()
        rows = padded_rows(count)
        hidden = (rows, self.spec.hidden_size)
        x = self._scratch.take("x", hidden, self.embed.dtype)
        torch.index_select(self.embed, 0, tokens, out=x[:count])
        x[count:].zero_()
        plan = plan_attention(
            attention, pool, self.spec.heads, self.spec.kv_heads, x.dtype, self._scratch
        )
        rotation = Rotation(positions, self.frequencies)
        for layer in self.layers:
            layer.forward(x, rotation, plan, pool, self._scratch)
        out = torch.empty_like(x)
        return rms_norm(x, self.norm, self.spec.norm_eps, out=out)[:count]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32[k, vocab] of hidden states [k, hidden], a tensor of its own."""
        count = hidden.shape[0]
        rows = padded_rows(count)
        if rows != count:
            padded = self._scratch.take("head_in", (rows, hidden.shape[1]), hidden.dtype)
            padded[:count] = hidden
            padded[count:].zero_()
            hidden = padded
        return linear(hidden, self.head, None)[:count].float()
