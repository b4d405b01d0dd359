"""The decoder: one forward pass for Llama 3, Qwen2 and Qwen3.

Owns the order of operations; how each is computed is model.layer_ops' (the torch reference, or
kernels). Built by device.runner's callers from a spec and views of the weights slab; forward takes
everything else it reads as arguments. Invariant: on a CPU in float32, with the reference, a token's
hidden state and logits are the same bits in every batch, chunking and cache layout (see
model.layers and ops.attention for what that takes). Knows no requests, plans or files. Not for two
threads at once: a decoder's ops have one scratch.
"""

from __future__ import annotations

import copy

import torch

from holdfast.model.layer_ops import LayerOps, ReferenceOps, Step
from holdfast.model.spec import ModelSpec
from holdfast.ops.attention import AttentionBatch, StaticBatch

# All layers of a model have the same shapes, biases and alignment (model.weights.WeightsLayout).
_REHEARSED_LAYERS = 2


class Layer:
    """One block: attention and gated MLP, each behind a norm and added to the stream `x`."""

    def __init__(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        own = f"layers.{index}."
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
        delta: torch.Tensor | None,
        step: Step,
        pool: torch.Tensor,
        ops: LayerOps,
    ) -> torch.Tensor:
        """Advance the stream x [rows, hidden]; the step's t tokens are its first t rows.

        delta: what the layer before leaves to be added to x, None before the first. Returns what
        this one leaves.
        """
        normed = ops.add_norm(x, delta, self.input_norm)
        qkv = ops.linear(normed, self.qkv, self.qkv_bias, "qkv")
        attended = ops.attend(step, self.index, qkv, self.q_norm, self.k_norm, pool)
        delta = ops.linear(attended, self.output, self.output_bias, "delta")

        normed = ops.add_norm(x, delta, self.mlp_norm)
        gate_up = ops.linear(normed, self.gate_up, self.gate_up_bias, "gate_up")
        return ops.linear(ops.gated(gate_up), self.down, self.down_bias, "delta")


class Decoder:
    """All layers, embedding and head over `weights`, the views of a WeightsLayout's slab."""

    def __init__(
        self, spec: ModelSpec, weights: dict[str, torch.Tensor], ops: LayerOps | None = None
    ) -> None:
        """ops: how the pieces are computed, on the weights' device; None for the reference."""
        self.spec = spec
        self.embed = weights["embed"]
        self.norm = weights["norm"]
        self.head = weights.get("head", self.embed)
        self.layers = [Layer(index, weights) for index in range(spec.layers)]
        self.ops: LayerOps = ops or ReferenceOps(spec, self.embed.device)

    def rehearsal(self) -> Decoder:
        """One that takes every kernel this one takes, in a fraction of the time: the first layer,
        before which nothing waits to be added, one like all others, and the head. It has this one's
        ops, so their buffers grow as large; what it computes is of no use."""
        short = copy.copy(self)
        short.layers = self.layers[:_REHEARSED_LAYERS]
        return short

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the buffers of its ops, which move when a larger step makes them grow."""
        return self.ops.addresses

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch | StaticBatch,
        pool: torch.Tensor,
    ) -> torch.Tensor:
        """Compute t query tokens and store their K and V in the pool.

        tokens, positions: int64[t]; pool: [pages, layers, 2, page_tokens, kv_heads, head_dim].
        Returns the normed hidden states [t, hidden], a tensor of its own.
        """
        step = self.ops.begin(positions, attention, pool, self.embed.dtype)
        return self.compute(tokens, step, pool)

    @torch.inference_mode()
    def compute(self, tokens: torch.Tensor, step: Step, pool: torch.Tensor) -> torch.Tensor:
        """`forward` of a step that its ops worked out before: what a graph captures."""
        count = tokens.numel()
        shape = (step.rows, self.spec.hidden_size)
        x = self.ops.scratch.take("x", shape, self.embed.dtype)
        torch.index_select(self.embed, 0, tokens, out=x[:count])
        x[count:].zero_()
        delta = None
        for layer in self.layers:
            delta = layer.forward(x, delta, step, pool, self.ops)
        return self.ops.add_norm(x, delta, self.norm, out=torch.empty_like(x))[:count]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32[k, vocab] of hidden states [k, hidden], a tensor of its own."""
        return self.raw_logits(hidden).float()

    @torch.inference_mode()
    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` as the product gives them, in the weights' type: half the bytes in bfloat16."""
        count = hidden.shape[0]
        rows = self.ops.padded_rows(count)
        if rows != count:
            padded = self.ops.scratch.take("head_in", (rows, hidden.shape[1]), hidden.dtype)
            padded[:count] = hidden
            padded[count:].zero_()
            hidden = padded
        return self.ops.linear(hidden, self.head, None, None)[:count]
