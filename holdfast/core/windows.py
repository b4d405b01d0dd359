"""WindowDrops: pages of window groups go as soon as no token to come can see them.

What is committed is the least that a row has reached, whatever became of its drafts; only that
moves a window. Steps in flight may still have the pages in their tables, so they retire like all
others, and the next plan takes them out of the device's tables.

Owned by core.scheduler; reads the rows and the mirror, releases leases. Costs nothing while all
groups are full attention.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.core.flight import spread
from holdfast.core.running import RunningRows
from holdfast.kv.ledger import Ledger
from holdfast.wire.plan import PAGE_WRITE, TRASH_PAGE
from holdfast.wire.rows import RowTable, first_column


class WindowDrops:
    def __init__(self, limits: Limits, ledger: Ledger) -> None:
        self.limits = limits
        self.ledger = ledger
        self._untold: list[tuple[np.ndarray, np.ndarray]] = []  # lives of the rows, PAGE_WRITEs

    def drop_unseen(self, run: RunningRows, mirror: RowTable, step: int) -> None:
        """Give up what no row can see any more; `step` is the last launched."""
        rows = run.rows()
        length = mirror.length[rows]
        for group in range(1, self.limits.groups):
            seen = first_column(length, self.limits.windows[group], self.limits.page_tokens)
            first = run.dropped[group, rows]
            late = seen > first
            # A row that has just been admitted is not in the mirror yet.
            late &= mirror.records["owner"][rows] == run.life[rows]
            if np.count_nonzero(late) == 0:
                continue
            row, column = spread(rows[late], first[late], seen[late])
            self.ledger.release(run.handles[group, row, column], step, group)
            run.dropped[group, rows[late]] = seen[late]
            writes = np.zeros(row.size, PAGE_WRITE)
            writes["group"], writes["row"], writes["column"] = group, row, column
            writes["page"] = TRASH_PAGE
            self._untold.append((run.life[row], writes))

    def take(self, run: RunningRows) -> list[np.ndarray]:
        """PAGE_WRITEs of the drops since the last plan. A row that was left meanwhile has none: it
        is cleared, and may belong to somebody else already."""
        untold, self._untold = self._untold, []
        return [writes[run.life[writes["row"]] == life] for life, writes in untold]

    def forget(self) -> None:
        """A new epoch: there is no table to take anything out of."""
        self._untold = []
