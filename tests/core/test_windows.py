"""Window groups in the brain: pages are dropped once no token can see them, and not before."""

from __future__ import annotations

import numpy as np
import pytest
from brain_driver import Driver, limits_of

from holdfast.wire.plan import TRASH_PAGE


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("depth", [0, 4])
def test_text_is_right_at_every_length_around_a_window(window, depth):
    d = Driver(limits_of(windows=(0, window), draft_depth=depth, pages=129, window_pages=129))
    for request in range(1, 13):
        d.submit(request, [request] * request, max_tokens=20)
    d.run()
    for request in range(1, 13):
        assert len(d.tokens[request]) == 20
        d.check(request)
    d.check_home()


def test_a_long_row_holds_no_more_window_pages_than_its_window_spans():
    d = Driver(limits_of(windows=(0, 8), page_tokens=4, pages=65, window_pages=65))
    d.submit(1, [1] * 4, max_tokens=100)
    most = 0
    while d.tick():
        most = max(most, d.brain.ledger.held(1))
    d.check(1)
    # 8 tokens across three pages, one page ahead, and what two steps in flight still name.
    assert most <= 5
    assert d.brain.ledger.held(1) == 0


def test_a_prompt_longer_than_the_window_pool_is_computed_in_chunks():
    d = Driver(limits_of(windows=(0, 8), page_tokens=4, pages=65, window_pages=8))
    d.submit(1, [3] * 100, max_tokens=20)
    d.submit(2, [4] * 90, max_tokens=20)
    d.run()
    for request in (1, 2):
        assert len(d.tokens[request]) == 20
        d.check(request)
    d.check_home()


def test_a_dropped_page_leaves_the_table_of_its_row_and_of_no_other():
    d = Driver(limits_of(windows=(0, 4), page_tokens=4, pages=65))
    d.submit(1, [1] * 4, max_tokens=60)
    while d.tick():
        pass
    drops = [plan.page_writes[plan.page_writes["page"] == TRASH_PAGE] for plan in d.plans]
    columns = np.concatenate([writes["column"] for writes in drops]).tolist()
    assert columns == list(range(len(columns))), "each column once, in order"
    assert len(columns) > 10
    assert {int(group) for writes in drops for group in writes["group"]} == {1}


def test_a_row_that_ends_with_drops_untold_leaves_its_successor_alone():
    d = Driver(limits_of(windows=(0, 2), page_tokens=2, pages=65, rows_max=1))
    for request in range(1, 8):
        d.submit(request, [request] * 7, max_tokens=5 + request)
    d.run()
    for request in range(1, 8):
        d.check(request)
    d.check_home()


def test_a_shared_prefix_is_continued_with_the_window_pages_beside_it():
    d = Driver(limits_of(windows=(0, 8), page_tokens=4, pages=65))
    prompt = [7] * 40
    d.submit(1, prompt, max_tokens=4)
    d.run()
    d.submit(2, [*prompt, 5], max_tokens=8)
    d.run()
    assert d.cached[2] == 40
    d.check(2)
    d.check_home()


def test_a_prefix_whose_window_pages_are_gone_is_computed_again():
    d = Driver(limits_of(windows=(0, 8), page_tokens=4, pages=65, window_pages=8))
    prompt = [7] * 40
    d.submit(1, prompt, max_tokens=4)
    d.run()
    d.submit(2, [1] * 60, max_tokens=4)  # takes every window page
    d.run()
    d.submit(3, [*prompt, 5], max_tokens=8)
    d.run()
    assert d.cached[3] < 40
    d.check(3)
    d.check_home()


def test_a_page_that_a_dead_worker_was_writing_is_zeroed_before_it_is_used_again():
    d = Driver(limits_of(windows=(0, 8), page_tokens=4, pages=9))
    memory = d.worker.pages
    d.submit(1, [1] * 10, max_tokens=12)
    d.tick()
    plan = d.brain.plan(d.now_s)
    assert plan is not None
    d.worker.run(plan, spoil=0)  # The row is not finite, and nobody ever hears of it.
    d.replace_worker(2)
    d.worker.pages = memory
    d.run()
    assert len(d.tokens[1]) == 12
    d.check(1)
    zeroed = sum(plan.zeros.size for plan in d.plans)
    assert zeroed > 0
    d.check_home()


def test_pages_of_a_row_that_was_not_finite_are_zeroed_though_its_request_had_left():
    d = Driver(limits_of(page_tokens=4, pages=9, rows_max=1))
    d.submit(1, [1] * 5, max_tokens=12, timeout_s=5.0)
    d.tick()
    while d.pending:
        d.commit()
    plan = d.brain.plan(d.now_s)
    assert plan is not None
    result = d.worker.run(plan, spoil=0)
    d.brain.expire(d.now_s + 6.0)
    d.brain.commit(result, d.now_s)
    d.collect()
    while d.pending:
        d.commit()
    for request in range(2, 6):
        d.submit(request, [request] * 9, max_tokens=12)
    d.run()
    for request in range(2, 6):
        assert len(d.tokens[request]) == 12
        d.check(request)
    d.check_home()
