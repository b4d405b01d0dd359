"""The ledger: counts add up, leases drop once, nothing is reused while a step may touch it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from holdfast.config import Limits
from holdfast.errors import InvariantError
from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.wire.plan import handle_generations, handle_pages

PAGES = 13


def ledger_of(pages: int = PAGES) -> Ledger:
    return Ledger(Limits(vocab_size=9, context_tokens=64, page_tokens=2, pages=pages))


def reserve(ledger: Ledger, count: int) -> np.ndarray | None:
    """uint64[count]: the handles of group 0, the only one here."""
    handles = ledger.reserve(count)
    return None if handles is None else handles[0]


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def sealed(ledger: Ledger, root: int, tokens: np.ndarray) -> np.ndarray:
    """A row computed `tokens` and its pages are sealed and shared; returns its leased handles."""
    handles = reserve(ledger, tokens.size // 2)
    assert handles is not None
    ledger.launch(handles[None])
    ledger.seal(handles, np.arange(handles.size, dtype=np.uint64))
    parent: int | None = root
    for at, handle in enumerate(handles.tolist()):
        assert parent is not None
        parent = ledger.share(handle, parent, tokens[2 * at : 2 * at + 2].tobytes())
    return handles


def test_the_trash_page_is_never_handed_out():
    ledger = ledger_of()
    handles = reserve(ledger, PAGES - 1)
    assert handles is not None
    assert 0 not in handle_pages(handles)
    assert reserve(ledger, 1) is None


def test_a_released_page_has_no_new_owner_before_its_step_is_acknowledged():
    ledger = ledger_of()
    handles = reserve(ledger, PAGES - 1)
    assert handles is not None
    ledger.launch(handles[None])
    ledger.release(handles, step=5)
    ledger.acknowledge(4)
    assert reserve(ledger, 1) is None
    ledger.acknowledge(5)
    again = reserve(ledger, PAGES - 1)
    assert again is not None
    assert (handle_generations(again) > handle_generations(handles)).all()


def test_a_stale_handle_is_refused_by_every_verb():
    ledger = ledger_of()
    handles = reserve(ledger, 2)
    assert handles is not None
    ledger.release(handles, step=0)
    for verb in (
        lambda: ledger.launch(handles[None]),
        lambda: ledger.acquire(handles),
        lambda: ledger.release(handles, 0),
        lambda: ledger.seal(handles, np.zeros(2, np.uint64)),
        lambda: ledger.share(int(handles[0]), -1, b""),
    ):
        with pytest.raises(InvariantError):
            verb()


def test_a_lease_released_twice_is_refused_or_found_at_the_acknowledgement():
    ledger = ledger_of()
    handles = reserve(ledger, 1)
    assert handles is not None
    ledger.release(handles, step=3)
    ledger.release(handles, step=3)
    with pytest.raises(InvariantError):
        ledger.acknowledge(3)


def test_a_page_that_is_not_sealed_is_never_shared():
    ledger = ledger_of()
    handles = reserve(ledger, 1)
    assert handles is not None
    ledger.launch(handles[None])
    with pytest.raises(InvariantError):
        ledger.share(int(handles[0]), ledger.index.root(b""), b"")


def test_a_prefix_is_found_only_under_its_own_tag_and_parent():
    ledger = ledger_of()
    root, other = ledger.index.root(b"a"), ledger.index.root(b"b")
    handles = sealed(ledger, root, tokens_of(1, 2, 3, 4))
    assert ledger.find(root, tokens_of(1, 2, 3, 4, 5), 2)[0].tolist() == handles.tolist()
    assert ledger.find(root, tokens_of(1, 2, 9, 4), 2)[0].tolist() == handles[:1].tolist()
    assert ledger.find(root, tokens_of(3, 4), 1)[0].size == 0
    assert ledger.find(other, tokens_of(1, 2, 3, 4), 2)[0].size == 0


def test_released_sealed_pages_stay_cached_until_room_is_needed():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    handles = sealed(ledger, root, tokens_of(1, 2, 3, 4))
    ledger.release(handles, 1)
    ledger.acknowledge(1)
    assert ledger.cached == 2 and ledger.available() == PAGES - 1
    assert ledger.find(root, tokens_of(1, 2, 3, 4), 2)[0].size == 2
    assert reserve(ledger, PAGES - 1) is not None
    assert ledger.find(root, tokens_of(1, 2, 3, 4), 2)[0].size == 0
    ledger.verify()


def test_leaves_are_evicted_before_their_parents_and_old_before_new():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    old = sealed(ledger, root, tokens_of(1, 2, 3, 4))
    ledger.release(old, 1)
    ledger.acknowledge(1)
    new = sealed(ledger, root, tokens_of(5, 6, 7, 8))
    ledger.release(new, 2)
    ledger.acknowledge(2)
    held = reserve(ledger, ledger.pools[0].free + 1)
    assert held is not None
    assert ledger.find(root, tokens_of(1, 2, 3, 4), 2)[0].tolist() == old[:1].tolist()
    assert ledger.find(root, tokens_of(5, 6, 7, 8), 2)[0].tolist() == new.tolist()


def test_leased_pages_are_never_evicted():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    handles = sealed(ledger, root, tokens_of(1, 2, 3, 4))
    assert reserve(ledger, PAGES - 1) is None
    assert ledger.find(root, tokens_of(1, 2, 3, 4), 2)[0].tolist() == handles.tolist()


def test_equal_pages_are_shared_through_the_first_and_the_second_stays_private():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    first = sealed(ledger, root, tokens_of(1, 2))
    twin = reserve(ledger, 1)
    assert twin is not None
    ledger.launch(twin[None])
    ledger.seal(twin, np.zeros(1, np.uint64))
    assert ledger.share(int(twin[0]), root, tokens_of(1, 2).tobytes()) == int(first[0])
    ledger.release(twin, 0)
    assert ledger.pools[0].state[handle_pages(twin)[0]] == PageState.FREE


def test_reset_makes_every_page_free_and_every_handle_stale():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    handles = sealed(ledger, root, tokens_of(1, 2))
    ledger.release(reserve(ledger, 3), 9)
    ledger.reset()
    ledger.verify()
    assert ledger.available() == PAGES - 1 and ledger.retiring == 0
    assert ledger.find(root, tokens_of(1, 2), 1)[0].size == 0
    with pytest.raises(InvariantError):
        ledger.acquire(handles)


def test_blocked_admissions_do_not_grow_the_eviction_heap_for_ever():
    ledger = ledger_of()
    root = ledger.index.root(b"")
    ledger.release(sealed(ledger, root, tokens_of(1, 2)), 0)
    for _ in range(1000):
        hits = ledger.find(root, tokens_of(1, 2), 1)[0]
        ledger.acquire(hits)
        ledger.release(hits, 0)
    assert ledger.index.offered() <= 4 * PAGES + 1


class LedgerMachine(RuleBasedStateMachine):
    """Rows reserve, seal, share and release in any order; a model knows who may touch what."""

    rows = Bundle("rows")

    @initialize()
    def start(self) -> None:
        self.ledger = ledger_of()
        self.step = 1
        self.acknowledged = 0
        self.touched: dict[int, int] = {}  # page -> last step that may touch it
        self.root = self.ledger.index.root(b"")

    @rule(target=rows, count=st.integers(1, 4), seed=st.integers(0, 3))
    def admit(self, count: int, seed: int):
        tokens = tokens_of(*[(seed * at) % 3 for at in range(2 * count)])
        hits = self.ledger.find(self.root, tokens, count - 1)[0]
        self.ledger.acquire(hits)
        handles = reserve(self.ledger, count - hits.size)
        if handles is None:
            self.ledger.release(hits, 0)
            return multiple()
        for page in handle_pages(handles).tolist():
            assert self.touched.get(page, 0) <= self.acknowledged, "reused while in flight"
        self.ledger.launch(handles[None])
        everything = np.concatenate([hits, handles])
        for page in handle_pages(everything).tolist():
            self.touched[page] = self.step
        return (everything, hits.size, tokens)

    @rule(row=consumes(rows), seal=st.booleans())
    def finish(self, row, seal: bool) -> None:
        handles, hits, tokens = row
        own = handles[hits:]
        if seal:
            self.ledger.seal(own, np.zeros(own.size, np.uint64))
            parent: int | None = int(handles[hits - 1]) if hits else self.root
            for at, handle in enumerate(own.tolist(), hits):
                if parent is not None and parent in (self.root, *handles.tolist()):
                    text = tokens[2 * at : 2 * at + 2].tobytes()
                    parent = self.ledger.share(handle, parent, text)
        for page in handle_pages(handles).tolist():
            self.touched[page] = self.step
        self.ledger.release(handles, self.step)

    @rule()
    def launch(self) -> None:
        self.step += 1

    @rule()
    def acknowledge(self) -> None:
        if self.acknowledged < self.step:
            self.acknowledged += 1
            self.ledger.acknowledge(self.acknowledged)

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.verify()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.acknowledge(self.step)
            self.ledger.verify()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
