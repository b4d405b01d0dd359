"""The decoder: one forward pass for Llama 3, Qwen2 and Qwen3.

Owns the order of operations; how each is computed is model.layer_ops' (the torch reference, or
kernels). Who captures a step lays it out in buffers of its own and records `begin` and `compute`,
which `forward` is made of. Built by device.runner's callers from a spec and
views of the weights slab; forward takes everything else it reads as arguments. Invariant: on a CPU
in float32, with the reference, a token's hidden state and logits are the same bits in every batch,
chunking and cache layout (see model.layers and ops.attention for what that takes). Knows no
requests, plans or files. Not for two threads at once: a decoder's ops have one scratch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from holdfast.model.layer_ops import LayerOps, ReferenceOps, Step
from holdfast.model.spec import ModelSpec
from holdfast.ops.attention import AttentionBatch, MixedBatch, StaticBatch

# All layers of a model have the same shapes, biases and alignment (model.weights.WeightsLayout).
_REHEARSED_LAYERS = 2


@dataclass(slots=True)
class Stream:
    """What flows through a step of N rows, `padded_rows` of its tokens or more.

    tokens: int64[t], t <= N; x: [N, hidden], the residual stream; attended: [N, heads * head_dim],
    what the last attention left; hidden: [N, hidden], the normed states that a step ends with.
    Valid until its ops compute another step, but for a `hidden` that was given.
    """

    tokens: torch.Tensor
    x: torch.Tensor
    attended: torch.Tensor
    hidden: torch.Tensor


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

    def before(self, x: torch.Tensor, delta: torch.Tensor | None, ops: LayerOps) -> torch.Tensor:
        """q, k and v of the stream x [rows, hidden], to which `delta` is added first: what the
        layer before left, None before the first."""
        normed = ops.add_norm(x, delta, self.input_norm)
        return ops.linear(normed, self.qkv, self.qkv_bias, "qkv")

    def attend(
        self, step: Step, qkv: torch.Tensor, pool: torch.Tensor, ops: LayerOps, out: torch.Tensor
    ) -> None:
        """Attention of the step's t tokens, the first t rows of qkv and of `out`."""
        ops.attend(step, self.index, qkv, self.q_norm, self.k_norm, pool, out)

    def after(self, x: torch.Tensor, attended: torch.Tensor, ops: LayerOps) -> torch.Tensor:
        """Advance the stream by what attention left; returns what is to be added to it next."""
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

    def beside(self) -> Decoder:
        """One over the same weights, tables and workspaces of attention, but with a scratch of its
        own: steps of this one, which may make theirs grow and move, leave that where it is. The two
        follow each other on one stream."""
        other = copy.copy(self)
        other.ops = self.ops.beside()
        return other

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
        attention: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
    ) -> torch.Tensor:
        """Compute t query tokens and store their K and V in the pool.

        tokens, positions: int64[t]; pool: [pages, layers, 2, page_tokens, kv_heads, head_dim].
        Returns the normed hidden states [t, hidden], a tensor of its own.
        """
        step = self.begin(positions, attention, pool)
        hidden = torch.empty(
            (step.rows, self.spec.hidden_size), dtype=self.embed.dtype, device=self.embed.device
        )
        self.compute(self.stream(tokens, step.rows, hidden), step, pool)
        return hidden[: tokens.numel()]

    @torch.inference_mode()
    def compute(self, stream: Stream, step: Step, pool: torch.Tensor) -> None:
        """All of a step that its ops worked out before, in a stream of as many rows.

        Rows of padding come to `stream.hidden` as whatever they are: all but attention works row by
        row, and attention knows the step's own tokens alone, so nothing of them reaches another.
        """
        ops, count = self.ops, stream.tokens.numel()
        torch.index_select(self.embed, 0, stream.tokens, out=stream.x[:count])
        stream.x[count:].zero_()
        delta = None
        for layer in self.layers:
            qkv = layer.before(stream.x, delta, ops)
            layer.attend(step, qkv, pool, ops, stream.attended)
            delta = layer.after(stream.x, stream.attended, ops)
        ops.add_norm(stream.x, delta, self.norm, out=stream.hidden)

    def stream(self, tokens: torch.Tensor, rows: int, hidden: torch.Tensor | None = None) -> Stream:
        """A stream of so many rows in the scratch of its ops, and `hidden` there too unless given:
        a smaller stream lies in front of a larger one, in the same memory."""
        take, dtype = self.ops.scratch.take, self.embed.dtype
        shape = (rows, self.spec.hidden_size)
        return Stream(
            tokens=tokens,
            x=take("x", shape, dtype),
            attended=take("attended", (rows, self.spec.heads * self.spec.head_dim), dtype),
            hidden=take("hidden", shape, dtype) if hidden is None else hidden,
        )

    @torch.inference_mode()
    def begin(
        self,
        positions: torch.Tensor,
        attention: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
        rows: int | None = None,
    ) -> Step:
        """Work out a step of t tokens at positions int64[t], in a stream of `rows` >= t; None for
        what products want."""
        return self.ops.begin(positions, attention, pool, self.embed.dtype, rows)

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
