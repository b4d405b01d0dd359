"""K and V of a step's prefill rows, brought from their pages to one piece of memory.

The scratch is [2, kv_heads, tokens, head_dim], K before V, a row's positions one after another from
a multiple of `ALIGN` on, so that ops.kernels.warp_prefill can have whole tiles of it copied by the
bulk copy engine, which knows no pages. What a tile covers besides a row's own positions is zeros:
those behind its end and, with a window, those before the first that is seen. So nothing of another
row, of a free page or of an older step is ever multiplied.

Cost. A token's K and V read and written once a layer: 16,384 tokens of 8 heads of 128 in bf16 are
134 MB, 38 us on an H200 (3.5 TB/s, measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.gather_config import ALIGN, QUERY_TOKENS_MIN
from holdfast.ops.kernels.launch import launch
from holdfast.ops.kernels.paged_kv import padded_head, pages_of

# Fields of a row in the scratch, the rows of `place_rows`' places.
PLACE_FIELDS = 3
# Positions that a program copies of one head of K or V at a time.
_BLOCK = 64
# Programs of a launch at most: eight an SM on an H200, so that 128 KiB of each SM are under way. A
# graph's launch has as many however little there is to gather.
_PROGRAMS_MAX = 1024


@triton.jit(do_not_specialize=["page_table", "rows", "layer", "table_stride", "tokens", "window"])
def _gather(
    pool,
    page_table,
    places,
    owners,
    used,
    scratch,
    rows,
    layer,
    table_stride,
    tokens,
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
    """One head of K or V: every so manieth BLOCK of the positions of the scratch that are in use.
    tokens: of the whole scratch."""
    plane = tl.program_id(0)
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    lane = tl.arange(0, HEAD_PAD)
    in_head = (lane < HEAD_DIM)[None, :]
    start = (layer * 2 + plane // KV_HEADS) * (PAGE_TOKENS * TOKEN_STRIDE)
    start += plane % KV_HEADS * HEAD_DIM
    # How much is in use lies on the device, so that a captured launch serves every step.
    blocks = tl.load(used) * (ALIGNED // BLOCK)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        at_scratch = block * BLOCK
        row = tl.load(owners + at_scratch // ALIGNED)
        begin = at_scratch - tl.load(places + row)
        length = tl.load(places + rows + row)
        low = 0
        if WINDOWED:
            low = tl.maximum(tl.load(places + 2 * rows + row) - window + 1, 0)
        if begin + BLOCK > low // ALIGNED * ALIGNED:
            position = begin + tl.arange(0, BLOCK)
            held = (position >= low) & (position < length)
            table_row = page_table + row.to(tl.int64) * table_stride
            page = pages_of(table_row, position, held, PAGE_TOKENS)
            at = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_TOKENS) * TOKEN_STRIDE
            values = tl.load(
                pool + start + at[:, None] + lane[None, :], mask=held[:, None] & in_head, other=0.0
            )
            to = plane.to(tl.int64) * tokens + at_scratch + tl.arange(0, BLOCK)
            tl.store(scratch + to[:, None] * HEAD_DIM + lane[None, :], values, mask=in_head)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The rows of a step that are gathered, g of them, on the device; all packed but page_table.

    page_table: int32[g, W], of these rows alone; places, owners, used: of `place_rows`, owners with
    room behind what is in use; tiles: int32[4, T] of prefill_attention.cut_tiles, rows as places
    numbers them, a tile of no token where there is none.
    """

    page_table: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    used: torch.Tensor
    tiles: torch.Tensor


def choose_rows(
    query_lens: np.ndarray, starts: np.ndarray, room: int, query_tokens_min: int = QUERY_TOKENS_MIN
) -> np.ndarray:
    """bool[n]: the rows to gather: those with query tokens enough, in order, while there is room.

    query_lens, starts: int32[n]; room: positions of the scratch, a multiple of ALIGN.
    """
    spans = _spans(starts.astype(np.int64) + query_lens)
    wanted = (query_lens >= query_tokens_min) & (spans <= room)
    return wanted & (np.cumsum(np.where(wanted, spans, 0)) <= room)


def place_rows(
    lengths: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places int32[3, n], owners int32[B], used int32[1]).

    places: (place in the scratch, tokens, position of the first query token) of each row; owners:
    the row of each ALIGN positions of the scratch that are in use; used: how many these are.
    lengths: int32[n], tokens of a row with the step's own, 1 at least; starts: int32[n].
    """
    spans = _spans(lengths.astype(np.int64))
    places = np.stack((np.cumsum(spans) - spans, lengths, starts)).astype(np.int32)
    owners = np.repeat(np.arange(lengths.size, dtype=np.int32), spans // ALIGN)
    return places, owners, np.array([owners.size], np.int32)


def positions_of(lengths: np.ndarray) -> int:
    """Positions of the scratch that rows of so many tokens take, int[n] with the step's own."""
    return int(_spans(lengths.astype(np.int64)).sum())


def _spans(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // ALIGN) * ALIGN


def gather_kv(
    pool: torch.Tensor, layer: int, rows: Gathered, scratch: torch.Tensor, *, window: int = 0
) -> None:
    """Bring the K and V of a layer to scratch, on the current stream.

    pool: as DecodeAttention.run has it; scratch: [2, kv_heads, tokens, head_dim], packed, of the
    pool's type, with room for all that `rows.owners` names; window: positions before start -
    window + 1 become zeros or stay as they are, for no tile covers them; 0 for none.
    """
    _, kv_heads, tokens, head_dim = scratch.shape
    planes, blocks = 2 * kv_heads, rows.owners.numel() * (ALIGN // _BLOCK)
    launch(
        _gather,
        (planes, min(blocks, max(_PROGRAMS_MAX // planes, 1))),
        pool,
        rows.page_table,
        rows.places,
        rows.owners,
        rows.used,
        scratch,
        rows.places.shape[1],
        layer,
        rows.page_table.stride(0),
        tokens,
        window,
        WINDOWED=window > 0,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=padded_head(head_dim),
        PAGE_TOKENS=pool.shape[3],
        PAGE_STRIDE=pool.stride(0),
        ALIGNED=ALIGN,
        BLOCK=_BLOCK,
        num_warps=4,
    )
