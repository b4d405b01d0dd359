"""PageFaults: a sealed page is not what it was. It is a fault of the page, not of its worker.

Found when a kept page is verified after a worker's end (`promotion`), by the scrub, or when a copy
to the host had another sum (`store`). The page and all that was computed from it are given up and
soiled, every row that has any of it in its context starts again from its tokens, and an entry says
what can be known of the cause. Tokens that were emitted meanwhile are facts and stay.

Owned by core.brain, called when results and acknowledgements are settled. It knows no process.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from holdfast.core.flight import Flight
from holdfast.core.scheduler import Scheduler
from holdfast.kv.ledger import Ledger
from holdfast.wire.plan import handle_groups, handle_pages

# What is remembered, for the report of a fault: pages that failed, and plans launched last.
ENTRIES = 64
PLANS = 8


class PageFaults:
    """entries: the last pages that failed, plain data."""

    def __init__(self, ledger: Ledger, scheduler: Scheduler) -> None:
        self.ledger = ledger
        self.scheduler = scheduler
        self.entries: deque[dict[str, Any]] = deque(maxlen=ENTRIES)
        self._launched: deque[Flight] = deque(maxlen=PLANS)

    def launched(self, flight: Flight) -> None:
        """Remember a plan, for it may be the one that changed a page."""
        self._launched.append(flight)

    def judge(self, flight: Flight, sums: np.ndarray) -> list[int]:
        """The sums uint64[k] of the pages that a plan has read again are in: returns the handles of
        those that have changed, for `fail`."""
        handles = flight.checks
        failed = self.ledger.judge(handles, sums)
        checks = self.scheduler.checks
        if flight.verifies:
            checks.verified += handles.size - failed.size
        else:
            checks.scrubbed += handles.size - failed.size
        return failed.tolist()

    def fail(self, handles: list[int], found: str) -> None:
        """These pages are not what was sealed: handles that are not stale, of sealed pages."""
        for handle in handles:
            self.entries.append(self._entry(handle, found, self._rows_with({handle})))
        holders = self._rows_with(set(handles))
        # What a row computed behind such a page of its own may be in the trie under a twin.
        behind = {one for row in holders for one in self._behind(row, set(handles))}
        void = self.ledger.drop(set(handles) | behind)
        run = self.scheduler.running
        rows = np.array(self._rows_with(void | set(handles)), np.int64)
        # Oldest last to the front, so that the order stays.
        for row in rows[np.argsort(-run.order[rows])].tolist():
            chain = run.chains[row]
            assert chain is not None
            chain.parent = None  # What it has asked to be sealed must not be found.
            self.scheduler.recompute(row)

    def _rows_with(self, handles: set[int]) -> list[int]:
        """Rows that have any of these pages in their tables, or lease them as twins."""
        run, wanted = self.scheduler.running, np.array(sorted(handles), np.uint64)
        rows = run.rows()
        found = [
            bool(np.isin(np.concatenate(_held(run, row)), wanted).any()) for row in rows.tolist()
        ]
        return rows[np.array(found, np.bool_)].tolist()

    def _behind(self, row: int, handles: set[int]) -> set[int]:
        """Sealed pages of a row behind the first of `handles` that it reads."""
        run, wanted = self.scheduler.running, np.array(sorted(handles), np.uint64)
        last = int(run.pages_len[row])
        columns = [np.flatnonzero(np.isin(table[row, :last], wanted)) for table in run.handles]
        first = min((int(found[0]) for found in columns if found.size), default=last)
        behind: set[int] = set()
        for group, table in enumerate(run.handles):
            start = max(first + 1, int(run.dropped[group, row]))
            behind.update(one for one in table[row, start:last].tolist())
        return {one for one in behind if self.ledger.is_sealed(one)}

    def _entry(self, handle: int, found: str, holders: list[int]) -> dict[str, Any]:
        """What is known of it. sealed_at, clock: on the ledger's clock, the latter now. owners: who
        has it in its context. plans: the last ones launched, and what each did with the page."""
        group, page = handle >> 56, handle & 0xFF_FFFF
        run = self.scheduler.running
        owners = [
            {"request": request.id, "tenant": request.admission.tenant}
            for row in holders
            if (request := run.requests[row]) is not None
        ]
        return {
            "page": page,
            "group": group,
            "generation": handle >> 24 & 0xFFFF_FFFF,
            "found": found,
            "sealed_at": int(self.ledger.pools[group].sealed_at[page]),
            "clock": self.ledger.clock,
            "owners": owners,
            "plans": [_told(flight, handle, holders) for flight in self._launched],
        }


def _held(run: Any, row: int) -> list[np.ndarray]:
    """Handles that a row holds, group by group, and those that it borrows."""
    last = int(run.pages_len[row])
    held = [table[row, run.dropped[group, row] : last] for group, table in enumerate(run.handles)]
    return [*held, np.array(run.chains[row].borrowed, np.uint64)]


def _told(flight: Flight, handle: int, holders: list[int]) -> dict[str, Any]:
    """A plan in a few words: its number, its requests, and how it names the page."""
    plan, page = flight.plan, np.array([handle], np.uint64)
    writes = plan.page_writes
    entered = (writes["group"] == handle_groups(page)) & (writes["page"] == handle_pages(page))
    does = {
        "seals": handle in plan.seals,
        "zeros": handle in plan.zeros,
        "copies": handle in plan.copies["handle"],
        "enters a table": bool(entered.any()),
        "reads": bool(np.isin(plan.rows, holders).any()),
    }
    return {
        "epoch": plan.epoch,
        "step": plan.step,
        "requests": flight.ids.tolist(),
        "does": [what for what, so in does.items() if so],
    }
