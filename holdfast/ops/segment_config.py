"""Which steps with prompts are computed in captured segments: the token buckets of a model.

A segment is all that a step computes between two attentions (model.decoder `segment`), captured for
one number of tokens. Pure numbers, without torch or triton, so that gpu_work counts what
device.segments captures. Called by both (the latter through device.build).

The bound. Graphs help where the host would be what the GPU waits for. Launching a step of prompts
eagerly keeps the host busy for EAGER_LAYER_S a layer, whatever the number of tokens; its products
keep the GPU busy for 2 * parameters * tokens / FLOPS, and the rest of the step comes on top. So
from tokens_max = EAGER_LAYER_S * FLOPS / (2 * parameters of a layer) on the GPU is what waits for
nobody, and a graph would spare nothing: the number of layers cancels. Qwen3-0.6B (15.7e6 a layer):
7,788 tokens, of which GRAPHS_MAX leaves 2,304 (as many as a step of 256 rows and a chunk of
2,048 has); Qwen3-8B (193e6): 634, so 512.
"""

from __future__ import annotations

from holdfast.ops.kernels.matmul_config import layer_products

# Products are tiled by so many rows: a row more costs as much as a tile.
ALIGN = 128
# Buckets lie ALIGN apart up to here and twice as far above: padding is a fifth of a bucket at most.
_FINE_TOKENS_MAX = 1024
# Of the host, on an H200's machine. An estimate, from what serving gave before there were segments:
# a mixed step of Qwen3-0.6B (28 layers, 11 kernels and 4 products each) took 10 to 13 ms of it.
EAGER_LAYER_S = 350e-6
# Of cuBLAS in bfloat16 on an H200, at these shapes (8192 cubed: 786e12).
FLOPS = 700e12
# Graphs of all buckets, layers + 1 each: some 10 nodes and a third of a millisecond to capture
# (estimates). Where there would be more the largest buckets go, which gain least.
GRAPHS_MAX = 400


def token_buckets(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    prefill_tokens: int,
    rows_max: int,
) -> tuple[int, ...]:
    """Tokens of the buckets, rising multiples of ALIGN; none where a graph would spare nothing.

    A step has prefill_tokens + rows_max tokens at most (config.Limits), and so has the largest.
    """
    parameters = layer_parameters(
        hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    helped = int(EAGER_LAYER_S * FLOPS / (2 * parameters))
    most = min(helped // ALIGN, -(-(prefill_tokens + rows_max) // ALIGN)) * ALIGN
    ladder, tokens = [], ALIGN
    while tokens < most:
        ladder.append(tokens)
        tokens += ALIGN if tokens < _FINE_TOKENS_MAX else 2 * ALIGN
    if most:
        ladder.append(most)
    return tuple(ladder[: GRAPHS_MAX // (layers + 1)])


def layer_parameters(
    *, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Weights of a layer's products."""
    *layer, _head = layer_products(
        vocab=0,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    return sum(n * k for n, k in layer)


def row_elements(
    *, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Of a token's row in the buffers of segments: stream, delta, normed and hidden; q, k and v;
    attended; both halves of the gate, and gated."""
    return 4 * hidden + 2 * (heads + kv_heads) * head_dim + 3 * intermediate
