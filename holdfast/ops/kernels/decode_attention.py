"""Attention of decode and verify over pages, split along the context: everything from the device.

A row has q_len query tokens (1, or 1 + drafts), the last of its sequence. A program computes the
query heads of one kv head (GQA packed into the rows of a product) over one part of a row's context;
whichever of a row's programs arrives last adds the parts up by their log-sum-exp, in the order of
their numbers: the same input gives the same bits, whoever that is.

The grid is (kv heads, splits, rows) and depends on the bucket alone, so that a captured graph is
right for every length: a row's context is cut into equal parts of whole blocks, as many as the
bucket wants, none shorter or longer than the bucket's bounds, and never more than *splits*. A
program behind the end of its row leaves at once; a row of one part has nothing to add up.

Cost. A token of a kv head is 2 * head_dim elements, read once: 32/8 heads of 128 in bfloat16 are
4 KiB a token and layer, 128 rows of 2,048 tokens 1.07 GB, 253 us at the H200's 4.24 TB/s. A tile
of K and V is at most 32 KiB and the next two are in flight, so three programs an SM hold 96 KiB or
more under way where 4.8 TB/s times 0.8 us need 30 (ops.kernels.decode_config).

Called by ops.attention_triton and by who captures graphs. Knows no plan and no host length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from holdfast.errors import require
from holdfast.ops.kernels.decode_config import DecodeConfig, choose_config
from holdfast.ops.kernels.dependent import launch_dependents, launch_options, wait_for_previous
from holdfast.ops.kernels.launch import ceil_div, launch, power_of_two
from holdfast.ops.kernels.paged_kv import (
    LOG2_E,
    computes_wide,
    padded_head,
    pages_of,
    scores_of,
    softmax_step,
)

# Fewer rows than 16 no product takes; more than 64 of 256 lanes do not fit the registers.
_ROWS_MIN, _ROWS_MAX = 16, 64


@triton.jit
def _cut(
    length,
    window,
    columns,
    splits,
    parts,
    blocks_min,
    blocks_max,
    Q_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """(end, first, blocks): positions first .. end are seen, each part has so many blocks of them.

    first is a whole number of blocks. A length beyond the table is cut to it.
    """
    end = tl.minimum(tl.maximum(length, 0), columns * PAGE_TOKENS)
    low = tl.where(window > 0, tl.maximum(end - Q_LEN - window + 1, 0), 0)
    first = low // BLOCK * BLOCK
    all_blocks = tl.cdiv(end - first, BLOCK)
    blocks = tl.minimum(tl.maximum(tl.cdiv(all_blocks, parts), blocks_min), blocks_max)
    return end, first, tl.maximum(blocks, tl.cdiv(all_blocks, splits))


@triton.jit
def _joined(
    partial,
    partial_lse,
    base,
    filled,
    live,
    inside,
    lane,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """float32[ROWS, HEAD_PAD]: the parts 0 .. filled, weighed by their log-sum-exp.

    One part after another, in the layout of the loop before: a tile of several parts at once had
    that loop converted to another layout, at twice the time on an H200.
    """
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for split in range(0, filled):
        place = base + split * PARTS
        # Past L1, which knows nothing of what other programs stored.
        lse = tl.load(partial_lse + place, mask=live, other=float("-inf"), cache_modifier=".cg")
        at = partial + place[:, None] * HEAD_DIM + lane[None, :]
        values = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, lse)
        # -inf less -inf is NaN: what has seen nothing counts from 0.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(lse - origin)
        shrink = tl.exp2(highest - origin)
        weight = weight * shrink + share
        total = total * shrink[:, None] + share[:, None] * values
        highest = higher
    return total / tl.where(weight == 0.0, 1.0, weight)[:, None]


# Neither integers nor the alignment of index arrays make another kernel: nothing compiles later,
# and the buckets of an engine, whose splits differ, share their kernels.
_CUT_INPUTS = ["lengths", "first_tokens", "columns", "window", "splits", "parts"]
_CUT_INPUTS += ["blocks_min", "blocks_max"]


@triton.jit(do_not_specialize=[*_CUT_INPUTS, "page_table", "layer", "table_stride"])
def _attend_split(
    q,
    pool,
    page_table,
    lengths,
    first_tokens,
    partial,
    partial_lse,
    arrivals,
    out,
    layer,
    columns,
    table_stride,
    window,
    splits,
    parts,
    blocks_min,
    blocks_max,
    factor,
    SPLIT: tl.constexpr,
    SCATTERED: tl.constexpr,
    Q_LEN: tl.constexpr,
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
    DEPENDENT: tl.constexpr,
):
    """One split of one row and kv head: ROWS of its GROUP * Q_LEN query rows, token after token."""
    if DEPENDENT:
        launch_dependents()
        wait_for_previous()
    tile = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    row = tl.program_id(2)
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    PARTS: tl.constexpr = Q_LEN * GROUP

    length = tl.load(lengths + row)
    # Padding among prompts has no place in `out`, where all tokens may be somebody's. (`and` of a
    # constant and a tensor would be no branch at all.)
    if SCATTERED:  # noqa: SIM102
        if length == 0:
            return
    end, first, blocks = _cut(
        length, window, columns, splits, parts, blocks_min, blocks_max, Q_LEN, BLOCK, PAGE_TOKENS
    )
    begin = first + split * blocks * BLOCK
    stop = tl.minimum(end, begin + blocks * BLOCK)
    # The first part of an empty row stays, to write its zeros.
    if SPLIT:  # noqa: SIM102
        if (begin >= end) & (split > 0):
            return

    part = tile * ROWS + tl.arange(0, ROWS)
    live = part < PARTS
    token = part // GROUP
    head = kv_head * GROUP + part % GROUP
    lane = tl.arange(0, HEAD_PAD)
    in_head = lane < HEAD_DIM
    first_token = (tl.load(first_tokens + row) if SCATTERED else row * Q_LEN).to(tl.int64)
    q_at = (first_token + token)[:, None] * Q_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    queries = tl.load(q + q_at, mask=live[:, None] & in_head[None, :], other=0.0)

    # The last position that each query row sees, and how far back the first of them does.
    last = end - Q_LEN + token
    low = tl.where(window > 0, tl.maximum(end - Q_LEN - window + 1, 0), 0)
    back = tl.where(window > 0, window, 0x7FFFFFFF)
    keys = pool + layer * (2 * PAGE_TOKENS * TOKEN_STRIDE) + kv_head * HEAD_DIM
    table_row = page_table + row.to(tl.int64) * table_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    position = begin + tl.arange(0, BLOCK)
    seen = (position >= low) & (position < stop)
    page = pages_of(table_row, position, seen, PAGE_TOKENS)
    # A page is looked up one tile ahead: a look-up that feeds loads of the same turn takes Triton's
    # pipeline its depth (seen in its IR: one buffer, and nothing in flight during a product).
    for start in range(begin, stop, BLOCK):
        position = start + tl.arange(0, BLOCK)
        seen = (position >= low) & (position < stop)
        at = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_TOKENS) * TOKEN_STRIDE
        page = pages_of(table_row, position + BLOCK, position + BLOCK < stop, PAGE_TOKENS)
        k = tl.load(
            keys + at[None, :] + lane[:, None], mask=seen[None, :] & in_head[:, None], other=0.0
        )
        v = tl.load(
            keys + (PAGE_TOKENS * TOKEN_STRIDE) + at[:, None] + lane[None, :],
            mask=seen[:, None] & in_head[None, :],
            other=0.0,
        )
        scores = scores_of(queries, k, factor, WIDE)
        distance = last[:, None] - position[None, :]
        visible = seen[None, :] & (distance >= 0) & (distance < back)
        scores = tl.where(visible, scores, float("-inf"))
        maximum, weight, total = softmax_step(scores, v, maximum, weight, total, WIDE)

    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    inside = live[:, None] & in_head[None, :]
    out_at = (first_token + token)[:, None] * OUT_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    last_here = True
    if SPLIT:
        filled = tl.cdiv(end - first, blocks * BLOCK)
        if filled > 1:
            base = (row.to(tl.int64) * KV_HEADS + kv_head) * splits * PARTS + part
            place = base + split * PARTS
            tl.store(partial + place[:, None] * HEAD_DIM + lane[None, :], total, mask=inside)
            # log2 of a weight of 0 is -inf: a part that a query token sees nothing of.
            tl.store(partial_lse + place, maximum + tl.log2(weight), mask=live)
            # Every thread's share is there before this program says so.
            tl.debug_barrier()
            arrival = arrivals + row * tl.num_programs(0) + tl.program_id(0)
            last_here = tl.atomic_add(arrival, 1, sem="acq_rel") == filled - 1
            if last_here:
                total = _joined(
                    partial, partial_lse, base, filled, live, inside, lane, PARTS, HEAD_DIM, ROWS,
                    HEAD_PAD,
                )  # fmt: skip
                tl.store(arrival, 0)
    if last_here:
        tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)


class DecodeAttention:
    """Decode attention of one model's shape on one device, with the workspace of all its buckets.

    Owns partial float32[parts, head_dim], partial_lse float32[parts] and arrivals int32[row, kv
    head and tile], 0 between launches, which every layer and every captured graph shares: launches
    on one stream, one after another. No call allocates.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        rows_max: int,
        query_len_max: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        context_max: int,
        itemsize: int = 2,
        sm_count: int | None = None,
        config_of: Callable[[int], DecodeConfig] | None = None,
    ) -> None:
        """context_max: tokens of the longest row; itemsize: bytes of an element of the pool.

        sm_count: of the device unless given. config_of: rows -> DecodeConfig, in place of
        `choose_config`. Raises InvariantError when the shape is none that the kernel computes.
        """
        require(
            heads % kv_heads == 0 and min(rows_max, query_len_max, context_max, page_tokens) > 0,
            f"{heads} query heads for {kv_heads} kv heads, {rows_max} rows of {query_len_max} "
            f"query tokens, {context_max} tokens in pages of {page_tokens}",
        )
        self.device = torch.device(device)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.page_tokens = page_tokens
        self.rows_max, self.query_len_max = rows_max, query_len_max
        if sm_count is None:
            on_gpu = self.device.type == "cuda"
            properties = torch.cuda.get_device_properties(self.device) if on_gpu else None
            sm_count = properties.multi_processor_count if properties is not None else 1
        self._configs = tuple(
            config_of(rows)
            if config_of is not None
            else choose_config(rows, kv_heads, head_dim, itemsize, context_max, sm_count)
            for rows in range(1, rows_max + 1)
        )
        parts = max(
            rows * config.splits * heads * query_len_max if config.splits > 1 else 0
            for rows, config in enumerate(self._configs, 1)
        )
        self._partial = torch.empty((parts, head_dim), dtype=torch.float32, device=self.device)
        self._partial_lse = torch.empty(parts, dtype=torch.float32, device=self.device)
        tiles = max(self._tiles(length)[1] for length in range(1, query_len_max + 1))
        self._arrivals = torch.zeros(
            rows_max * kv_heads * tiles, dtype=torch.int32, device=self.device
        )
        self._scale = head_dim**-0.5

    @property
    def workspace_bytes(self) -> int:
        own = (self._partial, self._partial_lse, self._arrivals)
        return 4 * sum(each.numel() for each in own)

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph has of this object: a part of its address manifest."""
        own = (self._partial, self._partial_lse, self._arrivals)
        return tuple(each.data_ptr() for each in own)

    def _tiles(self, query_len: int) -> tuple[int, int]:
        """(query rows of a program, programs) of a kv head's query heads and tokens."""
        wanted = self.heads // self.kv_heads * query_len
        packed = min(_ROWS_MAX, max(_ROWS_MIN, power_of_two(wanted)))
        return packed, ceil_div(wanted, packed)

    def config(self, rows: int) -> DecodeConfig:
        """What a bucket of so many rows is computed with."""
        return self._configs[rows - 1]

    def run(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        query_len: int = 1,
        window: int = 0,
        first_tokens: torch.Tensor | None = None,
    ) -> None:
        """Attention of n rows of query_len query tokens each, on the current stream.

        q: [>= tokens, width], rows begin with the query heads; qkv serves. pool: [pages, layers, 2,
        page_tokens, kv_heads, head_dim], the step's own K and V stored. page_table: int32[n, W],
        rows any stride apart; entries that no query token sees hold anything. lengths: int32[n],
        tokens in the row's pages *with* the step's own, so that query token i is at position
        length - query_len + i; 0 for padding, whose result is 0. out: [>= tokens, heads *
        head_dim] of q's type. window: positions a token sees, itself included; 0 for all.
        first_tokens: int32[n], the row in q and out of each row's first query token, where padding
        has none and no result; without them row i's is i * query_len. All but `layer`, `window` and
        `query_len` lie on the device, and their contents are read there alone. Shapes are `check`ed
        where buffers are made.
        """
        rows = lengths.numel()
        config = self._configs[rows - 1]
        packed, tiles = self._tiles(query_len)
        launch(
            _attend_split,
            (self.kv_heads * tiles, config.splits, rows),
            q,
            pool,
            page_table,
            lengths,
            lengths if first_tokens is None else first_tokens,
            self._partial,
            self._partial_lse,
            self._arrivals,
            out,
            layer,
            page_table.shape[1],
            page_table.stride(0),
            window,
            config.splits,
            config.parts,
            config.blocks_min,
            config.blocks_max,
            self._scale * LOG2_E,
            SPLIT=config.splits > 1,
            SCATTERED=first_tokens is not None,
            Q_LEN=query_len,
            KV_HEADS=self.kv_heads,
            GROUP=self.heads // self.kv_heads,
            HEAD_DIM=self.head_dim,
            HEAD_PAD=padded_head(self.head_dim),
            PAGE_TOKENS=self.page_tokens,
            PAGE_STRIDE=pool.stride(0),
            Q_STRIDE=q.stride(0),
            OUT_STRIDE=out.stride(0),
            ROWS=packed,
            BLOCK=config.block,
            WIDE=computes_wide(q, pool),
            num_warps=config.warps,
            num_stages=config.stages,
            **launch_options(out.device),
        )
