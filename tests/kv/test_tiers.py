"""Tiers and slots: who may touch which slot, what is found again, what is never used."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.config import Limits
from holdfast.errors import InvariantError, OptionError
from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.kv.slots import Entry, Slots, SlotState
from holdfast.kv.tiers import Tiers
from holdfast.wire.copies import (
    COPY_FAILED,
    COPY_OK,
    FETCH,
    LOAD,
    RESET,
    SPILL,
    STORE,
    CopyAcks,
    MoveOrders,
)

PAGE = 4


def limits_of(**overrides) -> Limits:
    base = {
        "vocab_size": 100,
        "context_tokens": 64,
        "page_tokens": PAGE,
        "pages": 17,
        "live_tokens": 1 << 12,
        "host_pages": 4,
        "copies_max": 8,
        "copy_timeout_s": 5.0,
    }
    return Limits(**(base | overrides))


def reserve(ledger: Ledger, count: int) -> np.ndarray | None:
    """uint64[count]: the handles of group 0, the only one here."""
    handles = ledger.reserve(count)
    return None if handles is None else handles[0]


class Bench:
    """A ledger, its tiers, and acknowledgements by hand. Page i of prompt p has the sum of it."""

    def __init__(self, **overrides) -> None:
        self.limits = limits_of(**overrides)
        self.ledger = Ledger(self.limits)
        self.tiers = Tiers(self.limits, self.ledger, life=3)
        self.root = self.ledger.index.root(b"tag")
        self.sums: dict[int, int] = {}  # ticket -> what its copy will carry

    def tokens(self, prompt: int, pages: int) -> np.ndarray:
        return np.arange(prompt, prompt + pages * PAGE, dtype=np.int32) % 50

    def compute(self, prompt: int, pages: int) -> np.ndarray:
        """Sealed and shared pages of a row that has left: cached, and offered to the host."""
        tokens = self.tokens(prompt, pages).reshape(pages, PAGE)
        handles = reserve(self.ledger, pages)
        assert handles is not None
        self.ledger.launch(handles[None])
        self.ledger.seal(handles, np.arange(pages, dtype=np.uint64) + np.uint64(prompt * 100))
        parent = self.root
        for handle, page in zip(handles.tolist(), tokens, strict=True):
            parent = self.ledger.share(handle, parent, page.tobytes())
            assert parent == handle
            self.tiers.offer(handle, page.tobytes())
        self.ledger.release(handles, 0)
        self.verify()
        return handles

    def forget_device(self) -> None:
        """Other work takes every page of the device."""
        handles = reserve(self.ledger, self.ledger.available())
        assert handles is not None
        self.ledger.release(handles, 0)

    def copies(self, now_s: float = 0.0) -> list[tuple[int, int, int, int]]:
        return [
            (int(c["ticket"]), int(c["kind"]), int(c["slot"]), int(c["handle"]))
            for c in self.tiers.take_copies(now_s)
        ]

    def moves(self, now_s: float = 0.0) -> list[tuple[int, int, int, int]]:
        return [
            (int(m["ticket"]), int(m["kind"]), int(m["slot"]), int(m["block"]))
            for m in self.tiers.take_moves(now_s)
        ]

    def ack(self, ticket: int, total: int, status: int = COPY_OK, epoch: int = 1) -> CopyAcks:
        return CopyAcks(
            epoch=epoch,
            tickets=np.array([ticket], np.uint64),
            status=np.array([status], np.uint8),
            sums=np.array([total], np.uint64),
        )

    def stored(self, prompt: int, pages: int) -> None:
        """Compute pages and see all of them stored."""
        self.compute(prompt, pages)
        for at, (ticket, kind, _, _) in enumerate(self.copies()):
            assert kind == STORE
            self.tiers.copied(self.ack(ticket, prompt * 100 + at))
        self.verify()

    def reset(self) -> None:
        ((ticket, kind, _, _),) = self.moves()
        assert kind == RESET
        self.tiers.moved(self.ack(ticket, 0, epoch=3))

    def bring(self, prompt: int, pages: int, waiter: object = "waiter") -> bool:
        tokens = self.tokens(prompt, pages)
        hits = self.ledger.find(self.root, tokens, pages)[0]
        self.ledger.acquire(hits)
        parent = int(hits[-1]) if hits.size else self.root
        room = self.ledger.available()
        taken = self.tiers.bring(waiter, hits, parent, tokens[hits.size * PAGE :], room)
        if not taken:
            self.ledger.release(hits, 0)
        self.verify()
        return taken

    def cached(self, prompt: int, pages: int) -> int:
        return self.ledger.find(self.root, self.tokens(prompt, pages), pages)[0].size

    def verify(self) -> None:
        self.ledger.verify()
        self.tiers.verify()


def test_a_stored_page_comes_back_after_the_device_forgot_it():
    bench = Bench()
    bench.stored(1, 3)
    bench.forget_device()
    assert bench.cached(1, 3) == 0
    assert bench.bring(1, 3)
    loads = bench.copies()
    assert [kind for _, kind, _, _ in loads] == [LOAD] * 3
    woken = []
    for at, (ticket, _, _, handle) in enumerate(loads):
        assert not woken
        assert bench.ledger.pools[0].state[handle & 0xFFFFFF] == PageState.LOADING
        assert bench.cached(1, 3) == 0, "a page is shared before its load is over"
        woken = bench.tiers.copied(bench.ack(ticket, 100 + at))
        bench.verify()
    assert woken == ["waiter"]
    assert bench.cached(1, 3) == 3
    assert bench.ledger.held() == 0


def test_a_page_that_is_stored_has_no_new_owner_before_the_acknowledgement():
    bench = Bench()
    handles = bench.compute(1, 2)
    assert bench.ledger.available() == bench.limits.pages_usable - 2
    taken = reserve(bench.ledger, bench.ledger.available())
    assert not np.isin(handles, taken).any()
    for at, (ticket, _, _, _) in enumerate(bench.copies()):
        bench.tiers.copied(bench.ack(ticket, 100 + at))
    bench.verify()
    assert bench.ledger.available() == 2


def test_a_page_that_is_stored_does_not_hold_back_the_pages_above_it():
    bench = Bench()
    bench.stored(1, 1)
    tokens = bench.tokens(1, 2)
    (first,) = bench.ledger.find(bench.root, tokens, 1)[0].tolist()
    child = reserve(bench.ledger, 1)
    bench.ledger.launch(child[None])
    bench.ledger.seal(child, np.array([7], np.uint64))
    bench.ledger.share(int(child[0]), first, tokens[PAGE:].tobytes())
    bench.tiers.offer(int(child[0]), tokens[PAGE:].tobytes())
    bench.ledger.release(child, 0)
    assert bench.ledger.cached == 1
    assert reserve(bench.ledger, bench.ledger.available()) is not None
    bench.verify()


@pytest.mark.parametrize(("status", "change"), [(COPY_OK, 1), (COPY_FAILED, 0)])
def test_bytes_that_are_not_what_was_sealed_are_never_shared(status, change):
    bench = Bench()
    bench.stored(1, 3)
    bench.forget_device()
    bench.bring(1, 3)
    (a, b, c) = bench.copies()
    bench.tiers.copied(bench.ack(a[0], 100))
    bench.tiers.copied(bench.ack(c[0], 102))
    assert bench.tiers.copied(bench.ack(b[0], 101 + change, status)) == ["waiter"]
    assert bench.cached(1, 3) == 1, "only what is before the bad page can be used"
    (spoiled,) = bench.tiers.spoiled
    assert spoiled.tolist() == [b[3]], "its bytes are zeroed before the page is free"
    assert bench.tiers.host.held == 2
    bench.ledger.release(spoiled, 0)
    bench.verify()
    assert bench.ledger.held() == 0


def test_a_page_is_not_offered_twice():
    bench = Bench()
    bench.stored(1, 2)
    bench.forget_device()
    bench.compute(1, 2)
    assert bench.copies() == []


def test_a_full_host_gives_its_least_recently_used_slot_up():
    bench = Bench(host_pages=2)
    bench.stored(1, 1)
    bench.stored(11, 1)
    bench.forget_device()
    assert bench.bring(1, 1)  # used again
    for ticket, _, _, _ in bench.copies():
        bench.tiers.copied(bench.ack(ticket, 100))
    bench.stored(21, 1)
    bench.forget_device()
    assert bench.bring(1, 1)
    assert not bench.bring(11, 1)


def test_a_slot_that_a_load_reads_is_nobody_elses():
    bench = Bench(host_pages=1)
    bench.stored(1, 1)
    bench.forget_device()
    assert bench.bring(1, 1)
    bench.compute(11, 1)
    assert bench.tiers.counts["skip", "full"] == 1
    assert [kind for _, kind, _, _ in bench.copies()] == [LOAD]


def test_copies_in_flight_are_bounded():
    bench = Bench(host_pages=16, copies_max=3)
    bench.compute(1, 5)
    assert len(bench.copies()) == 3
    assert bench.tiers.counts["skip", "busy"] == 2


def test_a_load_is_cut_to_the_room_there_is():
    bench = Bench()
    bench.stored(1, 4)
    bench.forget_device()
    held = reserve(bench.ledger, bench.limits.pages_usable - 2)
    assert held is not None
    assert bench.bring(1, 4)
    assert len(bench.copies()) == 2


def test_a_page_that_changes_while_the_rest_of_its_load_is_on_its_way_is_not_shared():
    bench = Bench()
    bench.stored(1, 3)
    bench.forget_device()
    assert bench.bring(1, 3)
    orders = [(ticket, handle) for ticket, _, _, handle in bench.copies()]
    for at, (ticket, _) in enumerate(orders[:2]):
        assert bench.tiers.copied(bench.ack(ticket, 100 + at)) == []
    bench.ledger.drop({orders[1][1]})  # The scrub has read it again.
    bench.verify()
    assert bench.tiers.copied(bench.ack(orders[2][0], 102)) == ["waiter"]
    assert bench.cached(1, 3) == 1
    bench.verify()


def test_a_second_request_for_the_same_pages_waits_for_the_same_load():
    bench = Bench()
    bench.stored(1, 2)
    bench.forget_device()
    assert bench.bring(1, 2, "one") and bench.bring(1, 2, "other")
    first, second = bench.copies()
    bench.tiers.copied(bench.ack(first[0], 100))
    assert bench.tiers.copied(bench.ack(second[0], 101)) == ["one", "other"]


def test_a_page_is_known_by_all_that_came_before_it():
    bench = Bench()
    same = np.zeros(2 * PAGE, np.int32)
    bench.stored(1, 1)
    handles = reserve(bench.ledger, 1)
    bench.ledger.launch(handles[None])
    bench.ledger.seal(handles, np.array([5], np.uint64))
    bench.ledger.share(int(handles[0]), bench.root, same[:PAGE].tobytes())
    bench.tiers.offer(int(handles[0]), same[:PAGE].tobytes())
    ((ticket, _, _, _),) = bench.copies()
    bench.tiers.copied(bench.ack(ticket, 5))
    found = bench.tiers._walk(bench.root, same.tobytes())
    assert len(found) == 1, "the second page has the same tokens behind other ones"
    other = bench.ledger.index.root(b"other tag")
    assert bench.tiers._walk(other, same.tobytes()) == []


def test_equal_keys_with_other_tokens_are_not_found():
    slots = Slots(1)
    slot = slots.fill(Entry((0, b"key"), b"tokens", 1))
    slots.filled(slot)
    assert slots.find((0, b"key"), b"others") is None
    assert slots.find((0, b"key"), b"tokens") == slot


# --- disk ---


def on_disk() -> Bench:
    """Prompt 1's page is on disk alone, the host's two slots hold prompts 11 and 21."""
    bench = Bench(host_pages=2, disk_pages=2)
    bench.reset()
    bench.stored(1, 1)
    bench.stored(11, 1)
    bench.compute(21, 1)  # finds no free slot, and has the oldest spilled
    ((ticket, kind, _, _),) = bench.moves()
    assert kind == SPILL
    bench.tiers.moved(bench.ack(ticket, 100, epoch=3))
    bench.verify()
    bench.forget_device()
    return bench


def test_nothing_is_stored_before_the_mover_said_that_older_orders_are_over():
    bench = Bench(disk_pages=2)
    bench.compute(1, 1)
    assert bench.copies() == []
    ((ticket, _, _, _),) = bench.moves()
    bench.tiers.moved(bench.ack(ticket, 0, epoch=2))  # an answer to the core before this one
    assert not bench.tiers.ready
    assert bench.tiers.counts["stale", ""] == 1
    bench.tiers.moved(bench.ack(ticket, 0, epoch=3))
    assert bench.tiers.ready


def test_a_spilled_slot_is_free_only_when_its_bytes_are_on_disk():
    bench = Bench(host_pages=1, disk_pages=2)
    bench.reset()
    bench.stored(1, 1)
    bench.compute(11, 1)
    assert bench.tiers.host.counts()[SlotState.LEAVING] == 1
    assert bench.copies() == []
    ((ticket, _, _, _),) = bench.moves()
    bench.tiers.moved(bench.ack(ticket, 100, epoch=3))
    assert bench.tiers.host.free == 1 and bench.tiers.disk.held == 1
    bench.verify()


def test_a_page_comes_back_from_disk_through_the_host():
    bench = on_disk()
    assert bench.bring(1, 1)
    assert bench.copies() == []
    moves = bench.moves()
    ticket = next(ticket for ticket, kind, _, _ in moves if kind == FETCH)
    assert bench.tiers.moved(bench.ack(ticket, 100, epoch=3)) == ["waiter"]
    assert bench.bring(1, 1)
    ((ticket, kind, _, _),) = bench.copies()
    assert kind == LOAD
    bench.tiers.copied(bench.ack(ticket, 100))
    assert bench.cached(1, 1) == 1


def test_a_corrupt_block_is_dropped_and_never_held_by_the_host():
    bench = on_disk()
    bench.bring(1, 1)
    ticket = next(ticket for ticket, kind, _, _ in bench.moves() if kind == FETCH)
    assert bench.tiers.moved(bench.ack(ticket, 99, epoch=3)) == ["waiter"]
    assert bench.tiers.counts["failure", "bad_sum"] == 1
    assert not bench.bring(1, 1)


def test_the_slot_of_a_late_fetch_is_out_of_use_until_the_move_is_over():
    bench = on_disk()
    bench.bring(1, 1)
    moves = bench.moves(now_s=10.0)
    ticket, slot = next((t, s) for t, kind, s, _ in moves if kind == FETCH)
    assert bench.tiers.next_deadline_s(worker=True) == 15.0
    assert bench.tiers.expire(14.9) == []
    assert bench.tiers.expire(15.0) == ["waiter"]
    bench.verify()
    assert bench.tiers.host.state[slot] is SlotState.QUARANTINED
    assert not bench.bring(1, 1), "nobody waits for it a second time"
    assert bench.tiers.moved(bench.ack(ticket, 100, epoch=3)) == []
    assert bench.tiers.host.state[slot] is SlotState.FREE
    bench.verify()
    assert bench.bring(1, 1)


# --- epochs ---


def test_a_new_epoch_frees_what_stores_filled_and_keeps_what_the_host_holds():
    bench = Bench()
    bench.stored(1, 2)
    bench.compute(11, 1)
    bench.forget_device()
    bench.bring(1, 2)
    tickets = [ticket for ticket, _, _, _ in bench.copies()]
    assert len(tickets) == 3
    assert bench.tiers.new_epoch() == ["waiter"]
    bench.ledger.reset()
    bench.verify()
    assert (bench.tiers.host.held, bench.tiers.host.free) == (2, 2)
    assert bench.tiers.copied(bench.ack(tickets[0], 1100)) == []
    assert bench.tiers.counts["stale", ""] == 1
    assert bench.bring(1, 2)


def test_a_copy_is_late_after_its_time_out_and_not_before_a_plan_took_it():
    bench = Bench()
    bench.compute(1, 1)
    assert bench.tiers.late_copy(1e9) is None
    ((ticket, _, _, _),) = bench.copies(now_s=10.0)
    assert bench.tiers.late_copy(14.9) is None
    assert bench.tiers.late_copy(15.0) == ticket
    assert bench.tiers.next_deadline_s(worker=True) == 15.0
    assert bench.tiers.next_deadline_s(worker=False) == float("inf")


# --- slots, options, frames ---


def test_a_slot_goes_only_where_its_table_allows():
    slots = Slots(2)
    slot = slots.fill(Entry((0, b"a"), b"", 0))
    for wrong in (slots.drop, slots.leave, slots.lease):
        with pytest.raises(InvariantError, match="FILLING"):
            wrong(slot)
    slots.filled(slot)
    slots.lease(slot)
    with pytest.raises(InvariantError, match="while a copy reads it"):
        slots.drop(slot)
    slots.release(slot)
    slots.leave(slot)
    assert slots.find((0, b"a"), b"") is None
    slots.empty(slot)
    with pytest.raises(InvariantError, match="FREE"):
        slots.empty(slot)
    slots.verify()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host_pages": 0, "disk_pages": 1}, "--disk-pages"),
        ({"host_pages": -1}, "--host-pages"),
        ({"disk_pages": 4, "copies_max": 1}, "--copies-max"),
        ({"copies_max": 5000}, "--copies-max"),
        ({"copy_timeout_s": 0.0}, "--copy-timeout-s"),
    ],
)
def test_an_impossible_size_of_a_tier_is_refused_by_its_option_s_name(options, named):
    with pytest.raises(OptionError) as error:
        limits_of(**options)
    assert error.value.option == named


def test_orders_and_acknowledgements_survive_their_frames():
    bench = on_disk()
    bench.bring(1, 1)
    orders = MoveOrders(life=3, moves=bench.tiers.take_moves(0.0))
    again = MoveOrders.decode(orders.encode())
    assert again.life == 3 and (again.moves == orders.moves).all() and again.moves.size
    ack = bench.ack(7, (1 << 64) - 1, COPY_FAILED, epoch=9)
    back = CopyAcks.decode(ack.encode())
    assert (back.epoch, back.tickets[0], back.status[0], int(back.sums[0])) == (
        9,
        7,
        COPY_FAILED,
        (1 << 64) - 1,
    )


def sealed_late(bench: Bench, pages: int) -> int:
    """Two prompts stored, the second `pages` long and after the moment that is returned."""
    bench.stored(1, 2)
    bench.ledger.acknowledge(1)
    moment = bench.ledger.clock
    bench.ledger.acknowledge(2)
    bench.stored(9, pages)
    return moment


def test_what_was_sealed_after_a_moment_goes_from_the_host_too():
    bench = Bench()
    moment = sealed_late(bench, 1)
    assert bench.tiers.host.held == 3
    bench.tiers.new_epoch(moment)
    assert bench.tiers.host.held == 2
    bench.ledger.reset()
    bench.verify()
    assert not bench.bring(9, 1)
    assert bench.bring(1, 2)


def test_a_spill_of_what_bad_weights_computed_leaves_nothing_on_disk():
    bench = Bench(host_pages=1, disk_pages=2)
    bench.reset()
    bench.ledger.acknowledge(1)
    bench.stored(1, 1)
    bench.compute(11, 1)
    ((ticket, kind, _, _),) = bench.moves()
    assert kind == SPILL
    bench.tiers.new_epoch(0)
    bench.ledger.reset()
    bench.tiers.moved(bench.ack(ticket, 100, epoch=3))
    bench.verify()
    assert bench.tiers.host.held == bench.tiers.disk.held == 0


def test_a_fetch_of_what_bad_weights_computed_leaves_nothing_in_the_host():
    bench = on_disk()
    bench.bring(1, 1)
    ticket = next(ticket for ticket, kind, _, _ in bench.moves() if kind == FETCH)
    bench.tiers.new_epoch(-1)
    bench.ledger.reset()
    bench.tiers.moved(bench.ack(ticket, 100, epoch=3))
    bench.verify()
    assert bench.tiers.host.held == bench.tiers.disk.held == 0


# --- memory that is lost ---


def lost(bench: Bench) -> list[object]:
    """The keeper died: who waited for its tiers."""
    waiters = bench.tiers.reset()
    bench.ledger.reset()
    bench.verify()
    return waiters


def spilling() -> tuple[Bench, int]:
    """A prompt's page is on its way from the host to the disk; the ticket of that move."""
    bench = Bench(host_pages=1, disk_pages=2)
    bench.reset()
    bench.stored(1, 1)
    bench.compute(11, 1)
    ((ticket, kind, _, _),) = bench.moves()
    assert kind == SPILL
    return bench, ticket


def test_nothing_that_host_or_disk_held_is_found_in_new_memory():
    bench = on_disk()
    assert (bench.tiers.host.held, bench.tiers.disk.held) == (1, 1)
    assert lost(bench) == []
    assert (bench.tiers.host.held, bench.tiers.disk.held) == (0, 0)
    bench.reset()
    assert not bench.bring(1, 1) and not bench.bring(11, 1)


def test_the_places_of_a_spill_that_a_dead_keeper_had_are_used_again():
    bench, _ = spilling()
    lost(bench)
    assert (bench.tiers.host.free, bench.tiers.disk.free) == (1, 2)
    bench.reset()
    bench.stored(1, 1)
    assert bench.tiers.host.held == 1


def test_who_waits_for_a_fetch_of_a_dead_keeper_goes_on_without_it():
    bench = on_disk()
    assert bench.bring(1, 1)
    assert FETCH in {kind for _, kind, _, _ in bench.moves()}
    assert lost(bench) == ["waiter"]
    assert (bench.tiers.host.free, bench.tiers.disk.free) == (2, 2)


def test_nothing_is_stored_in_new_memory_before_its_mover_said_that_it_is_idle():
    bench, old = spilling()
    lost(bench)
    ((ticket, kind, _, _),) = bench.moves()
    assert kind == RESET
    bench.compute(1, 1)
    assert bench.copies() == []
    bench.tiers.moved(bench.ack(old, 100, epoch=3))  # said before its end, or of the new memory
    assert not bench.tiers.ready and bench.tiers.disk.held == 0
    bench.tiers.moved(bench.ack(ticket, 0, epoch=3))
    assert bench.tiers.ready
    bench.stored(11, 1)
    assert bench.tiers.host.held == 1


def test_an_answer_to_the_reset_before_the_memory_was_lost_says_nothing_of_the_new_one():
    bench = Bench(disk_pages=2)
    ((first, _, _, _),) = bench.moves()
    lost(bench)
    bench.tiers.moved(bench.ack(first, 0, epoch=3))
    assert not bench.tiers.ready
    bench.reset()
    assert bench.tiers.ready
