"""Staging: the static buffers that a step of few rows is computed from, padded to its bucket.

A captured graph reads where it was told to when it was captured, and always its whole bucket. So
buffers are made once, every step writes its rows in front and *everything* behind them is made
padding again: the trash row, whose page tables hold the trash page alone and whose query length is
the captured one. Nothing of a row that was here before is left when a batch shrinks. Steps that run
eagerly at the same shape are built by the same function, so that both compute the same bits.

The home of: padding touches no live page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.wire.plan import TRASH_PAGE, TRASH_ROW, StepPlan
from holdfast.wire.rows import RowTable


@dataclass(frozen=True, slots=True)
class Staged:
    """The first B rows of the static buffers, with q query tokens each: views, never copies.

    rows, lengths: int32[B], row of the table and its tokens before the step. samples: uint8[B].
    tokens, positions: int32[B * q] of the query tokens, row after row; the token of a draft is 0
    until the device writes it. page_table: int32[groups, B, W]; the KV of a query token goes to the
    page of its position's column.
    """

    query_len: int
    rows: np.ndarray
    lengths: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    page_table: np.ndarray


class Staging:
    """Buffers for all buckets of one query length; the largest has limits.rows_max rows.

    A smaller bucket is the front part of the same memory, so that one set of addresses serves all.
    """

    def __init__(self, limits: Limits, query_len: int) -> None:
        rows, tokens = limits.rows_max, limits.rows_max * query_len
        columns = limits.table_columns
        self.limits = limits
        self.query_len = query_len
        self._within = np.arange(query_len, dtype=np.int32)
        self._all = Staged(
            query_len=query_len,
            rows=np.full(rows, TRASH_ROW, np.int32),
            lengths=np.zeros(rows, np.int32),
            samples=np.zeros(rows, np.uint8),
            tokens=np.zeros(tokens, np.int32),
            positions=np.tile(self._within, rows),
            page_table=np.full((limits.groups, rows, columns), TRASH_PAGE, np.int32),
        )
        # What the last step may have left: its rows, and the columns of its page tables.
        self._filled = 0
        self._width = 0

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer: a part of wire.envelope.Footing."""
        every = self._all
        buffers = (every.rows, every.lengths, every.samples, every.tokens, every.positions)
        return tuple(buffer.ctypes.data for buffer in (*buffers, every.page_table))

    def view(self, bucket: int) -> Staged:
        """The buffers as a graph of this bucket sees them."""
        every, tokens = self._all, bucket * self.query_len
        return Staged(
            query_len=self.query_len,
            rows=every.rows[:bucket],
            lengths=every.lengths[:bucket],
            samples=every.samples[:bucket],
            tokens=every.tokens[:tokens],
            positions=every.positions[:tokens],
            page_table=every.page_table[:, :bucket],
        )

    def fill(self, plan: StepPlan, table: RowTable, bucket: int, drafts: int = 0) -> Staged:
        """Stage a step whose rows all have `query_len` query tokens, the last `drafts` of each not
        known yet; `table` has had the plan's deltas. Returns the view of `bucket` rows.

        Raises InvariantError when the plan does not fit: who calls has been admitted.
        """
        rows, query_len = plan.rows, self.query_len
        n, every = rows.size, self._all
        require(0 < n <= bucket <= self.limits.rows_max, f"{n} rows for a bucket of {bucket}")
        require(
            np.count_nonzero(plan.query_lens == query_len) == n,
            f"step {plan.step}: query lengths are not all {query_len}",
        )
        lengths = table.length[rows]
        every.rows[:n] = rows
        every.lengths[:n] = lengths
        every.samples[:n] = plan.samples
        positions = lengths[:, None] + self._within
        known = query_len - drafts
        every.positions[: n * query_len] = positions.reshape(-1)
        tokens = every.tokens[: n * query_len].reshape(n, query_len)
        tokens[:, :known] = table.tokens[rows[:, None], positions[:, :known]]
        tokens[:, known:] = 0
        self._fill_pages(table, rows)
        self._pad(n)
        return self.view(bucket)

    def _fill_pages(self, table: RowTable, rows: np.ndarray) -> None:
        n, pages = rows.size, self._all.page_table
        width = int(table.pages_len[:, rows].max())
        pages[:, :n, :width] = table.page_table[:, rows, :width]
        pages[:, :n, width : self._width] = TRASH_PAGE
        self._width = width

    def _pad(self, n: int) -> None:
        """Make padding of all rows from n on that a step before may have filled."""
        stale = slice(n, self._filled)
        self._filled = n
        if stale.start >= stale.stop:
            return
        every, query_len = self._all, self.query_len
        tokens = slice(stale.start * query_len, stale.stop * query_len)
        every.rows[stale] = TRASH_ROW
        every.lengths[stale] = 0
        every.samples[stale] = 0
        every.tokens[tokens] = 0
        every.positions[tokens] = np.tile(self._within, stale.stop - stale.start)
        every.page_table[:, stale] = TRASH_PAGE
