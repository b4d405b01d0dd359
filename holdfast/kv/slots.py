"""The slots of one slow tier (host or disk): states, contents by key, leases, least recent use.

    FREE --fill--> FILLING --filled--> HELD --drop--> FREE
                      |                  └-leave--> LEAVING --empty--> FREE
                      └-quarantine--> QUARANTINED --empty--> FREE

A HELD slot has a content that may be found; leases are copies that read it, and keep it there. A
slot in any other state but FREE is read or written by an order that is not acknowledged, and is
nobody else's until it is.

Contents are keyed by (layer group, chain key of the prefix) and found only when the page's tokens
are the same as well. Only kv.tiers may call this; it knows no device page and no request.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass

from holdfast.errors import InvariantError, require

Key = tuple[int, bytes]


class SlotState(enum.IntEnum):
    FREE = 0
    FILLING = 1  # an order writes it
    HELD = 2  # whole, summed, to be found
    LEAVING = 3  # evicted; an order still reads it
    QUARANTINED = 4  # nobody waits for it any more; an order may still write it


_FREE, _FILLING, _HELD, _LEAVING, _QUARANTINED = SlotState


@dataclass(frozen=True, slots=True)
class Entry:
    """What one page holds, wherever it is. tokens: its ids as bytes; sum: its sealed checksum;
    sealed_at: when it was sealed, on the ledger's clock."""

    key: Key
    tokens: bytes
    sum: int
    sealed_at: int = 0


class Slots:
    """`count` slots, numbered from 0. `leases[slot]`: copies in flight that read it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.state = [_FREE] * count
        self.leases = [0] * count
        self._entries: list[Entry | None] = [None] * count
        # FILLING and HELD slots by key, least recently used first.
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._free = list(range(count - 1, -1, -1))
        self.held = 0
        self.leaving = 0

    @property
    def free(self) -> int:
        return len(self._free)

    def knows(self, key: Key) -> bool:
        """Whether this content is here or on its way here."""
        return key in self._slots

    def find(self, key: Key, tokens: bytes) -> int | None:
        """The slot that holds exactly this content, now the most recently used one."""
        slot = self._slots.get(key)
        if slot is None or self.state[slot] is not _HELD or self.entry(slot).tokens != tokens:
            return None
        self._slots.move_to_end(key)
        return slot

    def entry(self, slot: int) -> Entry:
        entry = self._entries[slot]
        require(entry is not None, f"slot {slot} has no content")
        return entry

    def fill(self, entry: Entry) -> int | None:
        """A free slot that an order will write `entry` to; None when none is free."""
        require(entry.key not in self._slots, "a content is stored twice in one tier")
        if not self._free:
            return None
        slot = self._free.pop()
        self.state[slot] = _FILLING
        self._entries[slot] = entry
        self._slots[entry.key] = slot
        return slot

    def filled(self, slot: int) -> None:
        """The order is over and its sum was right."""
        self._move(slot, _FILLING, _HELD)

    def lease(self, slot: int) -> None:
        """An order reads the slot until `release`."""
        self._expect(slot, _HELD)
        self.leases[slot] += 1

    def release(self, slot: int) -> None:
        require(self.leases[slot] > 0, f"slot {slot} was released twice")
        self.leases[slot] -= 1

    def oldest(self) -> int | None:
        """The least recently used held slot that nobody reads.

        Passes over the slots of orders in flight, which are bounded.
        """
        for slot in self._slots.values():
            if self.state[slot] is _HELD and self.leases[slot] == 0:
                return slot
        return None

    def drop(self, slot: int) -> None:
        """Give a held content up."""
        self._unread(slot)
        self._move(slot, _HELD, _FREE)

    def leave(self, slot: int) -> None:
        """Give a held content up; an order reads it until `empty`."""
        self._unread(slot)
        self._move(slot, _HELD, _LEAVING)

    def quarantine(self, slot: int) -> None:
        """Nobody waits any more for the order that fills it."""
        self._move(slot, _FILLING, _QUARANTINED)

    def empty(self, slot: int) -> None:
        """No order reads or writes it any more, and what it holds is not wanted."""
        before = self.state[slot]
        require(before not in (_FREE, _HELD), f"slot {slot} is {before.name} and not in motion")
        self._move(slot, before, _FREE)

    def drop_since(self, sealed_until: int) -> None:
        """Give up every held content that was sealed later, unless an order reads it."""
        for slot in list(self._slots.values()):
            held = self.state[slot] is _HELD and self.leases[slot] == 0
            if held and self.entry(slot).sealed_at > sealed_until:
                self.drop(slot)

    def counts(self) -> dict[SlotState, int]:
        return {state: self.state.count(state) for state in SlotState}

    def verify(self) -> None:
        """Recount everything. Raises InvariantError naming what does not add up."""
        counts = self.counts()
        known = counts[_FILLING] + counts[_HELD]
        told = (len(self._free), self.leaving, self.held, len(self._slots))
        if told != (counts[_FREE], counts[_LEAVING], counts[_HELD], known):
            raise InvariantError(f"(free, leaving, held, by key) are said to be {told}: {counts}")
        require(len(set(self._free)) == len(self._free), "a slot is twice in the free list")
        for key, slot in self._slots.items():
            if self.entry(slot).key != key:
                raise InvariantError(f"slot {slot} is under another key")
        for slot, state in enumerate(self.state):
            leased, empty = self.leases[slot] != 0, self._entries[slot] is None
            if (leased and state is not _HELD) or empty != (state is _FREE):
                raise InvariantError(f"slot {slot}: {state.name}, leased {leased}, empty {empty}")

    def _expect(self, slot: int, state: SlotState) -> None:
        found = self.state[slot]
        require(found is state, f"slot {slot} is {found.name}, not {state.name}")

    def _unread(self, slot: int) -> None:
        require(self.leases[slot] == 0, f"slot {slot} is given up while a copy reads it")

    def _move(self, slot: int, before: SlotState, after: SlotState) -> None:
        self._expect(slot, before)
        self.state[slot] = after
        self.leaving += (after is _LEAVING) - (before is _LEAVING)
        self.held += (after is _HELD) - (before is _HELD)
        if before in (_FILLING, _HELD) and after is not _HELD:
            del self._slots[self.entry(slot).key]
        if after is _FREE:
            self._entries[slot] = None
            self._free.append(slot)
