"""Paged attention: the layout of one step, and the torch reference of append and attention.

Owns AttentionBatch (which pages each query token of a step reads and writes; any backend starts
from it) and the reference that runs on plain torch. Called by model.decoder; device builds the
batch. Knows no model, no request and no plan of the brain.

How the reference works. The query tokens of a row are cut into *tiles* of 1, 8 or 32 tokens, the
positions a tile sees into *blocks* of whole pages, about 64 positions. One (tile, block) is a
*pair*; pairs of one tile width are computed in *groups* of small products of fixed shape:

    pool pages --index_select--> K, V [pair, block, kv_head, :]    each read once, packed in scratch
    scores[kv_head, pair, R, block] = q[kv_head, pair, R, :] K^T   R = tile tokens x query heads
    p = exp(scores - the pair's own maximum)
    partial = p V;  weight = sum of p

and joined per tile: each pair's partial and weight are scaled by exp(its maximum - the tile's),
summed over the tile's pairs in rising order, and divided.

Invariants
- Equality. What a token gets depends on its own q and on the K and V it sees, never on the batch,
  the chunking or the tile it lies in: every product has a fixed inner length (head_dim, block) and
  at least 4 rows (MKL takes other kernels below 4 rows; from 4 rows on its results were bit-equal
  over rows 4..256, pairs 1..40, any place of a row, blocks 64..128, every multiple of 4 as head_dim
  to 256, and 1, 2 and 4 threads), maxima are exact, sums over pairs run in one order, and a pair
  that a token sees nothing of adds an exact zero. torch.exp is used on packed tensors only, where
  it goes through MKL's vector library and does not depend on the place in the tensor.
- Only live positions are read. An index that would point past what a tile sees points to the row's
  own position 0 instead, and its score is replaced (not multiplied away), so NaN in unused pages,
  in page 0 or behind the last token of a page cannot enter: 0 * NaN would be NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.errors import require
from holdfast.ops.attention_tiles import TILE_TOKENS, Pairs, Tiles
from holdfast.ops.contracts import require_launchable

# Positions of a block: the smallest number of whole pages that has at least as many.
BLOCK_TOKENS = 64
# Fewer rows than this take MKL's other kernels, whose results differ in the last bit.
ROWS_ALIGN = 4
# Bytes of K and V gathered at once, as float32. On a CPU so few that the products read from cache
# what the gather wrote; on a GPU so many that launches do not rule: 32 rows of 4,096 tokens of an
# 8B model are 256 groups of about 30 launches a layer in the one, 8 in the other.
GROUP_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
# Elements of a part's partial results (32 MiB, 128 MiB of float32), so that scratch does not grow
# with the prompt but in a part of one tile.
PART_ELEMENTS = {"cpu": 8 << 20, "cuda": 32 << 20}
# Stands in for the maximum of a pair that a token sees nothing of: exp(-inf - it) is 0, not NaN.
NOTHING_SEEN = -1e30


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which pages each query token of one step reads and writes; the same for every layer.

    query_lens, starts: int32[n], host. Row i's query tokens sit at positions starts[i] ..
    starts[i] + query_lens[i] - 1; rows lie one after another, t tokens in total.
    page_table: int32[n, columns], host; entries past what a row uses hold anything.
    slots: int64[t], device: page * page_tokens + offset, where each query token's K and V go.
    """

    query_lens: np.ndarray
    starts: np.ndarray
    page_table: np.ndarray
    page_tokens: int
    slots: torch.Tensor

    @property
    def tokens(self) -> int:
        """Query tokens of the step, t."""
        return self.slots.numel()

    @staticmethod
    def build(
        query_lens: np.ndarray,
        starts: np.ndarray,
        page_table: np.ndarray,
        page_tokens: int,
        device: torch.device | str,
    ) -> AttentionBatch:
        """Lay out one step; waits for the device. Arguments and errors as `slots_of` has them."""
        slots = AttentionBatch.slots_of(query_lens, starts, page_table, page_tokens)
        on_device = torch.from_numpy(slots).to(device)
        return AttentionBatch(query_lens, starts, page_table, page_tokens, on_device)

    @staticmethod
    def slots_of(
        query_lens: np.ndarray, starts: np.ndarray, page_table: np.ndarray, page_tokens: int
    ) -> np.ndarray:
        """int64[t], host: what `slots` of such a step holds.

        query_lens: int32[n], each >= 1; starts: int32[n], tokens whose KV is in the pages already;
        page_table: int32[n, columns] with columns * page_tokens >= starts + query_lens.
        Raises InvariantError when the table is too narrow or a used entry is negative.
        """
        require(
            query_lens.size > 0 and query_lens.size == starts.size == page_table.shape[0],
            f"{query_lens.size} query lengths, {starts.size} starts, {page_table.shape[0]} tables",
        )
        lengths = starts.astype(np.int64) + query_lens
        require(
            int(query_lens.min()) >= 1
            and int(starts.min()) >= 0
            and int(lengths.max()) <= page_table.shape[1] * page_tokens,
            f"query lengths from {query_lens.min()}, starts from {starts.min()}, lengths to "
            f"{lengths.max()} in {page_table.shape[1]} pages of {page_tokens}",
        )
        lens = query_lens.astype(np.int64)
        row = np.repeat(np.arange(lens.size), lens)
        within = np.arange(row.size) - np.repeat(np.cumsum(lens) - lens, lens)
        position = starts.astype(np.int64)[row] + within
        page = page_table[row, position // page_tokens].astype(np.int64)
        require(int(page.min()) >= 0, f"a query token has page {page.min()}")
        return page * page_tokens + position % page_tokens


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """One step whose layout lies on the device, in buffers that a captured graph reads again.

    page_table: int32[n, W]; lengths: int32[n], tokens in the rows' pages with the step's own, 0 for
    padding; slots: int64[n * query_len], as AttentionBatch has them, -1 for padding, whose K and V
    go nowhere. For backends that ask the host nothing of a step.
    """

    page_table: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    page_tokens: int
    query_len: int = 1

    @property
    def tokens(self) -> int:
        """Query tokens of the step, padding included."""
        return self.slots.numel()


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """One step of any mix of rows whose layout lies on the device, in buffers that a captured graph
    reads again: as StaticBatch is, of rows that are not alike.

    page_table: int32[r, W], a table for each row that `index` names; slots: int64[N], -1 for
    padding. index: the arrays of the backend's own grids (ops.mixed_arrays).
    """

    page_table: torch.Tensor
    slots: torch.Tensor
    page_tokens: int
    index: Any

    @property
    def tokens(self) -> int:
        """Query tokens of the step, padding included."""
        return self.slots.numel()


# Views that a Scratch keeps: of a few steps' shapes.
_VIEWS_MAX = 64


class Scratch:
    """Buffers that grow to the largest step and are then reused: fresh memory costs page faults.

    A buffer is valid until the next `take` of its name. One owner, one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        # Of the shapes asked for last: a layer asks for the same ones as the layer before.
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer; one that grows has moved."""
        return tuple(buffer.data_ptr() for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised packed tensor of `shape`."""
        view = self._views.get((name, shape, dtype))
        if view is not None:
            return view
        elements = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < elements:
            buffer = torch.empty(elements, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
            self._views.clear()
        elif len(self._views) >= _VIEWS_MAX:
            self._views.clear()
        view = buffer[:elements].view(shape)
        self._views[name, shape, dtype] = view
        return view


@dataclass(frozen=True, slots=True)
class _Group:
    """g pairs of a part and the scratch they run in; groups run one after another in the same.

    q_rows: int64[kv_heads * g * R]; kv_rows: int64[g * B * 2]; what they gather goes to q
    [kv_heads * g * R, head_dim] and kv [g * B * 2, kv_heads * head_dim].
    scores: [kv_heads, g, R, B]. key_products: (scores, q, K^T) and value_products: (scores, V,
    partial), of each kv head. hidden: bool[e, 1 or R, B] for the last e pairs, None without any.
    """

    q_rows: torch.Tensor
    kv_rows: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    q_wide: torch.Tensor
    kv_wide: torch.Tensor
    scores: torch.Tensor
    key_products: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    value_products: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    maximum: torch.Tensor
    weight: torch.Tensor
    edge_scores: torch.Tensor | None
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Part:
    """Pairs of tiles of one width whose partial results fit scratch. T tiles, n pairs, R rows.

    maximum, weight: [kv_heads, n, R]; partial: [kv_heads, n, R, head_dim]; tile_maximum:
    [kv_heads, T, R]. pair_tile: int64[n]; tile_index: the same, expanded for scatter.
    bag, bag_starts: pairs of each tile in rising order. out: [kv_heads * T * R, head_dim].
    """

    groups: tuple[_Group, ...]
    maximum: torch.Tensor
    weight: torch.Tensor
    partial: torch.Tensor
    tile_maximum: torch.Tensor
    pair_tile: torch.Tensor
    tile_index: torch.Tensor
    bag: torch.Tensor
    bag_starts: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """An AttentionBatch worked out for one pool, one arrangement of heads and one scratch.

    Made once a step, used by every layer, since all layers compute the same shapes.
    append_rows: int64[t], token rows of a layer's K where the step's K goes.
    gather: int64[t * heads], rows of `parts_out` [.., head_dim], token by token.
    """

    heads: int
    kv_heads: int
    head_dim: int
    append_rows: torch.Tensor
    parts: tuple[_Part, ...]
    parts_out: torch.Tensor
    gather: torch.Tensor

    @property
    def tokens(self) -> int:
        """Query tokens of the step, t."""
        return self.append_rows.numel()


def plan_attention(
    batch: AttentionBatch,
    pool: torch.Tensor,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    scratch: Scratch,
) -> AttentionPlan:
    """Work out the gathers of a step. pool: [pages, layers, 2, page_tokens, kv_heads, head_dim].

    heads: query heads; rows of qkv, of `dtype`, are [q of heads | k of kv_heads | v of kv_heads].
    The plan is valid until the next one is made with the same scratch.
    """
    require_launchable("KV pool", pool)
    _, layers, _, page_tokens, pool_heads, head_dim = pool.shape
    require(
        page_tokens == batch.page_tokens and pool_heads == kv_heads,
        f"pool has pages of {page_tokens} tokens and {pool_heads} heads, the step wants "
        f"{batch.page_tokens} and {kv_heads}",
    )
    block = -(-BLOCK_TOKENS // page_tokens) * page_tokens
    tiles = Tiles.cut(batch.query_lens, batch.starts, block)
    group = heads // kv_heads
    where = np.empty((batch.tokens, heads), np.int64)
    chosen: list[tuple[Pairs, int, int]] = []
    out_rows = 0
    elements = PART_ELEMENTS[pool.device.type]
    for width in TILE_TOKENS:
        rows = -(-width * group // ROWS_ALIGN) * ROWS_ALIGN
        for some in tiles.of_width(width).split(elements // (kv_heads * rows * head_dim)):
            pairs = Pairs.of(some, block)
            pairs.note_outputs(where, rows, kv_heads, group, out_rows)
            chosen.append((pairs, rows, out_rows))
            out_rows += kv_heads * some.row.size * rows
    out = scratch.take("attention_out", (out_rows, head_dim), torch.float32)
    builder = _PartBuilder(batch, pool, heads, dtype, scratch)
    parts = [
        builder.part(pairs, rows, out[first : first + kv_heads * pairs.tiles.row.size * rows])
        for pairs, rows, first in chosen
    ]
    return AttentionPlan(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        append_rows=append_rows(batch, layers),
        parts=tuple(parts),
        parts_out=out,
        gather=torch.from_numpy(where.reshape(-1)).to(pool.device),
    )


def append_rows(batch: AttentionBatch, layers: int) -> torch.Tensor:
    """int64[t], device: token rows of a layer's K in a pool of so many layers, from `slots`."""
    page = torch.div(batch.slots, batch.page_tokens, rounding_mode="floor")
    return batch.slots + page * ((layers * 2 - 1) * batch.page_tokens)


def append_kv(plan: AttentionPlan, pool: torch.Tensor, layer: int, qkv: torch.Tensor) -> None:
    """Store the step's K and V of one layer. qkv: [>= t, (heads + 2 * kv_heads) * head_dim]."""
    width = plan.kv_heads * plan.head_dim
    tokens = plan.tokens
    at = plan.heads * plan.head_dim
    for which in (0, 1):
        values = qkv[:tokens, at + which * width : at + (which + 1) * width]
        _layer_rows(pool, layer, which).index_copy_(0, plan.append_rows, values)


def attend(
    plan: AttentionPlan, pool: torch.Tensor, layer: int, qkv: torch.Tensor, out: torch.Tensor
) -> None:
    """Attention of the step's tokens over their pages, the appended ones included.

    qkv: [>= t, (heads + 2 * kv_heads) * head_dim], packed; out: [t, heads * head_dim], packed.
    Computes in float32.
    """
    by_head = qkv.view(-1, plan.head_dim)
    rows = _layer_rows(pool, layer, 0)
    for part in plan.parts:
        for group in part.groups:
            _attend_group(group, by_head, rows, plan.head_dim**-0.5)
        _join(part)
    if out.dtype == torch.float32:
        torch.index_select(plan.parts_out, 0, plan.gather, out=out.view(-1, plan.head_dim))
    else:
        out.copy_(plan.parts_out.index_select(0, plan.gather).view(out.shape))


def _attend_group(group: _Group, by_head: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """Fill the group's slices of its part's maximum, weight and partial."""
    torch.index_select(rows, 0, group.kv_rows, out=group.kv)
    torch.index_select(by_head, 0, group.q_rows, out=group.q)
    if group.kv_wide is not group.kv:
        group.kv_wide.copy_(group.kv)
    if group.q_wide is not group.q:
        group.q_wide.copy_(group.q)
    for scores, q, keys in group.key_products:
        torch.baddbmm(scores, q, keys, beta=0, alpha=scale, out=scores)
    if group.hidden is not None and group.edge_scores is not None:
        group.edge_scores.masked_fill_(group.hidden, -math.inf)
    torch.amax(group.scores, -1, out=group.maximum)
    if group.hidden is not None:
        group.maximum.clamp_(min=NOTHING_SEEN)
    group.scores.sub_(group.maximum.unsqueeze(-1)).exp_()
    torch.sum(group.scores, -1, out=group.weight)
    for scores, values, partial in group.value_products:
        torch.bmm(scores, values, out=partial)


def _join(part: _Part) -> None:
    """Join the pairs of each tile into the part's slice of the plan's output.

    embedding_bag adds the members of a bag one after another, whatever the thread count.
    """
    part.tile_maximum.fill_(-math.inf).scatter_reduce_(1, part.tile_index, part.maximum, "amax")
    part.maximum.sub_(part.tile_maximum.index_select(1, part.pair_tile)).exp_()
    part.weight.mul_(part.maximum)
    part.partial.mul_(part.maximum.unsqueeze(-1))
    bag = torch.nn.functional.embedding_bag
    pairs = part.bag.numel()
    total = bag(part.bag, part.partial.view(pairs, -1), part.bag_starts, mode="sum")
    weight = bag(part.bag, part.weight.view(pairs, -1), part.bag_starts, mode="sum")
    torch.div(total.view(part.out.shape), weight.view(-1, 1), out=part.out)


def _layer_rows(pool: torch.Tensor, layer: int, which: int) -> torch.Tensor:
    """Token rows [.., kv_heads * head_dim] from the layer's first K (0) or V (1) row of page 0 on.

    Row page * layers * 2 * page_tokens + offset is K (or V) of the token at `offset` of `page`; V
    lies page_tokens rows behind K.
    """
    _, _, _, page_tokens, kv_heads, head_dim = pool.shape
    return pool.view(-1, kv_heads * head_dim)[(2 * layer + which) * page_tokens :]


class _PartBuilder:
    """Makes the parts of one plan: index arrays to the device, views into scratch."""

    def __init__(
        self,
        batch: AttentionBatch,
        pool: torch.Tensor,
        heads: int,
        dtype: torch.dtype,
        scratch: Scratch,
    ) -> None:
        self._batch = batch
        self._pool = pool
        self._heads = heads
        self._dtype = dtype
        self._scratch = scratch
        self._pages, layers, _, page_tokens, self._kv_heads, self._head_dim = pool.shape
        self._page_stride = layers * 2 * page_tokens

    def part(self, pairs: Pairs, rows: int, out: torch.Tensor) -> _Part:
        count, tiles, kv_heads = pairs.count, pairs.tiles.row.size, self._kv_heads
        batch = self._batch
        kv_rows = pairs.kv_rows(batch.page_table, batch.page_tokens, self._page_stride, self._pages)
        q_rows = pairs.query_rows(rows, self._heads, kv_heads)
        hidden = pairs.hidden(rows, self._heads // kv_heads)
        shape = (kv_heads, count, rows)
        maximum = self._float("maximum", shape)
        weight = self._float("weight", shape)
        partial = self._float("partial", (*shape, self._head_dim))
        pair_bytes = 2 * pairs.block * kv_heads * self._head_dim * 4
        step = max(1, GROUP_BYTES[self._pool.device.type] // pair_bytes)
        groups = []
        for first in range(0, count, step):
            some = slice(first, min(count, first + step))
            groups.append(
                self._group(
                    q_rows[:, some],
                    kv_rows[some],
                    hidden[max(0, first - pairs.edge) : max(0, some.stop - pairs.edge)],
                    maximum[:, some],
                    weight[:, some],
                    partial[:, some],
                )
            )
        bag, bag_starts = pairs.bags(kv_heads)
        tile = self._on_device(pairs.tile)
        return _Part(
            groups=tuple(groups),
            maximum=maximum,
            weight=weight,
            partial=partial,
            tile_maximum=self._float("tile_maximum", (kv_heads, tiles, rows)),
            pair_tile=tile,
            tile_index=tile[None, :, None].expand(shape),
            bag=self._on_device(bag),
            bag_starts=self._on_device(bag_starts),
            out=out,
        )

    def _group(
        self,
        q_rows: np.ndarray,
        kv_rows: np.ndarray,
        hidden: np.ndarray,
        maximum: torch.Tensor,
        weight: torch.Tensor,
        partial: torch.Tensor,
    ) -> _Group:
        kv_heads, count, rows = q_rows.shape
        block, head_dim = kv_rows.shape[1], self._head_dim
        q, q_wide = self._gathered("q", (q_rows.size, head_dim), self._dtype)
        kv, kv_wide = self._gathered("kv", (kv_rows.size, kv_heads * head_dim), self._pool.dtype)
        scores = self._float("scores", (kv_heads, count, rows, block))
        by_pair = kv_wide.view(count, block, 2, kv_heads, head_dim)
        by_head = q_wide.view(kv_heads, count, rows, head_dim)
        edges = hidden.shape[0]
        return _Group(
            q_rows=self._on_device(q_rows.reshape(-1)),
            kv_rows=self._on_device(kv_rows.reshape(-1)),
            q=q,
            kv=kv,
            q_wide=q_wide,
            kv_wide=kv_wide,
            scores=scores,
            key_products=tuple(
                (scores[head], by_head[head], by_pair[:, :, 0, head].mT) for head in range(kv_heads)
            ),
            value_products=tuple(
                (scores[head], by_pair[:, :, 1, head], partial[head]) for head in range(kv_heads)
            ),
            maximum=maximum,
            weight=weight,
            edge_scores=scores[:, count - edges :] if edges else None,
            hidden=self._on_device(hidden) if edges else None,
        )

    def _gathered(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A buffer to gather to, and its float32 copy, which is itself where dtype is float32."""
        buffer = self._scratch.take(name, shape, dtype)
        return buffer, buffer if dtype == torch.float32 else self._float(name, shape)

    def _float(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._scratch.take("attention_" + name, shape, torch.float32)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._pool.device)
