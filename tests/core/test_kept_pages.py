"""Sealed pages outlive a worker: verified first, hit by the requests that recover, dropped if not
what they were."""

from __future__ import annotations

import numpy as np
import pytest
from brain_driver import Driver, limits_of

from holdfast.core import checks
from holdfast.errors import WorkerFault
from holdfast.kv.pages import PageState
from holdfast.sim.fake_worker import NOT_FINITE, FakeWorker
from holdfast.wire.messages import Memory
from holdfast.wire.plan import handle_pages

PROMPT = list(range(100, 124))  # six pages of 4


def running(d: Driver, tokens: int, request: int = 1) -> None:
    while len(d.tokens.get(request, [])) < tokens:
        assert d.tick()


def metric(d: Driver, name: str, *labels: str) -> float:
    d.brain.gauges.publish(0)
    return d.metrics.get(name, labels)


def started(**overrides) -> Driver:
    """One request in the middle of its output, its prompt sealed long ago."""
    d = Driver(limits_of(**overrides))
    d.submit(1, PROMPT, max_tokens=40)
    running(d, 12)
    return d


def sealed_pages(d: Driver, group: int = 0) -> np.ndarray:
    return np.flatnonzero(d.brain.ledger.pools[group].state == PageState.SEALED)


def test_a_recovered_request_finds_its_own_pages_and_goes_on_with_the_same_tokens():
    d = started()
    length = len(PROMPT) + len(d.tokens[1])
    d.replace_worker(2, memory=Memory.KEPT)
    assert metric(d, "pages_kept_total") >= 6
    d.run()
    d.check(1)
    assert len(d.tokens[1]) == 40
    (admit,) = [plan.admits for plan in d.plans if plan.epoch == 2 and plan.admits.size]
    assert admit["length"][0] >= 24, "at least the prompt was hit"
    assert metric(d, "pages_verified_total") == metric(d, "pages_kept_total")
    # What was computed before and is not hit: the unsealed end of it.
    assert 0 < metric(d, "tokens_recomputed_total") <= length - 24
    d.check_home()


def test_the_first_plans_of_an_epoch_read_what_was_kept_and_compute_nothing():
    d = started()
    d.brain.checks.verify_pages = 2
    d.replace_worker(2, memory=Memory.KEPT)
    kept = d.brain.ledger.unverified
    before = len(d.plans)
    d.launch()
    d.launch()
    assert d.brain.in_flight == 2
    for plan in d.plans[before:]:
        assert plan.rows.size == 0 and plan.seals.size == 2
    while d.brain.ledger.unverified:
        assert not d.plans[-1].rows.size
        d.tick()
    read = np.concatenate([p.seals for p in d.plans[before:] if not p.rows.size])
    assert read.size == np.unique(read).size == kept
    d.run()
    d.check(1)


def test_nobody_is_admitted_while_the_last_result_of_verification_is_missing():
    d = started()
    d.replace_worker(2, memory=Memory.KEPT)
    d.submit(2, [7] * 5)
    assert d.launch()
    assert not d.launch(), "everything was asked for, and not everything is known"
    d.commit()
    assert d.launch()
    assert d.plans[-1].admits.size
    d.run()
    for request in (1, 2):
        d.check(request)


@pytest.mark.parametrize("spoilt", [np.uint64(12345), NOT_FINITE])
def test_a_page_that_changed_while_nobody_served_is_computed_again_and_its_children_too(spoilt):
    d = started()
    page = handle_pages(d.brain.scheduler.running.handles[0, 1, 2:3])[0]
    d.worker.pages[0][page, 1] = spoilt
    d.replace_worker(2, memory=Memory.KEPT)
    d.run()
    d.check(1)
    assert metric(d, "pages_failed_total", "promotion") == 1
    (admit,) = [plan.admits for plan in d.plans if plan.epoch == 2 and plan.admits.size]
    assert admit["length"][0] == 8, "two pages stand before the one that changed"
    (entry,) = d.brain.page_faults
    assert (entry["page"], entry["group"], entry["found"]) == (page, 0, "promotion")
    assert entry["generation"] >= 1 and entry["owners"] == []
    zeroed = np.concatenate([handle_pages(plan.zeros) for plan in d.plans if plan.epoch == 2])
    # Low pages are given out first: the page was used again, and zeroed for that.
    assert page in zeroed
    d.check_home()


def test_of_a_lost_memory_nothing_is_kept():
    d = started()
    d.replace_worker(2, memory=Memory.LOST)
    assert d.brain.ledger.unverified == 0 and not sealed_pages(d).size
    d.run()
    d.check(1)
    assert metric(d, "pages_kept_total") == 0


def test_pages_sealed_since_the_weights_were_last_good_go_when_they_are_loaded_anew():
    d = Driver(limits_of())
    d.submit(1, PROMPT, max_tokens=40)
    running(d, 4)
    d.replace_worker(2, memory=Memory.KEPT)
    old = d.brain.ledger.clock
    at = len(d.tokens[1])
    running(d, 20)
    d.replace_worker(3, memory=Memory.RELOADED)
    pool = d.brain.ledger.pools[0]
    assert sealed_pages(d).size >= 4
    assert (pool.sealed_at[sealed_pages(d)] <= old).all()
    assert d.brain.doubtful_tokens == len(d.tokens[1]) - at
    assert metric(d, "tokens_doubtful_total") == d.brain.doubtful_tokens
    d.run()
    d.check(1)


def test_the_scrub_of_the_weights_takes_pages_out_of_doubt():
    d = Driver(limits_of())
    d.submit(1, PROMPT, max_tokens=60)
    for tokens in (6, 12, 18):
        running(d, tokens)
        d.brain.weights_good(1, d.brain.recent[-1].plan.step - 2)
    mark = d.brain.trust.until
    assert 0 < mark.clock < d.brain.ledger.clock
    running(d, 30)
    said = len(d.tokens[1])
    d.replace_worker(2, memory=Memory.RELOADED)
    assert sealed_pages(d).size
    assert (d.brain.ledger.pools[0].sealed_at[sealed_pages(d)] <= mark.clock).all()
    assert d.brain.doubtful_tokens == said - mark.tokens
    d.run()
    d.check(1)


def test_a_worker_that_ends_while_it_verifies_leaves_everything_to_the_next_one():
    d = started()
    d.brain.checks.verify_pages = 2
    d.replace_worker(2, memory=Memory.KEPT)
    kept = d.brain.ledger.unverified
    d.tick()
    assert 0 < d.brain.ledger.unverified < kept
    page = d.brain.ledger.pools[0]
    first = int(np.flatnonzero(page.state == PageState.SEALED)[0])
    d.worker.pages[0][first, 0] ^= np.uint64(1)  # verified, and changed since
    d.replace_worker(3, memory=Memory.KEPT)
    assert d.brain.ledger.unverified == kept
    d.run()
    d.check(1)
    assert metric(d, "pages_failed_total", "promotion") == 1


def test_a_wrong_number_of_sums_ends_the_epoch():
    d = started()
    d.replace_worker(2, memory=Memory.KEPT)
    d.launch()
    d.pending[0].seal_sums = d.pending[0].seal_sums[1:]
    with pytest.raises(WorkerFault, match="sizes"):
        d.commit()
    d.replace_worker(3, memory=Memory.KEPT)
    d.run()
    d.check(1)


@pytest.mark.parametrize("memory", list(Memory))
def test_windows_and_drafts_recover_too(memory):
    d = started(windows=(0, 9), draft_depth=3, pages=129, window_pages=129)
    d.submit(2, PROMPT[:17], max_tokens=30)
    running(d, 5, request=2)
    d.replace_worker(2, memory=memory)
    d.brain.verify()
    d.run()
    for request in (1, 2):
        d.check(request)
    if memory is Memory.KEPT:
        assert metric(d, "pages_verified_total") > 12
    d.check_home()


def test_the_largest_plan_of_verification_is_bounded():
    assert checks.VERIFY_PAGES * (2 << 20) <= 8 << 30, "seconds on a CPU, at 5.5 GB/s"
    d = Driver(limits_of(pages=4200, rows_max=8, prefill_tokens=4096, page_tokens=1))
    for request in range(1, 41):
        d.submit(request, [request] * 100, max_tokens=4)
    d.run()
    d.replace_worker(2, memory=Memory.KEPT)
    assert d.brain.ledger.unverified > checks.VERIFY_PAGES
    before = len(d.plans)
    d.run()
    sizes = [plan.seals.size for plan in d.plans[before:]]
    assert sizes[0] == checks.VERIFY_PAGES and len(sizes) == 2
    assert d.brain.ledger.unverified == 0


def test_a_request_that_comes_later_hits_pages_of_a_worker_before():
    d = Driver(limits_of())
    d.submit(1, PROMPT)
    d.run()
    d.replace_worker(2, memory=Memory.KEPT)
    d.run()
    d.submit(2, [*PROMPT, 5])
    d.run()
    d.check(2)
    assert d.cached[2] == 24


def test_a_core_that_has_died_believes_in_no_page():
    d = started()
    pages = d.worker.pages
    d.brain = d.new_brain()
    d.pending.clear()
    d.worker = FakeWorker(d.limits, 2, pages)
    d.brain.new_epoch(2, d.now_s, memory=Memory.KEPT)
    assert d.brain.ledger.unverified == 0 and d.brain.ledger.cached == 0
