"""Quarantine: who makes the worker fault is found in three faults, and nobody else ends for it."""

from __future__ import annotations

import pytest
from brain_driver import Driver, limits_of

from holdfast.core.quarantine import ALONE_EPOCHS_MAX, Quarantine
from holdfast.wire.messages import Cancel, End


def test_one_fault_makes_nobody_run_alone():
    q = Quarantine()
    assert q.implicate([(1, 10), (2, 20)], shared=True) is None
    assert q.alone is None
    assert q.suspicion(1).faults == 1


def test_two_faults_at_one_position_are_what_their_suspects_have_in_common():
    q = Quarantine()
    q.implicate([(1, 10), (2, 20)], shared=True)
    q.implicate([(2, 20), (3, 30)], shared=True)
    assert q.alone == 2
    assert q.suspicion(1).faults == q.suspicion(3).faults == 1


def test_suspicion_is_over_once_its_request_is_past_the_position():
    q = Quarantine()
    q.implicate([(1, 10)], shared=False)
    q.implicate([(1, 11)], shared=False)
    assert q.alone is None
    assert (q.suspicion(1).position, q.suspicion(1).faults) == (11, 1)


def test_a_third_fault_alone_ends_the_request_and_clears_all_others():
    q = Quarantine()
    for _ in range(2):
        assert q.implicate([(1, 10), (2, 20)], shared=True) is None
    assert q.alone == 1
    assert q.implicate([(1, 10)], shared=False) == 1
    assert q.alone is None and q.suspicion(2) is None


def test_a_third_fault_with_a_step_of_another_in_flight_ends_nobody():
    q = Quarantine()
    for _ in range(2):
        q.implicate([(1, 10)], shared=True)
    # The other one was cancelled meanwhile: it is no suspect, and was there all the same.
    assert q.implicate([(1, 10)], shared=True) is None
    assert q.alone == 1


def test_two_suspects_run_alone_one_after_the_other():
    q = Quarantine()
    for _ in range(2):
        q.implicate([(1, 10), (2, 20)], shared=True)
    assert q.alone == 1
    q.progress(10)
    assert q.alone == 1, "it is not past the position"
    q.progress(11)
    assert q.alone == 2
    q.progress(21)
    assert q.alone is None and q.suspicion(1) is None


@pytest.mark.parametrize("ended", [1, 2])
def test_a_request_that_ends_is_waited_for_no_longer(ended):
    q = Quarantine()
    for _ in range(2):
        q.implicate([(1, 10), (2, 20)], shared=True)
    q.forget(ended)
    q.forget(99)
    assert q.alone == 3 - ended
    assert q.suspicion(ended) is None


def test_a_suspect_whose_workers_are_killed_from_outside_goes_free_in_the_end():
    q = Quarantine()
    q.interrupt()
    for _ in range(2):
        q.implicate([(1, 10)], shared=True)
    for _ in range(ALONE_EPOCHS_MAX - 1):
        q.interrupt()
        assert q.alone == 1
    q.interrupt()
    assert q.alone is None and q.suspicion(1) is None


# --- in the brain ---


class Poisoned(Driver):
    """A worker that dies of any step which computes position `poison[request]`."""

    def __init__(self, poison: dict[int, int], **limits: int) -> None:
        super().__init__(limits_of(**limits))
        self.poison = poison
        self.faults: list[set[int]] = []  # requests in flight at each fault

    def fatal(self) -> bool:
        run, flights = self.brain.scheduler.running, self.brain._flights
        plan = flights[-1].plan
        ends = run.planned[plan.rows].tolist()
        return any(
            end - count <= self.poison.get(one, -1) < end
            for one, end, count in zip(
                flights[-1].ids.tolist(), ends, plan.query_lens.tolist(), strict=True
            )
        )

    def step(self) -> bool:
        """Launch one plan, then commit it, or lose the worker over it."""
        plan = self.brain.plan(self.now_s)
        self.collect()
        if plan is None:
            return False
        if self.fatal():
            self.fault(implicates=True)
            return True
        self.pending.append(self.worker.run(plan))
        self.commit()
        return True

    def fault(self, *, implicates: bool) -> None:
        flights = self.brain._flights
        self.faults.append({one for flight in flights for one in flight.ids.tolist()})
        self.replace_worker(self.brain.epoch + 1, implicates=implicates)

    def run_to_the_end(self) -> None:
        for _ in range(2000):
            if not self.step():
                assert self.brain.live == 0
                return
        raise AssertionError(f"not over: {self.brain.live} live, {len(self.faults)} faults")


def three(poison: dict[int, int]) -> Poisoned:
    driver = Poisoned(poison, prefill_tokens=64)
    for request in (1, 2, 3):
        driver.submit(request, [request * 10 + at for at in range(6)], max_tokens=8)
    return driver


@pytest.mark.parametrize("position", [0, 3, 5, 6, 9, 12])
def test_a_poisonous_request_ends_after_three_faults_and_its_neighbours_finish(position):
    driver = three({2: position})
    driver.run_to_the_end()
    assert driver.ends == {1: End.LENGTH, 2: End.ENGINE_FAULT, 3: End.LENGTH}
    assert len(driver.faults) == 3
    assert driver.faults[-1] == {2}
    for request in (1, 2, 3):
        driver.check(request)
    assert len(driver.tokens.get(2, [])) == max(0, position - 5)
    driver.check_home()


def test_all_requests_poisonous_end_one_by_one():
    driver = three({1: 7, 2: 7, 3: 7})
    driver.run_to_the_end()
    assert set(driver.ends.values()) == {End.ENGINE_FAULT}
    assert len(driver.faults) <= 9
    driver.check_home()


def test_an_innocent_request_implicated_twice_runs_alone_and_then_beside_others_again():
    driver = three({})
    for _ in range(2):
        driver.brain.plan(driver.now_s)
        driver.fault(implicates=True)
    assert driver.brain.quarantine.alone == 1
    company = []
    while driver.brain.quarantine.alone is not None:
        assert driver.brain.plan(driver.now_s) is not None
        company.append(driver.brain._flights[-1].ids.tolist())
        driver.pending.append(driver.worker.run(driver.brain._flights[-1].plan))
        driver.commit()
    assert company[:3] == [[1], [2], [3]]
    assert all(len(ids) > 1 for ids in company[3:])
    driver.run_to_the_end()
    assert set(driver.ends.values()) == {End.LENGTH}
    for request in (1, 2, 3):
        driver.check(request)


def test_faults_far_apart_end_nobody():
    driver = three({})
    for _ in range(5):
        driver.step(), driver.step()
        driver.brain.plan(driver.now_s)
        driver.fault(implicates=True)
        assert driver.brain.quarantine.alone is None
    driver.run_to_the_end()
    assert set(driver.ends.values()) == {End.LENGTH}


def test_workers_killed_from_outside_implicate_nobody():
    driver = three({})
    for _ in range(6):
        driver.brain.plan(driver.now_s)
        driver.fault(implicates=False)
    assert driver.brain.quarantine.alone is None
    driver.run_to_the_end()
    assert set(driver.ends.values()) == {End.LENGTH}


def test_a_suspect_that_is_cancelled_lets_the_others_run():
    driver = three({2: 0})
    while driver.brain.quarantine.alone is None:
        driver.step()
    driver.brain.receive(0, Cancel((driver.brain.quarantine.alone, 2)), driver.now_s)
    driver.run_to_the_end()
    assert driver.ends[3] == End.LENGTH
    driver.check_home()


def test_who_left_a_row_while_a_step_computed_it_is_suspect_all_the_same():
    driver = three({})
    driver.brain.plan(driver.now_s)
    driver.brain.scheduler.preempt(int(driver.brain.scheduler.running.rows()[1]))
    driver.fault(implicates=True)
    assert all(driver.brain.quarantine.suspicion(request) for request in (1, 2, 3))


def test_a_suspect_waits_until_no_step_of_another_is_in_flight():
    driver = three({})
    for _ in range(2):
        driver.brain.plan(driver.now_s)
        driver.fault(implicates=True)
    brain = driver.brain
    for _ in range(2):
        driver.pending.append(driver.worker.run(brain.plan(driver.now_s)))
    driver.commit()  # request 1 is past the position, with a step in flight
    assert brain.plan(driver.now_s) is None
    assert brain.quarantine.alone == 2
    assert brain.scheduler.running.active == 0
    driver.commit()
    assert brain.plan(driver.now_s) is not None
    assert brain._flights[-1].ids.tolist() == [2]
