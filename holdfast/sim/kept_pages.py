"""KeptPages: which pages a core may believe in after a worker's end, said without its ledger.

Its own book of every page that was sealed: when, on a count of results taken, and with which sum.
After a new epoch each page that still counts as sealed must be in it, old enough, and not computed
with weights that were found bad; nothing is computed before all of these were read again; and a
page whose sum is not the first one must be gone once the core has taken the result that says so.
Of a tier nothing is read that was not put there since the memory was lost.

One core's life. Raises Violation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.sim.violation import Violation
from holdfast.wire.copies import FETCH, LOAD, RESET, MoveOrders
from holdfast.wire.messages import Memory
from holdfast.wire.plan import StepPlan, StepResult

Place = tuple[str, int]
# Steps before a worker's end of which nothing is kept (DESIGN 1).
RECENT = 2


@dataclass(frozen=True, slots=True)
class Sealed:
    """at: results taken by then. sum: what the device said first; None of one that was loaded."""

    at: int
    sum: int | None


class KeptPages:
    """`waiting`: handles that outlived their worker and were not read since."""

    def __init__(self) -> None:
        self.results = 0
        self.waiting: set[int] = set()
        self._pages: dict[int, Sealed] = {}
        self._places: dict[Place, int] = {}  # slots and blocks: when their content was sealed
        self._doubtful: set[Place] = set()  # those of them that bad weights may have computed
        self._plans: dict[int, StepPlan] = {}
        self._spoilt: set[Place] = set()  # pages whose sums were wrong, not zeroed since
        self._good_at = 0  # the weights were surely right until then
        self._first = 0  # results taken before this epoch
        self._changed_at: int | None = None

    def launch(self, plan: StepPlan) -> None:
        """A plan leaves the core."""
        if plan.rows.size and self.waiting:
            raise Violation(
                f"step {plan.step} computes while {len(self.waiting)} kept pages are unverified"
            )
        self._plans[plan.step] = plan
        self._check_zeroed(plan)
        for copy in plan.copies:
            slot, handle = ("slot", int(copy["slot"])), int(copy["handle"])
            if copy["kind"] == LOAD:
                if slot in self._doubtful:
                    raise Violation(f"{slot} is loaded, which bad weights may have computed")
                self._pages[handle] = Sealed(self._put_at(slot), None)
            else:
                self._doubtful.discard(slot)
                self._places[slot] = self._pages[handle].at

    def _put_at(self, place: Place) -> int:
        """When the content of a slot or block was sealed."""
        if place not in self._places:
            raise Violation(f"{place} is read, and nothing was put there in this memory")
        return self._places[place]

    def _check_zeroed(self, plan: StepPlan) -> None:
        """A page that has changed may hold what is not finite: a row that gets it has it zeroed."""
        for handle in (*plan.zeros.tolist(), *plan.copies["handle"].tolist()):
            self._spoilt.discard(_page_of(handle))
        if not self._spoilt:
            return
        for write in plan.page_writes.tolist():
            if (f"group {write[0]}", write[3]) in self._spoilt:
                raise Violation(f"step {plan.step}: page {write[3]} has changed and is not zeroed")

    def order(self, orders: MoveOrders) -> None:
        """Orders for the mover leave the core."""
        for move in orders.moves:
            if move["kind"] != RESET:
                slot, block = ("slot", int(move["slot"])), ("block", int(move["block"]))
                source, target = (block, slot) if move["kind"] == FETCH else (slot, block)
                self._places[target] = self._put_at(source)
                self._doubtful.discard(target)
                if source in self._doubtful:
                    self._doubtful.add(target)

    def taken(self, result: StepResult, ledger: Ledger) -> None:
        """The core has taken the result of the oldest plan."""
        self.results += 1
        plan = self._plans.pop(result.step)
        for handle, total in zip(plan.seals.tolist(), result.seal_sums.tolist(), strict=True):
            self.waiting.discard(handle)
            before = self._pages.get(handle)
            if before is None or before.sum is None:
                self._pages[handle] = Sealed(self.results if before is None else before.at, total)
            elif before.sum != total and ledger.is_sealed(handle):
                raise Violation(f"page {handle:#x} has another sum than it was sealed with, and is")
            elif before.sum != total:
                self._spoilt.add(_page_of(handle))
        # A page that was given up need not be read any more.
        self.waiting = {handle for handle in self.waiting if ledger.is_sealed(handle)}

    def weights_good(self, step: int) -> None:
        """The core was told that a pass over the weights found them good; it began after a step."""
        self._good_at = max(self._good_at, self._first + step)

    def weights_changed(self) -> None:
        """They are not any more what was loaded, and nobody knows."""
        if self._changed_at is None:
            # What is on its way was computed before.
            self._changed_at = self.results + len(self._plans)

    def new_epoch(self, memory: Memory, ledger: Ledger) -> None:
        """The core has been told of another worker, and of the memory."""
        newest = self.results - RECENT
        if memory is Memory.RELOADED:
            newest = min(newest, self._good_at)
            if self._changed_at is not None:
                newest = min(newest, self._changed_at)
        self._changed_at = None
        alive = set()
        for pool in ledger.pools:
            sealed = np.flatnonzero(pool.state == PageState.SEALED)
            alive.update(pool.current[sealed].tolist())
        for handle in sorted(alive):
            known = self._pages.get(handle)
            if memory is Memory.LOST or known is None or known.at > newest:
                raise Violation(f"page {handle:#x} ({known}) is kept, after {newest}, {memory}")
        self._pages = {handle: self._pages[handle] for handle in sorted(alive)}
        if memory is Memory.LOST:
            self._places.clear()
            self._doubtful.clear()
        if memory is Memory.RELOADED:
            self._doubtful.update(at for at, when in self._places.items() if when > self._good_at)
        self._plans.clear()
        self._spoilt.clear()  # with all pages that are not kept
        self.waiting = alive
        self._good_at = self._first = self.results


def _page_of(handle: int) -> Place:
    return f"group {handle >> 56}", handle & 0xFF_FFFF
