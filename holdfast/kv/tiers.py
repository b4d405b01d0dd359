"""The tiers below the device: which pages go to host and disk, and which come back.

    device page --store--> host slot --spill--> disk block        out: at sealing, at eviction
    device page <--load--- host slot <--fetch-- disk block        in: for a waiting request

A page is offered to the host when it is sealed and shared, so evicting it from the device later
costs nothing. A host slot that is wanted for another page is spilled first when there is a disk.
What comes in belongs to a *job*, not to the request that waits for it: a request that ends
meanwhile changes nothing, and the pages end up cached or free.

Invariants, of which this file is the home: a place that an unacknowledged copy reads or writes is
nobody else's; bytes that do not have their sealed sum are never shared; no slot is used before the
mover has said that all orders of older cores, and all for memory that is lost, are over. Every
order has a ticket and an age.

Called by core.scheduler, core.commit and core.brain. It knows pages, tokens and tickets; of who
waits it knows nothing (`waiter` is any object), and it moves no bytes itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.kv.slots import Entry, Key, Slots, SlotState
from holdfast.wire.copies import COPY, COPY_OK, FETCH, LOAD, MOVE, RESET, SPILL, STORE, CopyAcks

_GROUP = 0  # the layer group that the prefix index covers, hence the one that is stored


@dataclass(slots=True)
class Job:
    """Pages on their way in, for whoever waits. `left`: orders not acknowledged.

    Of a load: hits uint64[h], the device pages it continues, and handles uint64[k], the pages that
    it fills, all leased by the job; parent: where the first of them hangs in the trie; good: whose
    bytes are right. A fetch ends in host slots and has none of these.
    """

    waiters: list[Any]
    entries: list[Entry]
    left: int
    parent: int = 0
    hits: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    handles: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    good: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class _Copy:
    """One COPY. `at`: its place in the job. issued_s is infinite until a plan takes it."""

    kind: int
    slot: int
    handle: int
    entry: Entry
    job: Job | None = None
    at: int = 0
    issued_s: float = float("inf")


@dataclass(slots=True)
class _Move:
    """One MOVE; `late` once nobody waits for it any more, `void` once what it moves is no good."""

    kind: int
    slot: int
    block: int
    job: Job | None = None
    late: bool = False
    void: bool = False
    issued_s: float = float("inf")


class Tiers:
    """Host and disk tier of one engine. `life` numbers the cores of this engine, from 1."""

    def __init__(self, limits: Limits, ledger: Ledger, life: int) -> None:
        self.limits = limits
        self.ledger = ledger
        self.life = life
        # Spilling takes a while: so many slots are free or on their way to be, for the next fetch.
        self.headroom = min(limits.host_pages // 4, limits.copies_max) if limits.disk_pages else 0
        # name, reason -> count, for the metrics.
        self.counts: dict[tuple[str, str], int] = {}
        # Pages whose loads went wrong: to be zeroed before they are free, since 0 * NaN is NaN.
        self.spoiled: list[np.ndarray] = []
        # Device pages whose copies to the host had not the sum that they were sealed with.
        self.changed: list[int] = []
        self._tickets = itertools.count(1)
        self._copies: dict[int, _Copy] = {}  # by ticket, oldest first, as are the moves
        self._moves: dict[int, _Move] = {}
        self._copies_new: list[int] = []  # not in a plan yet
        self._moves_new: list[int] = []
        self._arriving: dict[Key, Job] = {}
        self._start_over()

    def _start_over(self) -> None:
        """Nothing is held in any tier, and nothing may be until the mover is known to be idle."""
        self.host = Slots(self.limits.host_pages)
        self.disk = Slots(self.limits.disk_pages)
        # Without a disk nothing but copies of this epoch touches a slot, and the fence ends those.
        self.ready = self.limits.disk_pages == 0
        if not self.ready:
            self._order(_Move(RESET, 0, 0))

    # --- out: device -> host -> disk ---

    def offer(self, handle: int, tokens: bytes) -> None:
        """A page has just been sealed and shared: store it unless it is there or nothing is free.

        It is leased from here to the acknowledgement of the copy.
        """
        chains = self.ledger.index.chains
        assert chains is not None, "tiers without chain keys"
        key = (_GROUP, chains[handle])
        if self.host.knows(key):
            return
        if not self.ready or len(self._copies) >= self.limits.copies_max:
            self._count("skip", "busy")
            return
        pool, page = self.ledger.pools[_GROUP], handle & 0xFF_FFFF
        entry = Entry(key, tokens, int(pool.sums[page]), int(pool.sealed_at[page]))
        slot = self._host_slot(entry)
        if slot is None:
            self._count("skip", "full")
            return
        self.ledger.lend(handle)
        self._copy(_Copy(STORE, slot, handle, entry))

    def _host_slot(self, entry: Entry) -> int | None:
        """A slot to write `entry` to, room being made for it and for those that follow."""
        if self.host.free == 0:
            self._evict()
        slot = self.host.fill(entry)
        self._make_room()
        return slot

    def _make_room(self) -> None:
        while self.host.free + self.host.leaving < self.headroom and self._evict():
            pass

    def _evict(self) -> bool:
        """Give up the least recently used host slot: at once, or when its bytes are on disk."""
        slot = self.host.oldest()
        if slot is None:
            return False
        entry = self.host.entry(slot)
        block = None
        if self.limits.disk_pages and not self.disk.knows(entry.key):
            if len(self._moves) + 1 < self.limits.copies_max:  # one is left for a fetch
                block = self._disk_block(entry)
            if block is None:
                self._count("skip", "disk_busy")
        if block is None:
            self.host.drop(slot)
        else:
            self.host.leave(slot)
            self._order(_Move(SPILL, slot, block))
        return True

    def _disk_block(self, entry: Entry) -> int | None:
        if self.disk.free == 0:
            block = self.disk.oldest()
            if block is None:
                return None
            self.disk.drop(block)
        return self.disk.fill(entry)

    # --- in: disk -> host -> device ---

    def bring(
        self, waiter: Any, hits: np.ndarray, parent: int, tokens: np.ndarray, room: int
    ) -> bool:
        """Whether `waiter` now waits for pages that continue `hits`, its prefix on the device.

        hits: uint64[h], leased by the caller; the leases are the job's, or given back, when True.
        parent: the last of them, or the root. tokens: int32[k], what follows them. room: device
        pages that may be taken.
        """
        if not self.ready:
            return False
        found = self._walk(parent, tokens.tobytes())
        if isinstance(found, Job):
            found.waiters.append(waiter)
        elif not found:
            return False
        elif all(slot is not None for _, slot, _ in found):
            return self._load(waiter, hits, parent, found, room)
        elif not self._fetch(waiter, found):
            return False
        self.ledger.release(hits, 0)
        return True

    def _walk(self, parent: int, data: bytes) -> Job | list[tuple[Entry, int | None, int | None]]:
        """(entry, host slot, disk block) of each page that is in a tier, up to the first that is
        not; or the job that brings the first one."""
        chains, size = self.ledger.index.chains, 4 * self.limits.page_tokens
        assert chains is not None, "tiers without chain keys"
        chain = chains[parent]
        found: list[tuple[Entry, int | None, int | None]] = []
        for at in range(0, len(data) - size + 1, size):
            tokens = data[at : at + size]
            chain = self.ledger.index.chain_key(chain, tokens)
            key = (_GROUP, chain)
            job = self._arriving.get(key)
            if job is not None:
                return found or job
            slot, block = self.host.find(key, tokens), None
            if slot is not None:
                entry = self.host.entry(slot)
            else:
                block = self.disk.find(key, tokens)
                # A slot in motion, or a block that a late move still reads, helps nobody now.
                if block is None or self.disk.leases[block] or self.host.knows(key):
                    break
                entry = self.disk.entry(block)
            found.append((entry, slot, block))
        return found

    def _load(
        self,
        waiter: Any,
        hits: np.ndarray,
        parent: int,
        found: list[tuple[Entry, int | None, int | None]],
        room: int,
    ) -> bool:
        count = min(len(found), room, self.limits.copies_max - len(self._copies))
        if count <= 0:
            self._count("skip", "busy")
            return False
        sets = self.ledger.reserve(count)
        require(sets is not None, f"{count} pages promised and not there")
        handles = sets[_GROUP]
        self.ledger.load(handles)
        entries = [entry for entry, _, _ in found[:count]]
        job = Job([waiter], entries, count, parent, hits, handles, [False] * count)
        for at, (entry, slot, _) in enumerate(found[:count]):
            assert slot is not None
            self.host.lease(slot)
            self._arriving[entry.key] = job
            self._copy(_Copy(LOAD, slot, int(handles[at]), entry, job, at))
        return True

    def _fetch(self, waiter: Any, found: list[tuple[Entry, int | None, int | None]]) -> bool:
        job = Job([waiter], [], 0)
        for entry, slot, block in found:
            if slot is not None:
                continue
            if len(self._moves) >= self.limits.copies_max:
                self._count("skip", "disk_busy")
                break
            # Making room for the pages before it may have dropped it.
            block = self.disk.find(entry.key, entry.tokens)
            if block is None:
                break
            self.disk.lease(block)
            target = self._host_slot(entry)
            if target is None:
                self.disk.release(block)
                self._count("skip", "full")
                break
            job.entries.append(entry)
            job.left += 1
            self._arriving[entry.key] = job
            self._order(_Move(FETCH, target, block, job))
        return job.left > 0

    # --- orders ---

    def _copy(self, copy: _Copy) -> None:
        ticket = next(self._tickets)
        self._copies[ticket] = copy
        self._copies_new.append(ticket)

    def _order(self, move: _Move) -> None:
        ticket = next(self._tickets)
        self._moves[ticket] = move
        self._moves_new.append(ticket)

    @property
    def pending(self) -> bool:
        """Whether copies wait for a plan to take them."""
        return bool(self._copies_new)

    def take_copies(self, now_s: float) -> np.ndarray:
        """COPY[c] for the plan that is about to be launched."""
        tickets, self._copies_new = self._copies_new, []
        records = []
        for ticket in tickets:
            copy = self._copies[ticket]
            copy.issued_s = now_s
            records.append((ticket, copy.handle, copy.kind, copy.slot))
        return np.array(records, COPY)

    def take_moves(self, now_s: float) -> np.ndarray:
        """MOVE[m] for the mover, in order."""
        tickets, self._moves_new = self._moves_new, []
        records = []
        for ticket in tickets:
            move = self._moves[ticket]
            move.issued_s = now_s
            records.append((ticket, move.kind, move.slot, move.block))
        return np.array(records, MOVE)

    def page_leases(self) -> int:
        """Device pages that come back with acknowledgements and with nothing else."""
        if not self._copies:
            return 0
        leases = self.ledger.pools[_GROUP].leases
        jobs = {id(copy.job): copy.job for copy in self._copies.values() if copy.job}
        held = [job.hits for job in jobs.values()] + [job.handles for job in jobs.values()]
        lent = [copy.handle for copy in self._copies.values() if copy.kind == STORE]
        handles = np.concatenate([*held, np.array(lent, np.uint64)])
        return int(np.count_nonzero(leases[handles & np.uint64(0xFF_FFFF)] == 1))

    # --- acknowledgements ---

    def copied(self, acks: CopyAcks) -> list[Any]:
        """Copies of this epoch are over; returns who has waited long enough."""
        waiters: list[Any] = []
        for ticket, status, total in zip(
            acks.tickets.tolist(), acks.status.tolist(), acks.sums.tolist(), strict=True
        ):
            copy = self._copies.pop(ticket, None)
            if copy is None:
                self._count("stale", "")
                continue
            good = self._judge(status, total, copy.entry)
            if copy.kind == STORE:
                self._stored(copy, good)
                if status == COPY_OK and not good:
                    self.changed.append(copy.handle)
            else:
                waiters += self._loaded(copy, good)
        self._make_room()
        return waiters

    def _judge(self, status: int, total: int, entry: Entry) -> bool:
        """Whether what arrived is what was sealed."""
        if status != COPY_OK:
            self._count("failure", "failed")
            return False
        if total != entry.sum:
            self._count("failure", "bad_sum")
            return False
        return True

    def _stored(self, copy: _Copy, good: bool) -> None:
        self.ledger.repay(copy.handle)
        if good:
            self.host.filled(copy.slot)
            self._count("stored", "")
        else:
            self.host.empty(copy.slot)

    def _loaded(self, copy: _Copy, good: bool) -> list[Any]:
        job = copy.job
        assert job is not None
        self.host.release(copy.slot)
        if good:
            job.good[copy.at] = True
            self.ledger.loaded(copy.handle, copy.entry.sum, copy.entry.sealed_at)
            self._count("loaded", "")
        else:
            self.ledger.not_loaded(copy.handle)
            self.host.drop(copy.slot)
        return self._part(job)

    def _part(self, job: Job) -> list[Any]:
        """One order of a job is over. With the last one its pages are shared as far as they are
        good, its leases go, and whoever waited for it is returned."""
        job.left -= 1
        if job.left:
            return []
        for entry in job.entries:
            del self._arriving[entry.key]
        if job.handles.size:
            self._share(job)
        return job.waiters

    def _share(self, job: Job) -> None:
        parent: int | None = job.parent
        for handle, entry, good in zip(job.handles.tolist(), job.entries, job.good, strict=True):
            # One that has changed since it came was given up, while others were on their way.
            if not good or parent is None or not self.ledger.is_sealed(handle):
                break
            # Another page stands for these tokens when they were computed meanwhile; ours is free.
            parent = self.ledger.share(handle, parent, entry.tokens)
        good = np.array(job.good)
        if not good.all():
            self.spoiled.append(job.handles[~good])
        self.ledger.release(np.concatenate([job.hits, job.handles[good]]), 0)

    def moved(self, acks: CopyAcks) -> list[Any]:
        """Moves are over; returns who has waited long enough. What speaks of another core's orders
        or of none is counted and dropped."""
        waiters: list[Any] = []
        for ticket, status, total in zip(
            acks.tickets.tolist(), acks.status.tolist(), acks.sums.tolist(), strict=True
        ):
            move = self._moves.pop(ticket, None) if acks.epoch == self.life else None
            if move is None:
                self._count("stale", "")
            elif move.kind == RESET:
                self.ready = True
            elif move.kind == SPILL:
                self._spilled(move, status, total)
            else:
                waiters += self._fetched(move, status, total)
        self._make_room()
        return waiters

    def _spilled(self, move: _Move, status: int, total: int) -> None:
        self.host.empty(move.slot)
        if self._judge(status, total, self.disk.entry(move.block)) and not move.void:
            self.disk.filled(move.block)
            self._count("spilled", "")
        else:
            self.disk.empty(move.block)

    def _fetched(self, move: _Move, status: int, total: int) -> list[Any]:
        good = self._judge(status, total, self.disk.entry(move.block)) and not move.void
        self.disk.release(move.block)
        if not good:
            self.disk.drop(move.block)
        if good and not move.late:
            self.host.filled(move.slot)
            self._count("fetched", "")
        else:
            self.host.empty(move.slot)
        return self._part(move.job) if move.job and not move.late else []

    # --- time ---

    def next_deadline_s(self, *, worker: bool) -> float:
        """When a copy or a move becomes late; infinite when none is under way. Without a worker
        copies are over at the next epoch and not before."""
        oldest = float("inf")
        if self._copies and worker:
            oldest = next(iter(self._copies.values())).issued_s
        for move in self._moves.values():
            if not move.late and move.kind != RESET:
                oldest = min(oldest, move.issued_s)
                break
        return oldest + self.limits.copy_timeout_s

    def late_copy(self, now_s: float) -> int | None:
        """The ticket of a copy that should have been acknowledged by now: its worker must end."""
        for ticket, copy in self._copies.items():
            return ticket if copy.issued_s + self.limits.copy_timeout_s <= now_s else None
        return None

    def expire(self, now_s: float) -> list[Any]:
        """Late moves are not waited for; returns who did. Slot and block stay out of use until the
        acknowledgement comes, however late."""
        waiters: list[Any] = []
        for move in self._moves.values():
            if move.issued_s + self.limits.copy_timeout_s > now_s:
                break
            if move.late or move.kind == RESET:
                continue
            move.late = True
            self._count("failure", "late")
            if move.kind == FETCH:
                self.host.quarantine(move.slot)
                waiters += self._part(move.job) if move.job else []
        return waiters

    def new_epoch(self, sealed_until: int | None = None) -> list[Any]:
        """The old worker is fenced: its copies are void, and the slots they filled are free. What
        was sealed after `sealed_until` is no good in any tier. Returns everybody who waits; moves
        go on for nobody."""
        jobs: dict[int, Job] = {}
        for copy in self._copies.values():
            if copy.kind == STORE:
                self.host.empty(copy.slot)
            else:
                assert copy.job is not None
                self.host.release(copy.slot)
                jobs[id(copy.job)] = copy.job
        for move in self._moves.values():
            if move.job is not None and not move.late:
                jobs[id(move.job)] = move.job
            move.job = None
            if sealed_until is not None and move.kind != RESET:
                move.void |= self.disk.entry(move.block).sealed_at > sealed_until
        if sealed_until is not None:
            self.host.drop_since(sealed_until)
            self.disk.drop_since(sealed_until)
        self._copies.clear()
        self._copies_new.clear()
        self._arriving.clear()
        self.spoiled.clear()
        self.changed.clear()
        return [waiter for job in jobs.values() for waiter in job.waiters]

    def reset(self) -> list[Any]:
        """The old worker is fenced, and the memory is not the one that it wrote: the keeper's end
        took the host slots, the disk blocks and the mover with its orders. Nothing of any tier is
        believed, and orders that the new mover may have got meanwhile are waited for. Returns
        everybody who waits."""
        waiters = self.new_epoch()
        # Those that the old mover had are answered by nobody.
        self._moves.clear()
        self._moves_new.clear()
        self._start_over()
        return waiters

    # --- checks ---

    def _count(self, name: str, reason: str) -> None:
        self.counts[name, reason] = self.counts.get((name, reason), 0) + 1

    def verify(self) -> None:
        """Recount everything. Raises InvariantError naming what does not add up."""
        self.host.verify()
        self.disk.verify()
        copies, moves = list(self._copies.values()), list(self._moves.values())
        loads = [copy for copy in copies if copy.kind == LOAD]
        fetches = [move for move in moves if move.kind == FETCH]
        late = sum(move.late for move in fetches)
        spills = sum(move.kind == SPILL for move in moves)
        host, disk, pool = self.host.counts(), self.disk.counts(), self.ledger.pools[_GROUP]
        lent = int(self.ledger.lent.sum())
        for what, found, wanted in (
            (
                "filling slots",
                host[SlotState.FILLING],
                len(copies) - len(loads) + len(fetches) - late,
            ),
            ("quarantined slots", host[SlotState.QUARANTINED], late),
            ("leaving slots", host[SlotState.LEAVING], spills),
            ("leased slots", sum(self.host.leases), len(loads)),
            ("filling blocks", disk[SlotState.FILLING], spills),
            ("leased blocks", sum(self.disk.leases), len(fetches)),
            ("lent pages", lent - self.ledger.reading, len(copies) - len(loads)),
            ("loading pages", pool.counts()[PageState.LOADING], len(loads)),
        ):
            require(found == wanted, f"{what}: {found}, orders say {wanted}")
        require(len(copies) <= self.limits.copies_max, f"{len(copies)} copies in flight")
        require(len(moves) <= self.limits.copies_max, f"{len(moves)} moves in flight")
