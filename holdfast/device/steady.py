"""SteadyRows: the rows of a decode step that are those of the step before, each a token longer.

Nearly every decode step has the rows of the one before it and brings some pages. Of such a step
almost all that `checks.check_rows` looks at was looked at a step ago and still holds; what changes
is which page a row writes to, once in `page_tokens` steps, and how far the context is. So the work
of a step on the host follows what is new in it, not how many rows it has.

Invariant: `follow` says yes only of a plan in which check_rows would find nothing. Where it does
not know it says no, and then all is looked at (tests/device/test_steady.py holds the two against
each other). Called by device.device_rows of every plan, from one thread; knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.config import Limits
from holdfast.wire.envelope import StepShape
from holdfast.wire.plan import StepPlan, handle_pages
from holdfast.wire.rows import RowTable


@dataclass(slots=True)
class _Run:
    """A run of steps of the same n rows.

    index: int64[n], the rows. first: the first one's row and its length before the run's first
    step; least, most: lengths of the shortest and the longest row then. order, bounds: rows by the
    steps until they come to a new page: order[bounds[k] : bounds[k + 1]] do in step k of
    page_tokens. targets: int32[n], the page that each row writes to. ahead: steps since the first.
    """

    index: np.ndarray
    first: tuple[int, int]
    least: int
    most: int
    order: np.ndarray
    bounds: list[int]
    targets: np.ndarray
    ahead: int = 0


class SteadyRows:
    """One table's companion."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Where pages are given back behind a window, columns do not stay held.
        self._able = limits.windows == (0,)
        self._run: _Run | None = None
        # Of the last decode step, by their bytes: comparing those is a call, not four.
        self._rows, self._ones, self._samples = b"", b"", b""
        # uint8[pages]: 1 where a row of the run writes to.
        self._targeted = np.zeros(limits.pages if self._able else 0, np.uint8)

    @property
    def steady(self) -> bool:
        """Whether the last plan is one of a run: all of its rows decode, and they are known."""
        return self._run is not None

    @property
    def index(self) -> np.ndarray:
        """int64[n]: the rows of the last plan, which is one of a run."""
        assert self._run is not None
        return self._run.index

    @property
    def shape(self) -> StepShape:
        """Of the last plan, which is one of a run."""
        run = self._run
        assert run is not None
        seen = 1 + run.ahead
        return StepShape(run.index.size, 1, False, False, run.least + seen, run.most + seen)

    def follow(self, plan: StepPlan, table: RowTable) -> bool:
        """Whether the plan, whose deltas were applied to the table, is the last one's next step and
        fit. If not, `learn` is to be told once it was checked."""
        if self._run is None:
            return False
        if self._repeats(plan) and self._goes_on(self._run, plan, table):
            return True
        self._forget()
        return False

    def learn(self, plan: StepPlan, table: RowTable) -> None:
        """A plan that `follow` did not know was checked and is fit."""
        if not self._able:
            return
        n, ones = plan.rows.size, np.count_nonzero(plan.query_lens == 1)
        if n == 0 or not n == ones == np.count_nonzero(plan.samples):
            return
        rows = plan.rows.tobytes()
        if rows != self._rows:
            # Rows that come and go with every step are not worth what follows.
            self._rows = rows
            return
        self._ones, self._samples = plan.query_lens.tobytes(), plan.samples.tobytes()
        size, index = self._limits.page_tokens, plan.rows.astype(np.int64)
        lengths = table.length[index]
        until = -lengths % size
        targets = table.page_table[0, index, lengths // size]
        self._targeted[targets] = 1
        self._run = _Run(
            index=index,
            first=(int(index[0]), int(lengths[0])),
            least=int(np.minimum.reduce(lengths)),
            most=int(np.maximum.reduce(lengths)),
            order=np.argsort(until, kind="stable"),
            bounds=[0, *np.cumsum(np.bincount(until, minlength=size)).tolist()],
            targets=targets,
        )

    def _forget(self) -> None:
        if self._run is not None:
            self._targeted[self._run.targets] = 0
        self._run, self._rows = None, b""

    def _repeats(self, plan: StepPlan) -> bool:
        """Whether the plan has the same rows, and only pages and seals are new."""
        return (
            plan.clears.size == plan.admits.size == plan.drafts.size == plan.zeros.size == 0
            and plan.rows.tobytes() == self._rows
            and plan.query_lens.tobytes() == self._ones
            and plan.samples.tobytes() == self._samples
        )

    def _goes_on(self, run: _Run, plan: StepPlan, table: RowTable) -> bool:
        """Whether every row has moved by one token and has a page of its own for the next."""
        run.ahead += 1
        row, length = run.first
        if table.length[row] != length + run.ahead:
            return False
        if run.most + run.ahead >= self._limits.context_tokens:
            return False
        if plan.page_writes.size and not self._extends(plan, table):
            return False
        size = self._limits.page_tokens
        turn = run.ahead % size
        low, high = run.bounds[turn : turn + 2]
        if low < high and not self._turns(run, run.order[low:high], table):
            return False
        return not plan.seals.size or not self._targeted[handle_pages(plan.seals)].any()

    def _extends(self, plan: StepPlan, table: RowTable) -> bool:
        """Whether no page write changes a column that its row has come to."""
        writes = plan.page_writes
        begins = writes["column"] * np.int32(self._limits.page_tokens)
        return np.count_nonzero(begins < table.length[writes["row"]]) == 0

    def _turns(self, run: _Run, which: np.ndarray, table: RowTable) -> bool:
        """Whether the rows that come to a new page have one each that nobody else writes to."""
        rows = run.index[which]
        pages = table.page_table[0, rows, table.length[rows] // self._limits.page_tokens]
        self._targeted[run.targets[which]] = 0
        run.targets[which] = pages
        if self._targeted[pages].any() or np.count_nonzero(pages) != pages.size:
            return False
        self._targeted[pages] = 1
        # As many marks as pages, or two of them are the same.
        return pages.size == 1 or np.unique(pages).size == pages.size
