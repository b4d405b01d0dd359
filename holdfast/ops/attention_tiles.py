"""How the torch reference of attention cuts a step: tiles, blocks, pairs, and their index arrays.

Owns the arithmetic of ops.attention's layout, in numpy alone: pure functions of the batch. Called
by ops.attention only. Knows no tensor, no scratch and no kernel. See ops.attention for the words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from holdfast.errors import require

# Query tokens a tile may have. 1 is decode; 32 tokens x 3 query heads = 96 rows is where the
# product is no longer bound by reading K; 8 keeps the tails of chunks from costing a whole tile.
TILE_TOKENS = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of a step, struct of arrays, int64[T] each.

    row: batch row; token: first query token; len: tokens; width: tokens it is padded to; start:
    position of the first token; blocks: blocks of positions that its last token sees.
    """

    row: np.ndarray
    token: np.ndarray
    len: np.ndarray
    width: np.ndarray
    start: np.ndarray
    blocks: np.ndarray

    @staticmethod
    def cut(query_lens: np.ndarray, starts: np.ndarray, block: int) -> Tiles:
        """Tiles of rows with query_lens and starts int32[n]; blocks have `block` positions."""
        lens = query_lens.astype(np.int64)
        widest = TILE_TOKENS[-1]
        count = -(-lens // widest)
        row = np.repeat(np.arange(lens.size), count)
        within = (np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)) * widest
        length = np.minimum(widest, lens[row] - within)
        width = np.array(TILE_TOKENS)[np.searchsorted(TILE_TOKENS, length)]
        start = starts.astype(np.int64)[row] + within
        token = (np.cumsum(lens) - lens)[row] + within
        return Tiles(row, token, length, width, start, -(-(start + length) // block))

    def of_width(self, width: int) -> Tiles:
        return self._take(self.width == width)

    def split(self, pairs_max: int) -> list[Tiles]:
        """Runs of tiles of at most `pairs_max` pairs, or one tile where that alone has more."""
        found = []
        first = 0
        ends = np.cumsum(self.blocks)
        while first < self.row.size:
            before = int(ends[first - 1]) if first else 0
            end = max(first + 1, int(np.searchsorted(ends, before + pairs_max, side="right")))
            found.append(self._take(slice(first, end)))
            first = end
        return found

    def _take(self, which: np.ndarray | slice) -> Tiles:
        return Tiles(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


@dataclass(frozen=True, slots=True)
class Pairs:
    """(tile, block) pairs of `tiles`: int64[n] each. Pairs without hidden positions come first.

    tile: index into tiles; rank: which block of the tile's row; place: int64[n], where the pair
    that is next in (tile, rank) order stands; edge: the first pair with hidden positions.
    """

    tiles: Tiles
    block: int
    tile: np.ndarray
    rank: np.ndarray
    place: np.ndarray
    edge: int

    @staticmethod
    def of(tiles: Tiles, block: int) -> Pairs:
        count = int(tiles.blocks.sum())
        tile = np.repeat(np.arange(tiles.row.size), tiles.blocks)
        rank = np.arange(count) - np.repeat(np.cumsum(tiles.blocks) - tiles.blocks, tiles.blocks)
        # A pair is whole when even the tile's first token sees the whole block.
        whole = (rank + 1) * block <= tiles.start[tile] + 1
        order = np.argsort(~whole, kind="stable")
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        return Pairs(tiles, block, tile[order], rank[order], place, int(whole.sum()))

    @property
    def count(self) -> int:
        return self.tile.size

    def seen_to(self, rows: int, group: int) -> np.ndarray:
        """int64[T, rows]: the last position each row of a tile sees."""
        return self.tiles.start[:, None] + self._within(rows, group)

    def hidden(self, rows: int, group: int) -> np.ndarray:
        """bool[n - edge, 1 or rows, block]: positions a row must not see, of the pairs from edge.

        The rows of a tile of one token see the same, so one row of the mask serves them all.
        """
        position = self.rank[self.edge :, None] * self.block + np.arange(self.block)
        seen = self.seen_to(rows, group)[self.tile[self.edge :]]
        if int(self.tiles.width[0]) == 1:
            seen = seen[:, :1]
        return position[:, None, :] > seen[:, :, None]

    def query_rows(self, rows: int, heads: int, kv_heads: int) -> np.ndarray:
        """int64[kv_heads, n, rows]: rows of the head-wise view of qkv that each pair multiplies."""
        group = heads // kv_heads
        token = self.tiles.token[:, None] + self._within(rows, group)
        head = np.arange(rows) % group
        found = (token * (heads + 2 * kv_heads) + head)[self.tile]
        return found[None] + (np.arange(kv_heads) * group)[:, None, None]

    def kv_rows(
        self, page_table: np.ndarray, page_tokens: int, page_stride: int, pages: int
    ) -> np.ndarray:
        """int64[n, block, 2] token rows of K and of V of each pair's positions.

        Positions beyond the tile's last token become the row's position 0. Raises InvariantError
        when a used entry of the table is not a page of the pool.
        """
        held = self.block // page_tokens
        row = self.tiles.row[self.tile]
        end = self.tiles.start[self.tile] + self.tiles.len[self.tile]
        columns = self.rank[:, None] * held + np.arange(held)
        columns[columns * page_tokens >= end[:, None]] = 0
        page = page_table[row[:, None], columns].astype(np.int64)
        require(
            int(page.min()) >= 0 and int(page.max()) < pages,
            f"a step reads pages {page.min()} to {page.max()} of a pool of {pages}",
        )
        page *= page_stride
        keys = (page[:, :, None] + np.arange(page_tokens)).reshape(self.count, self.block)
        edge = slice(self.edge, None)
        first = page_table[row[edge], 0].astype(np.int64) * page_stride
        position = self.rank[edge, None] * self.block + np.arange(self.block)
        keys[edge] = np.where(position >= end[edge, None], first[:, None], keys[edge])
        return keys[:, :, None] + np.array([0, page_tokens])

    def bags(self, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """(members int64[kv_heads * n], first member int64[kv_heads * T]): each tile's pairs, in
        rising order of their blocks, as rows of [kv_heads * n]."""
        base = np.arange(kv_heads)[:, None] * self.count
        starts = np.cumsum(self.tiles.blocks) - self.tiles.blocks
        return (self.place + base).reshape(-1), (starts + base).reshape(-1)

    def note_outputs(
        self, where: np.ndarray, rows: int, kv_heads: int, group: int, base: int
    ) -> None:
        """Set where[token, head] to base + the row of [kv_heads, T, rows] that is its result."""
        tiles = self.tiles
        count = tiles.row.size
        tile = np.repeat(np.arange(count), tiles.len)
        within = np.arange(tile.size) - np.repeat(np.cumsum(tiles.len) - tiles.len, tiles.len)
        head = np.arange(kv_heads * group)
        start = base + (head // group) * count * rows + head % group
        where[tiles.token[tile] + within] = start[None] + (tile * rows + within * group)[:, None]

    def _within(self, rows: int, group: int) -> np.ndarray:
        """int64[T, rows]: the tile's token of each row. Token after token, the query heads of one
        kv head within; padding repeats the last token, and nobody reads its results."""
        return np.minimum(np.arange(rows)[None] // group, self.tiles.len[:, None] - 1)
