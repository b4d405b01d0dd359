"""The clock of a worker's step: what is taken for a hang, and what never is."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.core.clocks import (
    FEW_FACTOR,
    FEW_MIN,
    FRESH_STEPS,
    MARGIN_S,
    SAMPLES_MAX,
    SAMPLES_MIN,
    STEP_TIMEOUT_S,
    Durations,
    Size,
    StepClocks,
    size_of,
)
from holdfast.wire.plan import StepPlan


def plan(tokens: int = 1, seals: int = 0) -> StepPlan:
    lens = np.array([tokens] if tokens else [], np.int32)
    return StepPlan(epoch=1, step=1, query_lens=lens, seals=np.zeros(seals, np.uint64))


class Worker:
    """Steps one after the other, each of so many tokens in so many seconds."""

    def __init__(self, **options) -> None:
        self.clocks = StepClocks(**options)
        self.now_s = 50.0

    def step(self, seconds: float, tokens: int = 1, context: int = 100, times: int = 1) -> None:
        for _ in range(times):
            self.clocks.sent(plan(tokens), context, self.now_s)
            self.now_s += seconds
            self.clocks.done(self.now_s)

    def bound(self, tokens: int = 1, context: int = 100) -> float:
        """Of a step that begins now."""
        self.clocks.sent(plan(tokens), context, self.now_s)
        bound = self.clocks.deadline_s - self.now_s
        self.clocks._running.pop()
        return bound


def test_a_size_that_was_seen_often_enough_has_four_times_its_longest_step_and_a_margin() -> None:
    worker = Worker()
    worker.step(0.02, times=SAMPLES_MIN - 2)
    worker.step(0.05)
    assert worker.bound() > FEW_FACTOR * MARGIN_S
    worker.step(0.02)
    assert 3.6 * 0.05 + MARGIN_S < worker.bound() <= 4 * 0.05 + MARGIN_S


def test_a_young_server_waits_longer_for_a_hang_but_not_a_minute() -> None:
    worker = Worker()
    worker.step(0.05, times=FEW_MIN - 1)
    assert worker.bound() == STEP_TIMEOUT_S, "two steps may be two accidents"
    worker.step(0.05)
    few = FEW_FACTOR * (4 * 0.05 + MARGIN_S)
    assert 0.9 * few < worker.bound() <= few
    assert worker.bound(tokens=40) > few, "a larger step may take longer"


def test_the_p999_leaves_out_one_step_in_a_thousand_and_follows_a_faster_machine() -> None:
    seen = Durations()
    for number in range(2000):
        seen.add(1.0 if number == 500 else 0.01)
    assert 0.01 <= seen.quantile() < 0.0108
    for _ in range(3):
        seen.add(0.5)
    assert 0.5 <= seen.quantile() < 0.54
    for _ in range(6 * SAMPLES_MAX):
        seen.add(0.001)
    assert seen.quantile() < 0.0011 and seen.count < SAMPLES_MAX


def test_a_larger_step_may_take_proportionally_longer_until_it_is_known_itself() -> None:
    worker = Worker()
    worker.step(0.01, tokens=1, context=100, times=SAMPLES_MIN)
    known = worker.bound() - MARGIN_S
    # A smaller one has at most as much, one of four times the tokens four times as much.
    assert worker.bound(context=10) - MARGIN_S == pytest.approx(known)
    assert worker.bound(tokens=4) - MARGIN_S == pytest.approx(4 * known)
    assert worker.bound(tokens=16, context=400) - MARGIN_S == pytest.approx(64 * known)
    assert worker.bound(tokens=4096, context=100_000) == STEP_TIMEOUT_S
    worker.step(0.001, tokens=4, times=SAMPLES_MIN)
    assert worker.bound(tokens=4) < worker.bound()


def test_what_was_seen_seldom_of_a_size_is_the_least_that_it_may_take() -> None:
    worker = Worker()
    worker.step(0.01, times=SAMPLES_MIN)
    worker.step(3.0, tokens=4)
    assert worker.bound(tokens=4) > 3.6 * 3.0


def test_a_step_begins_when_the_one_before_it_ended() -> None:
    worker = Worker()
    worker.step(0.1, times=SAMPLES_MIN)
    clocks, now_s = worker.clocks, worker.now_s
    clocks.sent(plan(), 100, now_s)
    clocks.sent(plan(), 100, now_s)
    assert not clocks.hung(now_s + 0.8)
    clocks.done(now_s + 0.8)
    assert clocks.started_s == now_s + 0.8
    assert not clocks.hung(now_s + 1.6)
    clocks.done(now_s + 1.6)
    assert clocks.deadline_s is None and not clocks.hung(now_s + 1000)
    assert clocks.started_s == now_s + 1.6


def test_time_without_a_processor_does_not_count_and_the_cap_holds_all_the_same() -> None:
    waited = [0.0]
    rested: list[float] = []
    worker = Worker(starved=lambda: waited[0], rested=rested.append)
    worker.step(0.1, times=SAMPLES_MIN)
    clocks, now_s = worker.clocks, worker.now_s
    clocks.sent(plan(), 100, now_s)
    assert rested[-1] == now_s
    waited[0] = 5.0
    assert not clocks.hung(now_s + 5.0)
    assert clocks.deadline_s > now_s + 5.0, "and the loop sleeps until then"
    assert clocks.hung(now_s + 6.0)
    waited[0] = 1000.0
    assert not clocks.hung(now_s + STEP_TIMEOUT_S - 1)
    assert clocks.hung(now_s + STEP_TIMEOUT_S)


def test_what_another_worker_had_is_void_and_what_was_learnt_is_not() -> None:
    worker = Worker()
    worker.step(0.1, times=SAMPLES_MIN)
    usual = worker.bound()
    worker.clocks.sent(plan(), 100, worker.now_s)
    worker.clocks.reset()
    assert worker.clocks.deadline_s is None
    # The first steps of an epoch are not like the others.
    assert worker.bound() > 2 * usual
    worker.step(0.1, times=FRESH_STEPS)
    assert worker.bound() == usual


def test_the_size_of_a_plan_is_in_powers_of_four() -> None:
    assert size_of(plan(0), 0, fresh=False) == Size(0, 0, 0, 0)
    assert size_of(plan(3, seals=4), 15, fresh=True) == Size(1, 1, 2, 2)
    assert size_of(plan(4), 16, fresh=False) == Size(0, 2, 3, 0)
    sizes = {size_of(plan(n), 10 * n, fresh=False) for n in range(1, 4096)}
    assert len(sizes) < 20, "few sizes, so that each is seen often"


def test_a_server_that_waits_long_for_a_step_is_not_ready() -> None:
    clocks = StepClocks()
    clocks.sent(plan(), 1, 0.0)
    assert not clocks.late(STEP_TIMEOUT_S / 2)
    assert clocks.late(STEP_TIMEOUT_S / 2 + 1)
    clocks.done(40.0)
    assert not clocks.late(1000.0)
