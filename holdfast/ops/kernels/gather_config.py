"""Which prefill rows have their K and V gathered before attention, and the memory that takes.

Pure numbers, without torch or triton, so that gpu_work counts what ops.attention_triton allocates.
Called by both and by ops.kernels.gather_kv.
"""

from __future__ import annotations

# Positions that a row's place in the scratch is a multiple of: the widest tile of K and V.
ALIGN = 128
# Positions that are gathered in a step at most. K and V of 8 heads of 128 in 2 bytes are 134 MB.
TOKENS_MAX = 32_768
# Query tokens of a row worth its gather. One position costs 8 KiB of traffic in that shape, 2.1 ns
# at 4 TB/s, and spares its query tokens 15 ps each (32 heads, 568 instead of 385 TFLOP/s measured
# on an H200): 140. Rounded up, since a small step does not fill the GPU.
QUERY_TOKENS_MIN = 256
# Query rows of a tile, and lanes of a head that registers and shared memory hold.
TILE_ROWS = 128
HEAD_DIM_MAX = 128


def fits(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> bool:
    """Whether ops.kernels.warp_prefill can compute a model's shape: elements of two bytes, rows of
    K that begin on the 16 bytes a bulk copy asks for, a group of heads that fits a tile."""
    whole = head_dim % 8 == 0 and head_dim <= HEAD_DIM_MAX
    return itemsize == 2 and whole and heads // kv_heads <= TILE_ROWS


def aligned(tokens: int) -> int:
    return -(-tokens // ALIGN) * ALIGN


def scratch_tokens(rows_max: int, context_max: int) -> int:
    """Positions of the scratch, a multiple of ALIGN: TOKENS_MAX, or all that rows can have."""
    return min(TOKENS_MAX, rows_max * aligned(context_max))


def scratch_bytes(
    heads: int, kv_heads: int, head_dim: int, itemsize: int, rows_max: int, context_max: int
) -> int:
    """Of the scratch of K and V, 0 where the shape does not fit."""
    if not fits(heads, kv_heads, head_dim, itemsize):
        return 0
    return 2 * kv_heads * scratch_tokens(rows_max, context_max) * head_dim * itemsize
