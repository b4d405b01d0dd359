"""Tiers in the simulator: what the worlds stress, and that their checker sees on its own."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.config import Limits
from holdfast.core.request import Phase, Request
from holdfast.sim.checkers import PageWatch
from holdfast.sim.copy_traffic import CopyTraffic
from holdfast.sim.copy_watch import CopyWatch
from holdfast.sim.fake_mover import FakeMover, TierMemory
from holdfast.sim.page_order import PageOrder
from holdfast.sim.simulator import Simulation
from holdfast.sim.violation import Violation
from holdfast.sim.world import TIER_RATES, draw, without
from holdfast.wire.copies import COPY, FETCH, LOAD, MOVE, RESET, SPILL, STORE, MoveOrders
from holdfast.wire.plan import StepPlan

LIMITS = Limits(
    vocab_size=50,
    context_tokens=16,
    page_tokens=4,
    pages=9,
    host_pages=4,
    disk_pages=4,
    live_tokens=64,
)


def test_the_tiers_profile_stresses_every_road_and_every_fault(monkeypatch):
    aborted: list[int] = []
    finish = Request.finish

    def watched(request, end):
        if request.phase is Phase.LOADING:
            aborted.append(request.id)
        finish(request, end)

    monkeypatch.setattr(Request, "finish", watched)
    struck: dict[str, int] = {}
    stored = loaded = spilled = fetched = full = 0
    for seed in range(100):
        simulation = Simulation(draw(seed, "tiers"))
        outcome = simulation.run()
        assert outcome.violation is None, f"holdfast simulate --seed {seed} --profile tiers"
        watch = simulation.copies.watch
        stored, loaded = stored + watch.stored, loaded + watch.loaded
        spilled, fetched = spilled + watch.spilled, fetched + watch.fetched
        full += simulation.metrics.get("tier_skips_total", ("full",))
        for fault, count in outcome.faults.items():
            struck[fault] = struck.get(fault, 0) + count
    assert min(stored, spilled) > 300 and min(loaded, fetched) > 30
    assert full > 30, "no tier was ever full"
    assert aborted, "no request ended while it was loading"
    assert set(TIER_RATES) <= set(struck)


def plan_of(step: int, *copies: tuple[int, int, int, int]) -> StepPlan:
    return StepPlan(epoch=1, step=step, copies=np.array(list(copies), COPY))


def orders_of(*moves: tuple[int, int, int, int], life: int = 1) -> MoveOrders:
    return MoveOrders(life=life, moves=np.array(list(moves), MOVE))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 5, STORE, 0), (2, 6, STORE, 0)),  # two stores into one slot
        ((1, 5, LOAD, 0), (2, 6, STORE, 0)),  # a slot is filled while a load reads it
        ((1, 5, STORE, 0), (2, 6, LOAD, 0)),  # ... and the other way round
        ((1, 5, LOAD, 0), (2, 5, LOAD, 1)),  # two loads into one page
        ((1, 5, STORE, 0), (2, 5, LOAD, 1)),  # a page is filled while a store reads it
    ],
)
def test_two_copies_of_one_place_of_which_one_writes_are_a_violation(first, second):
    watch = CopyWatch()
    watch.launch(plan_of(1, first), 0, {})
    with pytest.raises(Violation, match="may still"):
        watch.launch(plan_of(2, second), 0, {})
    again = CopyWatch()
    again.launch(plan_of(1, first), 0, {})
    again.close("worker", 1, 1)
    again.launch(plan_of(2, second), 0, {})


def test_two_copies_that_only_read_a_slot_are_fine():
    watch = CopyWatch()
    watch.launch(plan_of(1, (1, 5, LOAD, 0), (2, 6, LOAD, 0)), 0, {})
    assert len(watch.opened) == 2


def test_a_move_is_watched_until_its_core_or_a_reset_says_that_it_is_over():
    watch = CopyWatch()
    watch.order(orders_of((1, SPILL, 0, 3)), 0)
    with pytest.raises(Violation):
        watch.launch(plan_of(1, (9, 5, STORE, 0)), 0, {})
    watch.reset(2, 1)
    watch.launch(plan_of(1, (9, 5, STORE, 0)), 0, {})
    watch.fence(2)
    assert not watch.opened


def test_a_reset_of_the_same_core_ends_what_is_older_and_nothing_else():
    watch = CopyWatch()
    watch.order(orders_of((1, SPILL, 0, 3), (2, RESET, 0, 0), (3, SPILL, 1, 2)), 0)
    watch.reset(1, 2)
    assert list(watch.opened) == [("mover", 1, 3)]


def test_moves_meet_the_end_of_their_keeper(monkeypatch):
    orphaned, unheard, frozen = [], [], []
    new_keeper, pump = CopyTraffic.new_keeper, CopyTraffic.pump
    alive = CopyTraffic._alive

    def watched(traffic):
        orphaned.extend(traffic.mover._open)
        new_keeper(traffic)

    def pumped(traffic):
        tiers = traffic.sim.core.brain.tiers
        if tiers is not None and tiers._moves_new and traffic.sim.processes.keeper() is None:
            unheard.extend(tiers._moves_new)
        pump(traffic)

    def stood(traffic, transfer, keeper):
        process = traffic.sim.processes.running.get(keeper)
        frozen.append(process is not None and process.frozen)
        return alive(traffic, transfer, keeper)

    monkeypatch.setattr(CopyTraffic, "new_keeper", watched)
    monkeypatch.setattr(CopyTraffic, "pump", pumped)
    monkeypatch.setattr(CopyTraffic, "_alive", stood)
    struck: dict[str, int] = {}
    for seed in range(40):
        outcome = Simulation(without(draw(seed, "tiers"), keeper_lost=0.3)).run()
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        for fault, count in outcome.faults.items():
            struck[fault] = struck.get(fault, 0) + count
    assert min(struck["keeper_death"], struck["keeper_lost"], struck["freeze"]) > 5
    assert orphaned, "no keeper ended with moves under way"
    assert unheard, "nothing was ordered while no keeper listened"
    assert any(frozen), "no move stood still with its keeper"


@pytest.mark.parametrize(("kind", "writes"), [(LOAD, False), (STORE, True)])
def test_a_step_on_the_page_of_an_open_copy_is_a_violation(kind, writes):
    watch = CopyWatch()
    watch.launch(plan_of(1, (1, 5, kind, 0)), 0, {})
    with pytest.raises(Violation, match="page 5"):
        watch.step_touches(2, 5, writes=writes)
    watch.step_touches(2, 6, writes=True)


def test_a_step_may_read_a_page_that_is_being_stored():
    watch = CopyWatch()
    watch.launch(plan_of(1, (1, 5, STORE, 0)), 0, {})
    watch.step_touches(2, 5, writes=False)


def test_a_copy_into_a_page_that_a_launched_step_may_touch_is_a_violation():
    watch = PageWatch(LIMITS, CopyWatch(), PageOrder(LIMITS))
    watch.touched[0, 5] = {1: 3}
    watch.acknowledged = 2
    with pytest.raises(Violation, match="step 3"):
        watch.copy_writes(5)
    watch.acknowledged = 3
    watch.copy_writes(5)


def test_the_mover_answers_a_reset_when_everything_older_is_over():
    memory = TierMemory(LIMITS)
    mover = FakeMover(memory)
    memory.host[1] = 7
    (spill,) = mover.begin(orders_of((1, SPILL, 1, 2)))
    assert mover.begin(orders_of((1, RESET, 0, 0), life=2)) == []
    assert mover.over() == []
    (newer,) = mover.begin(orders_of((2, FETCH, 3, 2), life=2))
    spill.read()
    spill.write()
    (answer,) = mover.over(spill)
    assert (answer.epoch, answer.tickets.tolist()) == (2, [1])
    assert (memory.disk[2] == 7).all()
    assert mover.over(newer) == []
