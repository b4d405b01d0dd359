"""Which steps with prompts are computed in captured graphs: the token buckets of a model, and what
each has room for.

A graph is a whole step of one number of tokens, its attention included, whose grids are as large as
the bucket's room. Pure numbers, without torch or triton, so that gpu_work counts what device.mixed
captures. Called by both (the latter through device.build) and by ops.mixed_arrays.

The bound. Graphs help where the host would be what the GPU waits for. Launching a step of prompts
eagerly keeps the host busy for EAGER_LAYER_S a layer, whatever the number of tokens; its products
keep the GPU busy for 2 * parameters * tokens / FLOPS, and the rest of the step comes on top. So
from tokens_max = EAGER_LAYER_S * FLOPS / (2 * parameters of a layer) on the GPU is what waits for
nobody, and a graph would spare nothing: the number of layers cancels. Qwen3-0.6B (15.7e6 a layer):
7,788 tokens, of which LAYERS_MAX leaves 2,560: what 256 rows take beside them by default has 2,048
(core.scheduler), and larger steps, as of 512 rows, run eagerly. Qwen3-8B (193e6): 634, so 512.
"""

from __future__ import annotations

from holdfast.ops.kernels.matmul_config import layer_products

# Products are tiled by so many rows: a row more costs as much as a tile.
ALIGN = 128
# Buckets lie ALIGN apart up to here and twice as far above: padding is a fifth of a bucket at most.
_FINE_TOKENS_MAX = 1024
# Of the host, on an H200's machine. An estimate, from what serving gave before there were graphs:
# a mixed step of Qwen3-0.6B (28 layers, 11 kernels and 4 products each) took 10 to 13 ms of it.
EAGER_LAYER_S = 350e-6
# Of cuBLAS in bfloat16 on an H200, at these shapes (8192 cubed: 786e12).
FLOPS = 700e12
# Layers of all graphs: some 16 nodes and half a millisecond to capture each (estimates). Where
# there would be more the largest buckets go, which gain least.
LAYERS_MAX = 400
# Prompts of a bucket: PROMPT_ROWS and one more for each so many tokens. A prompt of the bucket is a
# tile of attention more that is launched in every step, taken or not.
PROMPT_ROWS, PROMPT_TOKENS = 8, 64


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
    return tuple(ladder[: LAYERS_MAX // layers])


def prompt_rows(tokens: int, rows_max: int) -> int:
    """Rows of more than one query token that a graph of so many tokens has room for."""
    return min(PROMPT_ROWS + tokens // PROMPT_TOKENS, rows_max)


def decode_rows(tokens: int, rows_max: int) -> int:
    """Rows of one query token, likewise: as many as a step can have."""
    return min(tokens, rows_max)


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
    """Of a token's row in the scratch of a step: stream, delta, normed and hidden; q, k and v;
    attended; both halves of the gate, and gated."""
    return 4 * hidden + 2 * (heads + kv_heads) * head_dim + 3 * intermediate
