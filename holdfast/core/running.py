"""The requests that have a row, as arrays: what the scheduler plans with and commit settles.

Two views of progress per row. *Planned*: `planned` tokens have their KV written once every launched
plan is over, and `total` tokens will be known by then. *Committed*: `emitted` tokens have reached
the journal; the mirror row table has the rest. Lives tell one stay of a request in a row from the
next: a result that speaks of an older life is void.

Owned by core.brain; written by core.scheduler (planned) and core.commit (committed) alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from holdfast.config import Limits
from holdfast.core.request import Request
from holdfast.errors import require


@dataclass(slots=True)
class Chain:
    """Where a row's next sealed page goes in the prefix trie.

    parent: handle or root that stands for the pages before; None once the chain is broken.
    pages: how many pages from the start are sealed. waits: followers go when `pages` reaches it.
    left_at: the step after whose result the row's leases drop, once the row is given up; else 0.
    borrowed: pages of others that stand in the trie for equal pages of this row. The row leases
    them although it reads its own, since a leased page must not hang below an unleased one.
    """

    parent: int | None
    pages: int
    waits: int
    request: Request
    left_at: int = 0
    borrowed: list[int] = field(default_factory=list)
    # Per column the page that stands in the trie, None once the chain is broken; kept only when
    # there are window groups, whose pages hang beside them.
    stood: list[int | None] = field(default_factory=list)


class RunningRows:
    """R = limits.rows_total rows, W = limits.table_columns. Row 0 (trash) is never used.

    life: int64[R], 0 = free. planned, total, limit, emitted, output_limit, cached, pages_len,
    sealed_to, seal_at (tokens at which the next page is full), capacity (tokens that the pages held
    have room for): int32[R]. order: int64[R], rises with admission. ids: uint64[R]. api: int32[R].
    handles: uint64[groups, R, W], the pages held: columns dropped .. pages_len of each group.
    dropped: int32[groups, R], the first columns, which no layer of a window group can see any more.
    """

    def __init__(self, limits: Limits) -> None:
        rows = limits.rows_total
        self.limits = limits
        self.life = np.zeros(rows, np.int64)
        self.order = np.zeros(rows, np.int64)
        self.ids = np.zeros(rows, np.uint64)
        for name in (
            "planned",
            "total",
            "limit",
            "emitted",
            "output_limit",
            "cached",
            "pages_len",
            "sealed_to",
            "seal_at",
            "priority",
            "api",
            "capacity",
        ):
            setattr(self, name, np.zeros(rows, np.int32))
        self.handles = np.zeros((limits.groups, rows, limits.table_columns), np.uint64)
        self.dropped = np.zeros((limits.groups, rows), np.int32)
        self.requests: list[Request | None] = [None] * rows
        self.chains: list[Chain | None] = [None] * rows
        self.active = 0
        self.stop_width = 0  # most stop ids of any row since the start
        self._free = list(range(rows - 1, 0, -1))
        self._lives = 0

    planned: np.ndarray
    total: np.ndarray
    limit: np.ndarray
    emitted: np.ndarray
    output_limit: np.ndarray
    cached: np.ndarray
    pages_len: np.ndarray
    sealed_to: np.ndarray
    seal_at: np.ndarray
    priority: np.ndarray
    api: np.ndarray
    capacity: np.ndarray

    @property
    def rows_free(self) -> int:
        return len(self._free)

    def enter(self, request: Request, hits: list[np.ndarray], chain: Chain) -> int:
        """Give `request` a row whose first pages are `hits` (Ledger.find); returns the row."""
        pages = hits[0].size
        row = self._free.pop()
        self._lives += 1
        request.admit(row)
        admission = request.admission
        self.life[row] = self._lives
        self.order[row] = self._lives
        self.ids[row] = request.id
        self.api[row] = admission.api
        self.priority[row] = admission.priority
        self.stop_width = max(self.stop_width, len(admission.sampling.stop_ids))
        self.planned[row] = pages * self.limits.page_tokens
        self.total[row] = request.tokens.size
        self.limit[row] = request.limit
        self.emitted[row] = request.emitted
        self.output_limit[row] = request.limit - request.prompt_len
        self.cached[row] = request.cached_tokens
        for group, handles in enumerate(hits):
            self.handles[group, row, pages - handles.size : pages] = handles
            self.dropped[group, row] = pages - handles.size
        self.pages_len[row] = self.sealed_to[row] = pages
        self.capacity[row] = pages * self.limits.page_tokens
        self.seal_at[row] = (pages + 1) * self.limits.page_tokens
        self.requests[row] = request
        self.chains[row] = chain
        self.active += 1
        return row

    def leave(self, row: int) -> list[np.ndarray]:
        """The row's request goes; returns the handles it leased in each group, for the ledger to
        release."""
        require(self.life[row] != 0, f"row {row} left twice")
        chain = self.chains[row]
        assert chain is not None
        held = [
            self.handles[group, row, self.dropped[group, row] : self.pages_len[row]].copy()
            for group in range(self.limits.groups)
        ]
        if chain.borrowed:
            held[0] = np.concatenate([held[0], np.array(chain.borrowed, np.uint64)])
        # planned == total: a free row is behind nothing, so no walk need ask whether it is free.
        self.life[row] = self.planned[row] = self.total[row] = 0
        self.pages_len[row] = self.capacity[row] = 0
        self.dropped[:, row] = 0
        self.requests[row] = None
        self.chains[row] = None
        self._free.append(row)
        self.active -= 1
        return held

    def rows(self) -> np.ndarray:
        """int64[k] rows in use, rising."""
        return np.flatnonzero(self.life)

    def append_pages(self, rows: np.ndarray, handles: np.ndarray) -> np.ndarray:
        """One more page set, uint64[groups, k], for each of these rows, equal ones side by side;
        returns their columns int32[k]."""
        columns = self.pages_len[rows]
        if self.limits.draft_depth:
            # A row may come several times: its pages lie one behind the other.
            first = np.maximum.accumulate(
                np.where(np.diff(rows, prepend=-1) != 0, np.arange(rows.size), 0)
            )
            columns = columns + (np.arange(rows.size) - first).astype(np.int32)
        self.handles[:, rows, columns] = handles
        self.pages_len[rows] = columns + 1
        self.capacity[rows] = (columns + 1) * self.limits.page_tokens
        return columns
