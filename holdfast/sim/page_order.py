"""PageOrder: tells wire.order what the brain makes a device do, in the brain's own order.

A plan is told when it is launched and a result when it is committed. A device's host thread knows
of an end before the brain does, so what is ordered here is ordered there; what is not ordered here
may race on some device. Steps run on the stream `compute`; every edge between a step and anything
beside it is the brain's: it waits for a result, or for an acknowledgement, before it uses a page
otherwise. Derives no fence. Owned by checkers.PageWatch, whose rows it reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from holdfast.config import Limits
from holdfast.wire.order import Finding, OrderChecker, Pages
from holdfast.wire.plan import (
    StepPlan,
    StepResult,
    handle_generations,
    handle_groups,
    handle_pages,
)
from holdfast.wire.rows import RowTable

COMPUTE = "compute"
HandleOf = Callable[[int, int, int], int]


class PageOrder:
    """One epoch: whatever came before it is fenced."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pools = [f"group {group}" for group in range(limits.groups)]
        pages = dict(zip(self.pools, limits.pages_by_group, strict=True))
        self.checker = OrderChecker(pages, [COMPUTE], trash=self.pools)
        self._generations: dict[tuple[int, int], int] = {}

    def launch(
        self, plan: StepPlan, rows: RowTable, settled: np.ndarray, handle_of: HandleOf
    ) -> list[Finding]:
        """`plan` is about to be sent. `rows` have taken its deltas and are as long as they can be
        before it; `settled` int[R] is how long they are at least. handle_of(group, row, column) is
        the handle by which the brain holds that page. What is found must not be launched."""
        reads: list[Pages] = []
        writes: list[Pages] = []
        for group, pool in enumerate(self.pools):
            seen, written, fresh = self._rows(plan, rows, settled, group, handle_of)
            self._begin(group, fresh)
            reads.append(Pages(pool, np.array(seen, np.int64)))
            writes.append(Pages(pool, np.array(written, np.int64)))
        for group in range(len(self.pools)):
            # A page that is zeroed for a row may not have been written by it yet.
            self._begin(group, plan.zeros[handle_groups(plan.zeros) == group].tolist())
        reads += self._named(plan.seals)
        writes += self._named(plan.zeros)
        findings = self.checker.launch(COMPUTE, reads, writes, f"step {plan.step}")
        self.checker.record(COMPUTE, plan.step)
        return findings

    def acknowledge(self, result: StepResult) -> None:
        """The brain has taken the result of this step."""
        self.checker.host_wait(event=result.step)
        self.checker.destroy(result.step)

    def _rows(
        self,
        plan: StepPlan,
        rows: RowTable,
        settled: np.ndarray,
        group: int,
        handle_of: HandleOf,
    ) -> tuple[list[int], list[int], list[int]]:
        """Pages that the step's rows may read, pages that they may write, handles of the latter."""
        size, window = self.limits.page_tokens, self.limits.windows[group]
        seen: list[int] = []
        written: list[int] = []
        handles: list[int] = []
        for row, count in zip(plan.rows.tolist(), plan.query_lens.tolist(), strict=True):
            least = int(settled[row])
            last = (int(rows.length[row]) + count - 1) // size
            table = rows.page_table[group, row].tolist()
            first = max(0, least - window + 1) // size if window else 0
            columns = range(least // size, last + 1)
            seen += table[first : last + 1]
            written += table[columns.start : columns.stop]
            handles += [handle_of(group, row, column) for column in columns]
        return seen, written, handles

    def _begin(self, group: int, handles: list[int]) -> None:
        """Generations that are seen for the first time: their pages were freed before."""
        new: dict[int, int] = {}
        for handle in handles:
            page, generation = handle & 0xFF_FFFF, handle >> 24 & 0xFFFF_FFFF
            if generation > self._generations.get((group, page), 1):
                new[page] = self._generations[group, page] = generation
        if new:
            pages, generations = np.array(list(new)), np.array(list(new.values()))
            self.checker.free(Pages(self.pools[group], pages, generations))

    def _named(self, handles: np.ndarray) -> list[Pages]:
        """Handles by pool, with the generations that the brain named."""
        groups = handle_groups(handles)
        return [
            Pages(
                pool,
                handle_pages(handles[groups == group]).astype(np.int64),
                handle_generations(handles[groups == group]).astype(np.int64),
            )
            for group, pool in enumerate(self.pools)
        ]
