"""Causal attention of many query tokens over pages: chunks of prompts, on top of what is cached.

The query tokens of a step are cut into *tiles* of one row each (`cut_tiles`, numpy), and a program
computes a tile's query heads of one kv head: ROWS = query tokens x heads of the group, so that K
and V are read once for all of them. It walks the positions the tile sees in blocks, in three parts:
those that a window cuts, those that every query token sees whole, which need no mask at all, and
those that the causal edge cuts. K and V come from the pages, the step's own included.

Cost. 4 * head_dim FLOP a query head, query token and position seen: 4 x 8,192 causal tokens with
32 heads of 128 are 2.2 TFLOP a layer, 2.8 ms at the H200's 786 TFLOP/s (bf16).

Called by ops.attention_triton. Knows no plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from holdfast.errors import require
from holdfast.ops.kernels.launch import launch, power_of_two
from holdfast.ops.kernels.paged_kv import (
    LOG2_E,
    computes_wide,
    padded_head,
    pages_of,
    scores_of,
    softmax_step,
)

# Fields of a tile, the rows of `cut_tiles`' result.
TILE_FIELDS = 4


@triton.jit
def _blocks(
    queries,
    keys,
    table_row,
    last,
    begin,
    stop,
    low,
    end,
    back,
    factor,
    maximum,
    weight,
    total,
    lane,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The softmax after the blocks begin .. stop; positions outside low .. end are not read.

    last: int32[ROWS], the last position each query row sees, and `back` positions in all. Without
    MASKED every row sees every position of the blocks.
    """
    in_head = lane < HEAD_DIM
    whole_head: tl.constexpr = lane.shape[0] == HEAD_DIM
    position = begin + tl.arange(0, BLOCK)
    page = pages_of(table_row, position, (position >= low) & (position < end), PAGE_TOKENS)
    for start in range(begin, stop, BLOCK):
        position = start + tl.arange(0, BLOCK)
        at = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_TOKENS) * TOKEN_STRIDE
        # One tile ahead: see ops.kernels.decode_attention.
        later = position + BLOCK
        page = pages_of(table_row, later, (later >= low) & (later < end), PAGE_TOKENS)
        k_at = keys + at[None, :] + lane[:, None]
        v_at = keys + (PAGE_TOKENS * TOKEN_STRIDE) + at[:, None] + lane[None, :]
        if MASKED:
            seen = (position >= low) & (position < end)
            k = tl.load(k_at, mask=seen[None, :] & in_head[:, None], other=0.0)
            v = tl.load(v_at, mask=seen[:, None] & in_head[None, :], other=0.0)
        elif whole_head:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=in_head[:, None], other=0.0)
            v = tl.load(v_at, mask=in_head[None, :], other=0.0)
        scores = scores_of(queries, k, factor, WIDE)
        if MASKED:
            distance = last[:, None] - position[None, :]
            visible = seen[None, :] & (distance >= 0) & (distance < back)
            scores = tl.where(visible, scores, float("-inf"))
        maximum, weight, total = softmax_step(scores, v, maximum, weight, total, WIDE)
    return maximum, weight, total


_INPUTS = ["page_table", "tiles", "tiles_len", "layer", "columns", "table_stride", "window"]


@triton.jit(do_not_specialize=_INPUTS)
def _attend_tile(
    q,
    pool,
    page_table,
    tiles,
    out,
    tiles_len,
    layer,
    columns,
    table_stride,
    window,
    factor,
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile and kv head. tiles: int32[4, tiles_len] of `cut_tiles`; one of no token is none."""
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.load(tiles + tile)
    first_token = tl.load(tiles + tiles_len + tile)
    tokens = tl.load(tiles + 2 * tiles_len + tile)
    # A graph has more tiles than most steps.
    if tokens == 0:
        return
    first_position = tl.load(tiles + 3 * tiles_len + tile)
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM

    part = tl.arange(0, ROWS)
    token = part // GROUP
    live = token < tokens
    head = kv_head * GROUP + part % GROUP
    lane = tl.arange(0, HEAD_PAD)
    inside = live[:, None] & (lane < HEAD_DIM)[None, :]
    at_token = first_token.to(tl.int64) + token
    q_at = at_token[:, None] * Q_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    queries = tl.load(q + q_at, mask=inside, other=0.0)

    end = tl.minimum(first_position + tokens, columns * PAGE_TOKENS)
    last = first_position + token
    whole_end = tl.minimum(first_position + 1, end) // BLOCK * BLOCK
    keys = pool + layer * (2 * PAGE_TOKENS * TOKEN_STRIDE) + kv_head * HEAD_DIM
    table_row = page_table + row.to(tl.int64) * table_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    low = 0
    back = 0x7FFFFFFF
    whole = 0
    if WINDOWED:
        # From `low` on the first query token sees, from `whole` on all of them do.
        low = tl.maximum(first_position - window + 1, 0)
        back = window
        whole = tl.cdiv(tl.maximum(first_position + tokens - window, 0), BLOCK) * BLOCK
        whole_end = tl.maximum(whole_end, tl.minimum(whole, tl.cdiv(end, BLOCK) * BLOCK))
        maximum, weight, total = _blocks(
            queries, keys, table_row, last, low // BLOCK * BLOCK, tl.minimum(whole, end), low, end,
            back, factor, maximum, weight, total, lane, True, HEAD_DIM, PAGE_TOKENS, PAGE_STRIDE,
            TOKEN_STRIDE, BLOCK, WIDE,
        )  # fmt: skip
    maximum, weight, total = _blocks(
        queries, keys, table_row, last, whole, whole_end, low, end, back, factor, maximum, weight,
        total, lane, False, HEAD_DIM, PAGE_TOKENS, PAGE_STRIDE, TOKEN_STRIDE, BLOCK, WIDE,
    )  # fmt: skip
    maximum, weight, total = _blocks(
        queries, keys, table_row, last, whole_end, end, low, end, back, factor, maximum, weight,
        total, lane, True, HEAD_DIM, PAGE_TOKENS, PAGE_STRIDE, TOKEN_STRIDE, BLOCK, WIDE,
    )  # fmt: skip

    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    out_at = at_token[:, None] * OUT_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """rows: query rows of a program (tokens x heads of a group), a power of two >= 16; block:
    positions of a tile of K and V."""

    rows: int = 128
    block: int = 64
    warps: int = 8
    stages: int = 3


def choose_config(head_dim: int, itemsize: int) -> PrefillConfig:
    """The host's table. A product of 128 rows is two warp groups' on Hopper; wide heads take half
    the rows, since the sums of all lanes stay in registers."""
    if itemsize == 4:
        return PrefillConfig(rows=32, block=16, warps=4, stages=2)
    if padded_head(head_dim) > 128:
        return PrefillConfig(rows=64, block=32, warps=4, stages=2)
    return PrefillConfig()


def cut_tiles(query_lens: np.ndarray, starts: np.ndarray, tokens: int) -> np.ndarray:
    """int32[4, T]: (row, first query token, query tokens, position of the first) of each tile.

    query_lens, starts: int32[n] of rows that lie one after another; a tile has at most `tokens`
    query tokens. The tiles with most to see come first, so that the last ones to run are short.
    """
    lens = query_lens.astype(np.int64)
    count = -(-lens // tokens)
    row = np.repeat(np.arange(lens.size), count)
    within = (np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)) * tokens
    length = np.minimum(tokens, lens[row] - within)
    first = (np.cumsum(lens) - lens)[row] + within
    position = starts.astype(np.int64)[row] + within
    order = np.argsort(-(position + length), kind="stable")
    # In the order that a kernel reads, which a fancy index alone would not give.
    tiles = np.stack((row, first, length, position)).astype(np.int32)
    return np.ascontiguousarray(tiles[:, order])


def tiles_of(
    lens: np.ndarray, starts: np.ndarray, which: np.ndarray, tile_tokens: int
) -> np.ndarray:
    """int32[4, T]: `cut_tiles` of the rows `which`, int64[k], numbered as they stand there; their
    tokens are where the batch of all rows has them."""
    tiles = cut_tiles(lens[which], starts[which], tile_tokens)
    first = (np.cumsum(lens, dtype=np.int64) - lens)[which]
    behind = first - (np.cumsum(lens[which], dtype=np.int64) - lens[which])
    tiles[1] += behind[tiles[0]].astype(np.int32)
    return tiles


class PrefillAttention:
    """Prefill attention of one model's shape. Has no workspace and no state of a step."""

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        itemsize: int = 2,
        config: PrefillConfig | None = None,
    ) -> None:
        """itemsize: bytes of an element of the pool; config: in place of `choose_config`'s."""
        require(heads % kv_heads == 0, f"{heads} query heads for {kv_heads} kv heads")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.page_tokens = page_tokens
        self.config = config if config is not None else choose_config(head_dim, itemsize)
        self._group = heads // kv_heads
        # A group of more heads than a program has rows is one token of more rows.
        self._rows = max(self.config.rows, power_of_two(self._group))
        self._scale = head_dim**-0.5

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a tile: what `cut_tiles` is to be given."""
        return self._rows // self._group

    def run(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        page_table: torch.Tensor,
        tiles: torch.Tensor,
        out: torch.Tensor,
        *,
        window: int = 0,
    ) -> None:
        """Attention of the tiles' query tokens, on the current stream; other rows of out stay.

        q, pool, page_table, out, window: as DecodeAttention.run has them, rows of the table as the
        tiles name them. tiles: int32[4, T] of `cut_tiles`, on the device, rows packed.
        """
        count = tiles.shape[1]
        launch(
            _attend_tile,
            (self.kv_heads, count),
            q,
            pool,
            page_table,
            tiles,
            out,
            count,
            layer,
            page_table.shape[1],
            page_table.stride(0),
            window,
            self._scale * LOG2_E,
            WINDOWED=window > 0,
            KV_HEADS=self.kv_heads,
            GROUP=self._group,
            HEAD_DIM=self.head_dim,
            HEAD_PAD=padded_head(self.head_dim),
            PAGE_TOKENS=self.page_tokens,
            PAGE_STRIDE=pool.stride(0),
            Q_STRIDE=q.stride(0),
            OUT_STRIDE=out.stride(0),
            ROWS=self._rows,
            BLOCK=self.config.block,
            WIDE=computes_wide(q, pool),
            num_warps=self.config.warps,
            num_stages=self.config.stages,
        )
