"""Checkers: what must hold after every event of a simulation, said independently of the engine.

Each raises Violation, whose text names the request, page or step. They derive nothing from the
engine's own bookkeeping where they can keep their own. What a client must see is in sim.oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from holdfast.config import Limits
from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.sim.copy_watch import CopyWatch
from holdfast.sim.page_order import PageOrder
from holdfast.sim.violation import Violation
from holdfast.wire.checksum import page_sums, weights
from holdfast.wire.plan import StepPlan, StepResult
from holdfast.wire.rows import RowTable


class PageWatch:
    """No page gets a new writer while a launched step of another life may touch it.

    Keeps a row table of its own that follows the plans at launch, so it sees what the device will.
    How far a row with drafts has come is known between two bounds: `rows.length` counts with every
    draft, `settled` with none that no result has confirmed. `before`: the watch of the epoch
    before, for what it knew of the pages still holds, while its lives are over.
    """

    def __init__(
        self, limits: Limits, copies: CopyWatch, order: PageOrder, before: PageWatch | None = None
    ) -> None:
        self.limits = limits
        self.copies = copies
        self.order = order
        self.rows = RowTable(limits)
        self.settled = np.zeros(limits.rows_total, np.int64)
        # (group, page) -> life -> last launched step
        self.touched: dict[tuple[int, int], dict[int, int]] = {}
        # (group, page) -> whose tokens it holds
        self.tenants: dict[tuple[int, int], str] = {} if before is None else before.tenants
        # handle -> the life it was given to, for ever
        self.handles = {} if before is None else dict.fromkeys(before.handles, 0)
        # handles whose pages no step may write any more
        self.sealed: set[int] = set() if before is None else before.sealed
        self.flights: dict[int, tuple[StepPlan, np.ndarray]] = {}  # step -> plan, lives of its rows
        self.acknowledged = 0

    def launch(
        self,
        plan: StepPlan,
        tenant_of_row: Callable[[int], str],
        handle_of: Callable[[int, int, int], int],
    ) -> None:
        """`plan` is about to be sent; the callbacks say whose request holds a row of it, and by
        which handle the brain holds the page in (group, row, column)."""
        rows = self.rows
        rows.apply(plan)
        for admit in plan.admits:
            self.settled[admit["row"]] = admit["length"]
        for row, count in zip(plan.rows.tolist(), plan.query_lens.tolist(), strict=True):
            if rows.records["owner"][row] == 0:
                raise Violation(f"step {plan.step} computes row {row}, which nobody owns")
            for group in range(self.limits.groups):
                self._row(plan.step, group, row, count, tenant_of_row(row), handle_of)
        self.order.launch(plan, rows, self.settled, handle_of)
        self.sealed.update(plan.seals.tolist())
        # As if every draft were right; a result that says otherwise is subtracted.
        rows.advance(plan, np.zeros(plan.slots, np.int32), plan.drafts)
        self.flights[plan.step] = (plan, rows.records["owner"][plan.rows].copy())

    def _row(
        self,
        step: int,
        group: int,
        row: int,
        count: int,
        tenant: str,
        handle_of: Callable[[int, int, int], int],
    ) -> None:
        rows, size, window = self.rows, self.limits.page_tokens, self.limits.windows[group]
        life, settled = int(rows.records["owner"][row]), int(self.settled[row])
        last = (int(rows.length[row]) + count - 1) // size
        table = rows.page_table[group, row].tolist()
        for column in range(settled // size, last + 1):
            self._write(step, group, table[column], life)
            if handle_of(group, row, column) in self.sealed:
                raise Violation(f"step {step} writes page {table[column]}, which is sealed")
        for column in range(-(-settled // size), last + 1):
            self.tenants[group, table[column]] = tenant
            handle = handle_of(group, row, column)
            if self.handles.setdefault(handle, life) != life:
                raise Violation(f"step {step}: handle {handle:#x} is given out again")
        seen = max(0, settled - window + 1) // size if window else 0
        for column in range(seen, last + 1):
            page = table[column]
            if page == 0:
                raise Violation(f"step {step}: row {row} reads the trash page, column {column}")
            if self.tenants.get((group, page)) != tenant:
                raise Violation(
                    f"step {step}: row {row} of tenant {tenant} reads page {page}, which "
                    f"holds tokens of {self.tenants.get((group, page))}"
                )
            self.touched.setdefault((group, page), {})[life] = step
            if group == 0:
                self.copies.step_touches(step, page, writes=False)

    def copy_writes(self, page: int) -> None:
        """A copy that begins now writes a page of group 0."""
        for life, last in self.touched.get((0, page), {}).items():
            if last > self.acknowledged:
                raise Violation(f"a copy writes page {page} while step {last} of life {life} runs")

    def _write(self, step: int, group: int, page: int, life: int) -> None:
        if group == 0:
            self.copies.step_touches(step, page, writes=True)
        for other, last in self.touched.get((group, page), {}).items():
            if other != life and last > self.acknowledged:
                raise Violation(
                    f"step {step} writes page {page} for life {life} while step {last} of life "
                    f"{other} may still touch it"
                )

    def acknowledge(self, result: StepResult) -> None:
        """The result of the oldest launched step was taken."""
        self.acknowledged = result.step
        self.order.acknowledge(result)
        plan, lives = self.flights.pop(result.step)
        same = self.rows.records["owner"][plan.rows] == lives
        kept = result.accepted if plan.drafts.size else np.zeros(plan.rows.size, np.uint8)
        self.settled[plan.rows[same]] += (plan.known_lens + kept)[same]
        if plan.drafts.size:
            self.rows.length[plan.rows[same]] -= (plan.drafts - kept)[same]


def check_sums(
    ledger: Ledger, memory: list[np.ndarray], limits: Limits, rotten: Collection[int]
) -> None:
    """Every sealed page still is what it was when it was sealed, but for pages of group 0 that are
    `rotten` and were not read since."""
    words = weights(limits.page_tokens * 2)
    for pool, pages in zip(ledger.pools, memory, strict=True):
        sealed = np.flatnonzero(pool.state == PageState.SEALED)
        sums = page_sums(pages[sealed].view(np.uint32), words)
        changed = sealed[sums != pool.sums[sealed]]
        if pool.group == 0 and rotten:
            changed = changed[~np.isin(changed, list(rotten))]
        if changed.size:
            raise Violation(f"sealed page {changed[0]} of group {pool.group} has changed")


class Suspects:
    """Who was in flight when a worker faulted by itself: nobody ends for less than three faults at
    one position of its own, the last of them alone, and a poisonous request costs few workers.

    One core's life, for a core that dies forgets. `poison`: requests that kill workers, all those
    that are asked for so far.
    """

    def __init__(self, limits: Limits, poison: Collection[int]) -> None:
        self.poison = poison
        # A step can be in flight at as many positions as there are steps ahead. At each it takes
        # three faults to be sure; and each other culprit that is found may clear this one once.
        # Where it is first computed as a draft, each epoch may get one token nearer to it.
        self.faults_each = 3 * limits.steps_ahead + 2 + limits.draft_depth
        self._faults: dict[int, list[tuple[int, bool]]] = {}
        self._killed: dict[int, int] = {}

    def fault(self, in_flight: set[int], known: dict[int, int]) -> None:
        """known: tokens of each live request among those in flight."""
        alone = len(in_flight) == 1
        for request, position in known.items():
            self._faults.setdefault(request, []).append((position, alone))

    def killed_by(self, request: int) -> None:
        self._killed[request] = self._killed.get(request, 0) + 1
        if self._killed[request] > self.faults_each * max(1, len(self.poison)):
            raise Violation(f"request {request:#x} has killed {self._killed[request]} workers")

    def ended(self, request: int) -> None:
        """The core has ended it as the one that makes workers fault."""
        if not self.is_culprit(request):
            faults = self._faults.get(request, [])
            raise Violation(f"request {request:#x} ended for faults {faults} (position, alone)")

    def is_culprit(self, request: int) -> bool:
        """Whether the faults seen so far say that it makes workers fault."""
        faults = self._faults.get(request, [])
        same = [fault for fault in faults if fault[0] == faults[-1][0]]
        return len(same) >= 3 and same[-1][1]


def check_bounds(limits: Limits, in_flight: int, live: int, live_tokens: int) -> None:
    """No queue over its bound."""
    if in_flight > limits.steps_ahead:
        raise Violation(f"{in_flight} plans in flight, bound {limits.steps_ahead}")
    if live > limits.live_requests:
        raise Violation(f"{live} live requests, bound {limits.live_requests}")
    if live_tokens > limits.live_tokens:
        raise Violation(f"{live_tokens} live tokens, bound {limits.live_tokens}")
