"""Copies between tiers with integers: each reads its source at one moment and writes its target at
another, and nobody but the tests' order of events says when.

A `Transfer` is one copy of a plan or one move of the mover. `FakeMover` stands for the threads of
one keeper that move pages between host and disk: it outlives cores and workers, runs its orders in
any order, and answers a RESET once every order that came before it is over. The next keeper has its
own, and new memory.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.sim.fake_worker import memory_of
from holdfast.wire.checksum import page_sums, weights
from holdfast.wire.copies import (
    COPY_FAILED,
    COPY_OK,
    LOAD,
    RESET,
    SPILL,
    CopyAcks,
    MoveOrders,
)
from holdfast.wire.plan import StepPlan, handle_pages


class Transfer:
    """One page on its way from `source` to `target`, both uint64[page_tokens].

    epoch: of the worker, or the life of the core, that the acknowledgement is for.
    """

    def __init__(self, epoch: int, ticket: int, source: np.ndarray, target: np.ndarray) -> None:
        self.epoch = epoch
        self.ticket = ticket
        self.source = source
        self.target = target
        self._bytes = source

    def read(self) -> None:
        self._bytes = self.source.copy()

    def write(self) -> None:
        self.target[:] = self._bytes

    def fail(self) -> None:
        """It broke off half-way: the target is neither what it was nor what it should be."""
        self.target[: self.target.size // 2 + 1] = 0xDEAD

    def ack(self, status: int = COPY_OK) -> CopyAcks:
        words = self.target.view(np.uint32)
        return CopyAcks(
            epoch=self.epoch,
            tickets=np.array([self.ticket], np.uint64),
            status=np.array([status], np.uint8),
            sums=page_sums(words[None, :], weights(words.size)),
        )

    def run(self, *, failed: bool = False) -> CopyAcks:
        """All of it at once, for tests that do not care."""
        self.read()
        if failed:
            self.fail()
            return self.ack(COPY_FAILED)
        self.write()
        return self.ack()


class TierMemory:
    """All bytes: pages uint64[pages, T] (group 0 of the device), host uint64[host_pages, T],
    disk uint64[disk_pages, T]. It outlives workers and cores, and no keeper."""

    def __init__(self, limits: Limits, pages: list[np.ndarray] | None = None) -> None:
        self.pages = (memory_of(limits) if pages is None else pages)[0]
        self.host = np.zeros((limits.host_pages, limits.page_tokens), np.uint64)
        self.disk = np.zeros((limits.disk_pages, limits.page_tokens), np.uint64)

    def begin_anew(self) -> None:
        """A new keeper has made the host arena and the disk's file: zeros."""
        self.host[:] = 0
        self.disk[:] = 0

    def copies_of(self, plan: StepPlan) -> list[Transfer]:
        """What a worker begins when it gets `plan`."""
        found = []
        for copy in plan.copies:
            page = self.pages[handle_pages(copy["handle"].reshape(1))[0]]
            slot = self.host[copy["slot"]]
            source, target = (slot, page) if copy["kind"] == LOAD else (page, slot)
            found.append(Transfer(plan.epoch, int(copy["ticket"]), source, target))
        return found


class FakeMover:
    """Begins moves; whoever drives it runs their halves and says when each is over."""

    def __init__(self, memory: TierMemory) -> None:
        self.memory = memory
        self._open: set[tuple[int, int]] = set()
        # RESETs and the orders that they wait for.
        self._resets: list[tuple[CopyAcks, set[tuple[int, int]]]] = []

    def begin(self, orders: MoveOrders) -> list[Transfer]:
        """The moves of `orders`; a RESET among them is answered by `over`."""
        found, memory = [], self.memory
        for move in orders.moves:
            ticket = int(move["ticket"])
            if move["kind"] == RESET:
                nothing = np.zeros(1, np.uint64)
                ack = CopyAcks(
                    epoch=orders.life,
                    tickets=np.array([ticket], np.uint64),
                    status=np.array([COPY_OK], np.uint8),
                    sums=nothing,
                )
                self._resets.append((ack, set(self._open)))
                continue
            slot, block = memory.host[move["slot"]], memory.disk[move["block"]]
            source, target = (slot, block) if move["kind"] == SPILL else (block, slot)
            found.append(Transfer(orders.life, ticket, source, target))
            self._open.add((orders.life, ticket))
        return found

    def over(self, transfer: Transfer | None = None) -> list[CopyAcks]:
        """`transfer` touches nothing any more; returns the RESETs that are now answered."""
        if transfer is not None:
            self._open.discard((transfer.epoch, transfer.ticket))
        answered = [ack for ack, older in self._resets if not older & self._open]
        self._resets = [reset for reset in self._resets if reset[1] & self._open]
        return answered
