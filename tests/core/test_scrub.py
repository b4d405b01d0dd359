"""The scrub: sealed pages are read again, and one that has changed is a fault of that page."""

from __future__ import annotations

import numpy as np
import pytest
from brain_driver import Driver, limits_of
from test_kept_pages import PROMPT, metric, running, sealed_pages
from test_tiers_in_the_brain import TierDriver

from holdfast.core.checks import SCRUB_PAGES
from holdfast.wire.messages import Cancel
from holdfast.wire.plan import handle_pages

RATE = 1000.0  # pages a second


class Clocked(Driver):
    """A driver with a scrub, whose steps take `step_s`."""

    def __init__(self, step_s: float = 0.05, **overrides) -> None:
        super().__init__(limits_of(**overrides), scrub_pages_s=RATE)
        self.step_s = step_s

    def launch(self) -> bool:
        self.now_s += self.step_s
        return super().launch()

    def serve(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tick()

    def finish(self) -> None:
        """Until nothing is live; an engine with a scrub is never idle for long."""
        for _ in range(2000):
            if not self.brain.live:
                break
            self.tick()
        assert not self.brain.live
        self.brain.checks.pages_s = 0.0
        self.run()

    def find(self) -> None:
        """Go on until a page is found to have changed."""
        for _ in range(50):
            if self.brain.page_faults:
                return
            self.tick()
        raise AssertionError("nobody has found it")

    def flip(self, page: int, group: int = 0) -> None:
        self.worker.pages[group][page, 0] ^= np.uint64(1)

    def page_of(self, column: int, row: int = 1, group: int = 0) -> int:
        return int(handle_pages(self.brain.scheduler.running.handles[group, row, [column]])[0])


def test_every_sealed_page_is_read_again_in_turn_and_none_twice_in_a_round():
    d = Clocked()
    d.submit(1, PROMPT)
    d.finish()
    d.brain.checks.pages_s = RATE
    count = sealed_pages(d).size
    assert 0 < count < SCRUB_PAGES
    before = len(d.plans)
    d.now_s += 1.0
    d.tick()
    (plan,) = d.plans[before:]
    assert plan.rows.size == 0
    assert sorted(handle_pages(plan.seals).tolist()) == sealed_pages(d).tolist()
    d.brain.verify()


def test_a_round_goes_on_where_the_plan_before_it_ended():
    d = Clocked(step_s=0.0, pages=129, page_tokens=1)
    d.submit(1, [3] * 100, max_tokens=2)
    d.finish()
    d.brain.checks.pages_s = RATE
    count, before = sealed_pages(d).size, len(d.plans)
    assert count > 2 * SCRUB_PAGES
    for _ in range(4):
        d.now_s += 1.0
        d.tick()
    read = np.concatenate([handle_pages(plan.seals) for plan in d.plans[before:]])
    assert np.unique(read[:count]).size == count
    assert [plan.seals.size for plan in d.plans[before:]] == [SCRUB_PAGES] * 4


def test_it_keeps_its_rate_on_an_idle_engine_and_says_when_it_is_due():
    d = Clocked(step_s=0.0)
    d.submit(1, PROMPT)
    d.finish()
    d.brain.checks.pages_s = 10.0
    d.now_s += 100.0
    d.brain.expire(d.now_s)
    assert d.brain.next_deadline_s <= d.now_s
    assert d.tick() and not d.tick()
    due_s = d.brain.next_deadline_s
    assert due_s == pytest.approx(d.now_s + SCRUB_PAGES / 10.0)
    d.now_s = due_s - 0.01
    assert not d.tick()
    d.now_s = due_s
    assert d.tick()


def test_an_engine_without_sealed_pages_or_without_a_scrub_sleeps():
    d = Clocked()
    assert d.brain.next_deadline_s is None and not d.launch()
    quiet = Driver(limits_of())
    quiet.submit(1, PROMPT)
    quiet.run()
    quiet.now_s += 1000.0
    quiet.brain.expire(quiet.now_s)
    assert quiet.brain.next_deadline_s is None and not quiet.launch()


def test_a_page_that_has_changed_costs_its_readers_a_recompute_and_others_nothing():
    d = Clocked(step_s=0.0)
    d.submit(1, PROMPT, max_tokens=30)
    d.submit(2, [7] * 20, max_tokens=30)
    running(d, 4)
    running(d, 4, request=2)
    page, other = d.page_of(2), d.brain.requests[2].row
    life = int(d.brain.scheduler.running.life[other])
    while d.pending:
        d.commit()
    said = len(d.tokens[1])
    d.flip(page)
    d.now_s += 1.0
    d.find()
    assert len(d.tokens[1]) == said, "no token of the step that found it counts"
    assert int(d.brain.scheduler.running.life[other]) == life
    d.finish()
    for request in (1, 2):
        d.check(request)
        assert len(d.tokens[request]) == 30
    assert metric(d, "pages_failed_total", "scrub") == 1
    assert metric(d, "tokens_recomputed_total") > 0
    d.check_home()


def test_the_entry_names_the_page_its_owners_and_what_was_last_done_with_it():
    d = Clocked(step_s=0.0)
    d.submit(1, PROMPT, max_tokens=30, tenant="acme")
    running(d, 6)
    page, handle = d.page_of(1), int(d.brain.scheduler.running.handles[0, 1, 1])
    sealed_at = int(d.brain.ledger.pools[0].sealed_at[page])
    d.flip(page)
    d.now_s += 1.0
    d.find()
    (entry,) = d.brain.page_faults
    assert entry["page"] == page and entry["group"] == 0 and entry["found"] == "scrub"
    assert entry["generation"] == handle >> 24 & 0xFFFF_FFFF
    assert entry["owners"] == [{"request": 1, "tenant": "acme"}]
    assert entry["sealed_at"] == sealed_at < entry["clock"]
    steps = [plan["step"] for plan in entry["plans"]]
    assert steps == sorted(steps) and len(steps) <= 8
    assert any("seals" in plan["does"] for plan in entry["plans"])
    assert any("reads" in plan["does"] and plan["requests"] == [1] for plan in entry["plans"])


def test_a_page_that_nobody_holds_is_given_up_too_and_not_found_again():
    d = Clocked(step_s=0.0)
    d.submit(1, PROMPT)
    d.finish()
    root = d.brain.ledger.index.root(b"\0")
    tokens = np.array(PROMPT, np.int32)
    hits = d.brain.ledger.find(root, tokens, 6)[0]
    d.brain.checks.pages_s = RATE
    d.flip(int(handle_pages(hits[3:4])[0]))
    d.now_s += 1.0
    d.tick()
    assert d.brain.ledger.find(root, tokens, 6)[0].tolist() == hits[:3].tolist()
    d.brain.verify()
    d.submit(2, [*PROMPT, 1])
    d.finish()
    d.check(2)
    assert d.cached[2] == 12


def test_a_changed_page_of_a_window_costs_its_readers_a_recompute():
    d = Clocked(step_s=0.0, windows=(0, 16), pages=65)
    d.submit(1, PROMPT, max_tokens=30)
    running(d, 4)
    while d.pending:
        d.commit()
    d.flip(d.page_of(5, group=1), group=1)
    d.now_s += 1.0
    d.find()
    assert d.brain.page_faults[0]["group"] == 1
    d.finish()
    d.check(1)
    d.check_home()


def test_a_row_that_computed_behind_its_own_changed_page_leaves_nothing_under_its_twin():
    d = Clocked(step_s=0.0, rows_max=4, prefill_tokens=64)
    # Both are admitted before either is shared: each computes its own pages.
    d.submit(1, PROMPT, max_tokens=40)
    d.submit(2, [*PROMPT, *range(40, 52)], max_tokens=40)
    running(d, 20)
    run = d.brain.scheduler.running
    rows = [d.brain.requests[request].row for request in (1, 2)]
    (twin,) = [row for row in rows if run.chains[row].borrowed]
    page = d.page_of(1, row=twin)
    assert not d.brain.ledger.index.indexed[page]
    while d.pending:
        d.commit()
    own = {
        one
        for one in run.handles[0, twin, 2 : run.pages_len[twin]].tolist()
        if d.brain.ledger.is_sealed(one)
    }
    assert own & set(d.brain.ledger.index.handles()), "what only this row computed is shared"
    d.flip(page)
    d.now_s += 1.0
    d.find()
    assert not own & set(d.brain.ledger.index.handles())
    d.finish()
    for request in (1, 2):
        d.check(request)
    d.check_home()


def test_a_request_that_left_while_its_page_was_read_is_no_trouble():
    d = Clocked(step_s=0.0)
    d.submit(1, PROMPT, max_tokens=30)
    running(d, 4)
    d.flip(d.page_of(2))
    d.now_s += 1.0
    d.launch()
    d.brain.receive(0, Cancel((1,)), d.now_s)
    d.finish()
    assert metric(d, "pages_failed_total", "scrub") == 1
    d.check_home()


def test_a_store_whose_sum_is_wrong_is_a_fault_of_the_page():
    d = TierDriver(pages=17)
    d.submit(1, PROMPT[:17], 12)
    while not d.copies:
        d.tick()
    ticket = d.copies[0].ticket
    copy = d.brain.tiers._copies[ticket]
    d.worker.pages[0][copy.handle & 0xFF_FFFF, 0] ^= np.uint64(1)
    d.copy_all()
    assert metric(d, "pages_failed_total", "store") == 1
    assert not d.brain.ledger.is_sealed(copy.handle)
    assert [entry["found"] for entry in d.brain.page_faults] == ["store"]
    d.settle()
    d.check(1)
    d.check_home()


def test_a_store_that_failed_says_nothing_of_its_page():
    d = TierDriver(pages=17)
    d.submit(1, PROMPT[:17], 12)
    while not d.copies:
        d.tick()
    handle = d.brain.tiers._copies[d.copies[0].ticket].handle
    d.copy_all(failed=True)
    assert d.brain.ledger.is_sealed(handle) and not d.brain.page_faults


def test_the_scrub_passes_over_pages_that_a_copy_reads():
    d = TierDriver(pages=17)
    d.submit(1, PROMPT[:17], 12)
    while not d.copies:
        d.tick()
    lent = d.brain.ledger.lent.copy()
    assert lent.any()
    d.brain.checks.pages_s = RATE
    d.now_s += 1.0
    before = len(d.plans)
    d.launch()
    for plan in d.plans[before:]:
        assert not lent[handle_pages(plan.seals)].any()
    d.brain.verify()
