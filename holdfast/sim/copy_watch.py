"""Who reads and writes which page, slot and block at the moment, by what was ordered alone.

An access is open from the order to its acknowledgement's arrival at the core, to the fence of its
worker, or to the mover's answer to a later RESET, of the same core or the next one. Two open
accesses of one place, of which one writes, are a Violation, and so is a step on the page of an open
copy unless both only read. Knows nothing of the ledger or of kv.tiers.
"""

from __future__ import annotations

from holdfast.sim.violation import Violation
from holdfast.wire.copies import FETCH, LOAD, RESET, MoveOrders
from holdfast.wire.plan import StepPlan, handle_pages

Place = tuple[str, int]
Owner = tuple[str, int, int]  # "worker" or "mover", its epoch or the core's life, ticket


class CopyWatch:
    """`opened`: owner -> (when, the place it reads, the place it writes)."""

    def __init__(self) -> None:
        self.opened: dict[Owner, tuple[int, Place, Place]] = {}
        self.tenants: dict[Place, str] = {}  # of slots and blocks: whose tokens they hold
        self.stored = self.loaded = self.spilled = self.fetched = 0

    def launch(self, plan: StepPlan, now: int, tenants: dict[tuple[int, int], str]) -> list[int]:
        """The plan's copies begin. tenants: of device pages, by group and page. Returns the
        pages loaded."""
        loaded = []
        for copy in plan.copies:
            page: Place = ("page", int(handle_pages(copy["handle"].reshape(1))[0]))
            slot: Place = ("slot", int(copy["slot"]))
            owner: Owner = ("worker", plan.epoch, int(copy["ticket"]))
            if copy["kind"] == LOAD:
                self._open(owner, now, slot, page)
                tenants[0, page[1]] = self.tenants.get(slot, "nobody")
                loaded.append(page[1])
                self.loaded += 1
            else:
                self._open(owner, now, page, slot)
                self.tenants[slot] = tenants.get((0, page[1]), "nobody")
                self.stored += 1
        return loaded

    def order(self, orders: MoveOrders, now: int) -> None:
        """The mover's orders leave the core."""
        for move in orders.moves:
            if move["kind"] == RESET:
                continue
            source: Place = ("slot", int(move["slot"]))
            target: Place = ("block", int(move["block"]))
            if move["kind"] == FETCH:
                source, target = target, source
                self.fetched += 1
            else:
                self.spilled += 1
            self._open(("mover", orders.life, int(move["ticket"])), now, source, target)
            self.tenants[target] = self.tenants.get(source, "nobody")

    def _open(self, owner: Owner, now: int, source: Place, target: Place) -> None:
        if owner in self.opened:
            raise Violation(f"{owner} is ordered twice")
        for other, (_, read, written) in self.opened.items():
            if target in (read, written) or source == written:
                raise Violation(
                    f"{owner} reads {source} and writes {target} while {other} may still read "
                    f"{read} and write {written}"
                )
        self.opened[owner] = (now, source, target)

    def close(self, kind: str, number: int, ticket: int) -> None:
        """An acknowledgement reached a core that this kind of order may come from."""
        self.opened.pop((kind, number, ticket), None)

    def fence(self, epoch: int) -> None:
        """Workers before `epoch` write nothing any more."""
        self._forget("worker", epoch, 0)

    def reset(self, life: int, ticket: int) -> None:
        """The mover has told core number `life` that everything older than its RESET is over."""
        self._forget("mover", life, ticket)

    def _forget(self, kind: str, number: int, ticket: int) -> None:
        self.opened = {
            owner: access
            for owner, access in self.opened.items()
            if owner[0] != kind or owner[1:] >= (number, ticket)
        }

    def step_touches(self, step: int, page: int, *, writes: bool) -> None:
        """A step that is launched now reads or writes a device page."""
        if not self.opened:
            return
        for owner, (_, read, written) in self.opened.items():
            if ("page", page) == written or (writes and ("page", page) == read):
                verb = "writes" if writes else "reads"
                raise Violation(f"step {step} {verb} page {page} while {owner} is not over")

    def oldest(self, epoch: int) -> int | None:
        """When the oldest open copy of the worker of `epoch` was ordered."""
        times = [o[0] for who, o in self.opened.items() if who[:2] == ("worker", epoch)]
        return min(times, default=None)
