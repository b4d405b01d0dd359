"""Draft tokens: how deep a row tries, what a wrong one leaves behind, what nobody sees of it."""

from __future__ import annotations

import numpy as np
import pytest
from brain_driver import Driver, limits_of

from holdfast.core.draft import PROBE_STEPS, DraftPolicy
from holdfast.errors import OptionError, WorkerFault
from holdfast.wire.messages import End, Sampling
from holdfast.wire.plan import StepPlan, StepResult
from holdfast.wire.rows import RowTable, drawn_slots

ROWS = np.array([1, 2], np.int32)


def u8(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


# --- how deep ---


def test_a_row_whose_drafts_fail_stops_trying_and_one_whose_drafts_hold_goes_as_deep_as_it_may():
    policy = DraftPolicy(limits_of(draft_depth=4))
    for _ in range(60):
        policy.learn(ROWS, u8(4, 4), u8(0, 4))
    assert policy.depths(ROWS, 1, 100).tolist() == [0, 4]
    assert policy.depths(ROWS, PROBE_STEPS, 100).tolist() == [1, 4], (
        "it is tried again now and then"
    )


def test_a_new_request_does_not_inherit_the_depth_of_its_rows_last_one():
    policy = DraftPolicy(limits_of(draft_depth=4))
    first = policy.depths(ROWS, 1, 100).tolist()
    for _ in range(60):
        policy.learn(ROWS, u8(4, 4), u8(0, 0))
    policy.enter(1)
    assert policy.depths(ROWS, 1, 100).tolist() == [first[0], 0]


def test_drafts_of_all_rows_together_stay_within_the_steps_tokens():
    policy = DraftPolicy(limits_of(draft_depth=4))
    for tokens in range(9):
        assert policy.depths(ROWS, 1, tokens).sum() <= tokens


def test_drafts_behind_a_wrong_one_are_not_held_against_a_row():
    first, second = DraftPolicy(limits_of(draft_depth=4)), DraftPolicy(limits_of(draft_depth=4))
    first.learn(ROWS[:1], u8(4), u8(1))
    second.learn(ROWS[:1], u8(2), u8(1))
    assert first.rate[1] == second.rate[1]


@pytest.mark.parametrize("depth", [-1, 33])
def test_a_depth_out_of_range_is_refused_by_name(depth):
    with pytest.raises(OptionError, match="--draft-depth"):
        limits_of(draft_depth=depth)


# --- the contract ---


def test_slots_of_drawn_rows_are_their_first_accepted_and_one_more():
    drafts, accepted = u8(2, 0, 3), u8(1, 0, 3)
    assert drawn_slots(drafts, np.array([True, True, True]), accepted).tolist() == [
        0,
        1,
        3,
        4,
        5,
        6,
        7,
    ]
    assert drawn_slots(drafts, np.array([True, False, True]), accepted).tolist() == [
        0,
        1,
        4,
        5,
        6,
        7,
    ]


def test_a_row_table_moves_by_what_was_accepted():
    table = RowTable(limits_of(draft_depth=3))
    table.length[1], table.tokens[1, 5] = 5, 77
    plan = StepPlan(
        epoch=1, step=1, rows=np.array([1], np.int32), query_lens=np.array([4], np.int32)
    )
    plan.samples, plan.drafts = u8(1), u8(3)
    table.advance(plan, np.array([10, 11, 0, 0], np.int32), u8(1))
    assert table.length[1] == 7
    assert table.tokens[1, 5:8].tolist() == [77, 10, 11]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("more drafts accepted", lambda result: result.accepted.__iadd__(9)),
        ("result sizes", lambda result: setattr(result, "accepted", u8())),
        ("result sizes", lambda result: setattr(result, "tokens", result.tokens[:-1])),
    ],
)
def test_a_result_that_cannot_be_of_its_drafts_ends_the_epoch(what, change):
    d = Driver(limits_of(draft_depth=3))
    d.submit(1, [1, 2, 3], max_tokens=20)
    while not (d.launch() and d.plans[-1].drafts.size):
        d.commit()
    while len(d.pending) > 1:
        d.commit()
    result = d.pending[0]
    result.accepted = result.accepted.copy()
    change(result)
    with pytest.raises(WorkerFault, match=what):
        d.brain.commit(result, d.now_s)


# --- in the brain ---


@pytest.mark.parametrize("page_tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_text_is_the_same_with_drafts_as_without(page_tokens, steps_ahead):
    limits = limits_of(draft_depth=4, page_tokens=page_tokens, pages=400, steps_ahead=steps_ahead)
    d = Driver(limits)
    for request in range(1, 7):
        d.submit(request, [request] * (3 * request), max_tokens=30)
    d.run()
    for request in range(1, 7):
        assert len(d.tokens[request]) == 30
        d.check(request)
    drafts = d.brain.scheduler.drafts
    assert 0 < drafts.accepted < drafts.proposed, "both kinds must have come up"
    assert len(d.plans) < 6 * 30 / 2, "drafts that hold save steps"
    d.check_home()


def test_a_request_never_gets_more_tokens_than_it_asked_for_whatever_was_accepted():
    d = Driver(limits_of(draft_depth=4))
    for request in range(1, 9):
        d.submit(request, [7, request], max_tokens=request)
    d.run()
    assert {r: len(d.tokens[r]) for r in range(1, 9)} == {r: r for r in range(1, 9)}
    assert set(d.ends.values()) == {End.LENGTH}
    d.check_home()


def test_tokens_accepted_behind_a_stop_id_are_never_said():
    clean = Driver(limits_of())
    clean.submit(1, [5, 6, 7], max_tokens=24)
    clean.run()
    for place in range(2, 20):
        stop = clean.tokens[1][place]
        d = Driver(limits_of(draft_depth=4))
        # Owner 2 and 3 have drafts that mostly hold.
        for request in (1, 2, 3):
            d.submit(request, [5, 6, 7], 24, sampling=Sampling(temperature=0.0, stop_ids=(stop,)))
        d.run()
        first = clean.tokens[1].index(stop)
        for request in (1, 2, 3):
            assert d.tokens[request] == clean.tokens[1][: first + 1]
            assert d.ends[request] is End.STOP


def test_a_page_with_a_rejected_drafts_kv_is_never_shared():
    d = Driver(limits_of(draft_depth=4, page_tokens=2, pages=200))
    d.submit(1, [9, 8, 7], max_tokens=40)
    d.run()
    d.check(1)
    text = [9, 8, 7, *d.tokens[1]]
    for cut in range(4, len(text)):
        d.submit(100 + cut, text[:cut], max_tokens=2)
    d.run()
    assert d.cached[100 + len(text) - 1] > 0, "the pages must have been shared"
    for cut in range(4, len(text)):
        d.check(100 + cut)


def test_a_preempted_row_goes_on_behind_what_was_committed_and_not_what_was_hoped_for():
    d = Driver(limits_of(draft_depth=4, page_tokens=2, pages=40, rows_max=4))
    for request in range(1, 5):
        d.submit(request, [request] * 5, max_tokens=40)
    d.run()
    assert d.brain.scheduler.preempted > 0
    for request in range(1, 5):
        d.check(request)
    d.check_home()


def test_drafts_take_no_page_that_another_row_needs():
    d = Driver(limits_of(draft_depth=4, page_tokens=1, pages=32, context_tokens=24))
    for request in range(1, 4):
        d.submit(request, [request], max_tokens=20)
    d.run()
    for request in range(1, 4):
        assert len(d.tokens[request]) == 20
        d.check(request)
    d.check_home()


def test_after_a_fault_a_row_with_drafts_in_flight_continues_exactly():
    d = Driver(limits_of(draft_depth=4))
    for request in range(1, 5):
        d.submit(request, [3, request], max_tokens=30)
    for epoch in range(2, 8):
        for _ in range(4):
            d.tick()
        d.launch()
        d.replace_worker(epoch)
    d.run()
    for request in range(1, 5):
        assert len(d.tokens[request]) == 30
        d.check(request)
    d.check_home()


def test_a_plan_and_a_result_with_drafts_survive_the_wire():
    plan = StepPlan(epoch=3, step=4, rows=ROWS, query_lens=np.array([3, 1], np.int32))
    plan.samples, plan.drafts = u8(1, 1), u8(2, 0)
    again = StepPlan.decode(plan.encode())
    assert (again.drafts.tolist(), again.slots, again.known_lens.tolist()) == ([2, 0], 4, [1, 1])
    result = StepResult(epoch=3, step=4, digest=1, accepted=u8(1, 0))
    assert StepResult.decode(result.encode()).accepted.tolist() == [1, 0]
