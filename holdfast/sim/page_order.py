"""PageOrder: tells wire.order what the brain makes devices and mover do, in the brain's own order.

A plan or an order is told when it leaves the core, its end when the core takes the result or the
acknowledgement. A device's host thread knows of an end before the brain does, so what is ordered
here is ordered there; what is not ordered here may race on some device. Steps run on the stream
`compute`, copies on streams of their own; every edge between them is the brain's, which waits for a
result or an acknowledgement before it uses a place otherwise. Derives no fence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from holdfast.config import Limits
from holdfast.sim.violation import Violation
from holdfast.wire.copies import FETCH, LOAD, RESET, MoveOrders
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
# Copies of one direction follow each other; orders of the mover are run by as many threads.
WORKER = (COMPUTE, "load", "store")
MOVER = ("mover 0", "mover 1", "mover 2", "mover 3")
HOST, DISK = "host slots", "disk blocks"
HandleOf = Callable[[int, int, int], int]


class PageOrder:
    """One core's life, through all its epochs."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pools = [f"group {group}" for group in range(limits.groups)]
        pages = dict(zip(self.pools, limits.pages_by_group, strict=True))
        pages |= {HOST: max(1, limits.host_pages), DISK: max(1, limits.disk_pages)}
        self.checker = OrderChecker(pages, WORKER + MOVER, trash=self.pools)
        self._generations: dict[tuple[int, int], int] = {}

    def launch(
        self, plan: StepPlan, rows: RowTable, settled: np.ndarray, handle_of: HandleOf
    ) -> None:
        """`plan` is about to be sent. `rows` have taken its deltas and are as long as they can be
        before it; `settled` int[R] is how long they are at least. handle_of(group, row, column) is
        the handle by which the brain holds that page. Raises Violation."""
        for copy in plan.copies:
            self._copy(plan.epoch, copy)
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
        _judge(self.checker.launch(COMPUTE, reads, writes, f"step {plan.epoch}:{plan.step}"))
        self.checker.record(COMPUTE, plan.step)

    def acknowledge(self, result: StepResult) -> None:
        """The brain has taken the result of this step."""
        self._over(result.step)

    def _copy(self, epoch: int, copy: np.void) -> None:
        """One COPY of a plan."""
        handle, ticket = int(copy["handle"]), int(copy["ticket"])
        slot = Pages(HOST, np.array([copy["slot"]], np.int64))
        load = copy["kind"] == LOAD
        if load:
            self._begin(0, [handle])
        (page,) = self._named(np.array([handle], np.uint64))[:1]
        source, target = (slot, page) if load else (page, slot)
        stream = "load" if load else "store"
        _judge(self.checker.copy(stream, source, target, f"copy {epoch}:{ticket}"))
        self.checker.record(stream, ("copy", ticket))

    def copied(self, ticket: int) -> None:
        """The brain has taken the acknowledgement of a copy of this epoch."""
        self._over(("copy", ticket))

    def order(self, orders: MoveOrders) -> None:
        """Orders for the mover leave the core."""
        for move in orders.moves:
            if move["kind"] == RESET:
                continue
            slot = Pages(HOST, np.array([move["slot"]], np.int64))
            block = Pages(DISK, np.array([move["block"]], np.int64))
            source, target = (block, slot) if move["kind"] == FETCH else (slot, block)
            ticket = int(move["ticket"])
            stream = MOVER[ticket % len(MOVER)]
            _judge(self.checker.copy(stream, source, target, f"move {ticket}"))
            self.checker.record(stream, ("move", ticket))

    def moved(self, ticket: int) -> None:
        """The brain has taken the mover's acknowledgement."""
        self._over(("move", ticket))

    def reset(self) -> None:
        """The brain has taken the mover's answer to a RESET: it runs nothing older, and has got
        nothing newer."""
        self.checker.fence(MOVER)

    def fence(self) -> None:
        """Nothing of the worker runs any more."""
        self.checker.fence(WORKER)

    def _over(self, event: object) -> None:
        # Of an end that was told twice nothing is known any more, nor needs to be.
        if not self.checker.host_wait(event=event):
            self.checker.destroy(event)

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


def _judge(findings: list[Finding]) -> None:
    if findings:
        raise Violation(f"page order: {findings[0]}")
