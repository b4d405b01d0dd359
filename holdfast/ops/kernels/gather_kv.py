"""K and V of a step's prefill rows, brought from their pages to one piece of memory.

The scratch is [2, kv_heads, tokens, head_dim], K before V, a row's positions one after another from
a multiple of `ALIGN` on, so that ops.kernels.bulk_prefill can have whole tiles of it copied by the
bulk copy engine, which knows no pages. What a tile covers besides a row's own positions is zeros:
those behind its end and, with a window, those before the first that is seen.

Cost. A token's K and V read and written once a layer: 8,192 tokens of 8 heads of 128 in bf16 are
67 MB, 16 us at the H200's 4.24 TB/s.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.paged_kv import padded_head, pages_of

# Positions that a row's place in the scratch is a multiple of: the widest tile of K and V.
ALIGN = 128
# Fields of a row in the scratch, the rows of `place_rows`' result.
PLACE_FIELDS = 3
# Positions that a program copies of one head of K or V.
_BLOCK = 64


@triton.jit(do_not_specialize=["rows", "layer", "table_stride", "tokens_max", "window"])
def _gather(
    pool,
    page_table,
    places,
    scratch,
    rows,
    layer,
    table_stride,
    tokens_max,
    window,
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK positions of one row and one head of K or V. places: int32[3, rows]."""
    plane = tl.program_id(0)
    begin = tl.program_id(1) * BLOCK
    row = tl.program_id(2)
    place = tl.load(places + row)
    length = tl.load(places + rows + row)
    first_position = tl.load(places + 2 * rows + row)
    low = 0
    if WINDOWED:
        low = tl.maximum(first_position - window + 1, 0)
    if (begin < tl.cdiv(length, ALIGNED) * ALIGNED) & (begin + BLOCK > low // ALIGNED * ALIGNED):
        TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
        lane = tl.arange(0, HEAD_PAD)
        position = begin + tl.arange(0, BLOCK)
        held = (position >= low) & (position < length)
        in_head = (lane < HEAD_DIM)[None, :]
        table_row = page_table + row.to(tl.int64) * table_stride
        page = pages_of(table_row, position, held, PAGE_TOKENS)
        start = (layer * 2 + plane // KV_HEADS) * (PAGE_TOKENS * TOKEN_STRIDE)
        start += plane % KV_HEADS * HEAD_DIM
        at = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_TOKENS) * TOKEN_STRIDE
        values = tl.load(
            pool + start + at[:, None] + lane[None, :], mask=held[:, None] & in_head, other=0.0
        )
        to = plane.to(tl.int64) * tokens_max + place + position
        inside = (position < tokens_max - place)[:, None] & in_head
        tl.store(scratch + to[:, None] * HEAD_DIM + lane[None, :], values, mask=inside)


def place_rows(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int32[3, n]: (place in the scratch, tokens, position of the first query token) of each row.

    lengths: int32[n], tokens of a row with the step's own; starts: int32[n].
    """
    spans = -(-lengths.astype(np.int64) // ALIGN) * ALIGN
    places = np.cumsum(spans) - spans
    return np.stack((places, lengths, starts)).astype(np.int32)


def placed_tokens(lengths: np.ndarray) -> int:
    """Tokens of scratch that `place_rows` needs."""
    return int((-(-lengths.astype(np.int64) // ALIGN) * ALIGN).sum())


def gather_kv(
    pool: torch.Tensor,
    layer: int,
    page_table: torch.Tensor,
    places: torch.Tensor,
    scratch: torch.Tensor,
    length_max: int,
    *,
    window: int = 0,
) -> None:
    """Bring the K and V of a layer to scratch, on the current stream.

    pool: as DecodeAttention.run has it; page_table: int32[n, W], of these rows alone; places:
    int32[3, n] of `place_rows`, packed; scratch: [2, kv_heads, tokens, head_dim], packed, of the
    pool's type; length_max: of the longest row at least; window: positions before
    `starts` - window + 1 become zeros or stay as they are; 0 for none.
    """
    _, kv_heads, tokens_max, head_dim = scratch.shape
    rows, page_tokens = places.shape[1], pool.shape[3]
    _gather[(2 * kv_heads, -(-length_max // ALIGN) * (ALIGN // _BLOCK), rows)](
        pool,
        page_table,
        places,
        scratch,
        rows,
        layer,
        page_table.stride(0),
        tokens_max,
        window,
        WINDOWED=window > 0,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=padded_head(head_dim),
        PAGE_TOKENS=page_tokens,
        PAGE_STRIDE=pool.stride(0),
        ALIGNED=ALIGN,
        BLOCK=_BLOCK,
        num_warps=4,
    )
