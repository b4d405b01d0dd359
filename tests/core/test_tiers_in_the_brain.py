"""The brain with tiers: what a request gets from host and disk, and what goes wrong on the way."""

from __future__ import annotations

import pytest
from brain_driver import Driver, limits_of

from holdfast.core.request import Phase
from holdfast.errors import InvariantError, OptionError, WorkerFault
from holdfast.kv.pages import PageState
from holdfast.sim.fake_mover import FakeMover, TierMemory, Transfer
from holdfast.wire.copies import LOAD
from holdfast.wire.messages import Cancel, End, Memory

PROMPT = list(range(40, 57))  # four full pages of 4 and one token
OTHER = list(range(200, 217))


class TierDriver(Driver):
    """A driver whose copies and moves wait in `copies` and `moves` until somebody runs them."""

    def __init__(self, **overrides) -> None:
        base = {"pages": 9, "context_tokens": 32, "host_pages": 32}
        super().__init__(limits_of(**(base | overrides)))
        self.memory = TierMemory(self.limits, self.worker.pages)
        self.mover = FakeMover(self.memory)
        self.copies: list[Transfer] = []
        self.moves: list[Transfer] = []
        self.pump()

    def launch(self) -> bool:
        known = len(self.plans)
        launched = super().launch()
        for plan in self.plans[known:]:
            self.copies += self.memory.copies_of(plan)
        self.pump()
        return launched

    def pump(self) -> None:
        orders = self.brain.take_moves(self.now_s)
        if orders is not None:
            self.moves += self.mover.begin(orders)
            for reset in self.mover.over():
                self.brain.moved(reset, self.now_s)

    def copy_all(self, *, failed: bool = False) -> int:
        """Run the copies that are under way; returns how many."""
        copies, self.copies = self.copies, []
        for copy in copies:
            self.brain.copied(copy.run(failed=failed), self.now_s)
        self.brain.verify()
        return len(copies)

    def move_all(self, *, failed: bool = False) -> int:
        moves, self.moves = self.moves, []
        for move in moves:
            self.brain.moved(move.run(failed=failed), self.now_s)
        self.brain.verify()
        return len(moves)

    def settle(self) -> None:
        """Until nothing is left to do."""
        for _ in range(1000):
            self.run()
            if not self.copy_all() + self.move_all():
                return
        raise AssertionError("not settled")

    def answer(self, request: int, prompt: list[int], max_tokens: int = 3) -> None:
        self.submit(request, prompt, max_tokens)
        self.settle()
        assert self.ends[request] is End.LENGTH
        self.check(request)

    def evicted(self) -> None:
        """PROMPT was answered and stored, and other prompts have taken the device since."""
        self.answer(1, PROMPT)
        for request in (2, 3):
            self.answer(request, [token + 50 * request for token in PROMPT] + [1] * 8)

    def evicted_again(self) -> None:
        """PROMPT was answered, stored by the new memory, and other prompts came since."""
        for request in (12, 13):
            self.answer(request, [token + 10 * request for token in PROMPT] + [1] * 8)

    def keeper_dies(self, epoch: int) -> None:
        """Memory and mover go with it, moves in flight as well; a worker over new memory."""
        self.copies.clear()
        self.moves.clear()
        self.replace_worker(epoch, memory=Memory.LOST)
        self.memory = TierMemory(self.limits, self.worker.pages)
        self.mover = FakeMover(self.memory)
        self.brain.verify()
        self.pump()

    def loading(self, request: int = 9) -> list[Transfer]:
        """`request` waits for PROMPT's pages; returns the loads, not begun."""
        self.evicted()
        self.submit(request, PROMPT, 3)
        self.tick()
        assert self.brain.requests[request].phase is Phase.LOADING
        assert self.copies
        return self.copies

    def count(self, name: str, *labels: str) -> int:
        self.brain.gauges.publish(0)
        return int(self.metrics.get(name, labels))


def test_an_evicted_prompt_is_loaded_instead_of_computed():
    driver = TierDriver()
    driver.evicted()
    driver.answer(9, PROMPT)
    assert driver.cached[9] == 16
    assert driver.count("pages_loaded_total") == 4
    driver.check_home()


def test_an_evicted_prompt_comes_back_from_disk():
    driver = TierDriver(host_pages=8, disk_pages=40)
    driver.evicted()
    driver.answer(9, PROMPT)
    assert driver.cached[9] == 16
    assert driver.count("pages_fetched_total") > 0
    driver.check_home()


def test_without_tiers_a_plan_has_no_copies_and_the_trie_no_chain_keys():
    driver = TierDriver(host_pages=0)
    driver.evicted()
    driver.answer(9, PROMPT)
    assert driver.cached[9] == 0
    assert not any(plan.copies.size for plan in driver.plans)
    assert driver.brain.ledger.index.chains is None


def test_a_request_that_loads_is_in_no_plan_and_its_pages_in_no_row():
    driver = TierDriver()
    driver.loading()
    assert driver.brain.scheduler.running.active == 0
    assert not driver.launch(), "there is nothing to compute before the pages are there"
    loading = driver.brain.ledger.pools[0].counts()[PageState.LOADING]
    assert loading == len(driver.copies) == 4


def test_others_go_on_while_a_request_loads():
    driver = TierDriver(pages=17)
    driver.answer(1, PROMPT)
    for request in (2, 3, 4, 5):
        driver.answer(request, [token + 50 * request for token in PROMPT] + [1] * 8)
    driver.submit(9, PROMPT, 3)
    driver.tick()
    assert driver.brain.requests[9].phase is Phase.LOADING
    driver.submit(10, OTHER, 3)
    driver.run()
    assert driver.ends == driver.ends | {10: End.LENGTH} and 9 not in driver.ends
    driver.settle()
    assert driver.ends[9] is End.LENGTH
    driver.check(9)


def test_a_corrupt_slot_is_recomputed_and_never_served():
    driver = TierDriver()
    driver.loading()
    driver.copies[1].source[0] ^= 1
    driver.settle()
    driver.check(9)
    assert driver.ends[9] is End.LENGTH
    assert driver.cached[9] == 4, "the page before the bad one is used, the rest computed"
    assert driver.count("tier_failures_total", "bad_sum") == 1
    driver.check_home()


def test_a_failed_copy_is_recomputed_and_its_page_zeroed():
    driver = TierDriver()
    loads = driver.loading()
    assert driver.copy_all(failed=True) == 4
    driver.settle()
    driver.check(9)
    zeroed = [plan.zeros.size for plan in driver.plans if plan.zeros.size]
    assert sum(zeroed) == len(loads) == 4
    driver.check_home()


@pytest.mark.parametrize("after", [0, 2])
def test_a_request_cancelled_while_it_loads_leaves_its_pages_to_the_cache(after):
    driver = TierDriver()
    loads = list(driver.loading())
    for copy in loads[:after]:
        driver.brain.copied(copy.run(), driver.now_s)
    driver.brain.receive(0, Cancel((9,)), driver.now_s)
    assert driver.brain.live == 0
    for copy in loads[after:]:
        driver.brain.copied(copy.run(), driver.now_s)
    driver.copies.clear()
    driver.check_home()
    driver.answer(10, PROMPT)
    assert driver.cached[10] == 16
    assert driver.count("pages_loaded_total") == 4, "nothing was loaded again"


def test_a_deadline_while_loading_ends_the_request():
    driver = TierDriver()
    driver.evicted()
    driver.submit(9, PROMPT, 3, timeout_s=1.0)
    driver.tick()
    driver.now_s += 1.5
    driver.brain.expire(driver.now_s)
    driver.collect()
    assert driver.ends[9] is End.DEADLINE
    driver.settle()
    driver.check_home()


def test_a_copy_that_is_not_acknowledged_in_time_ends_the_epoch():
    driver = TierDriver(copy_timeout_s=2.0)
    driver.loading()
    began_s = driver.now_s
    assert driver.brain.next_deadline_s == began_s + 2.0
    driver.now_s = began_s + 1.9
    driver.brain.expire(driver.now_s)
    driver.now_s = began_s + 2.0
    with pytest.raises(WorkerFault, match="not acknowledged"):
        driver.brain.expire(driver.now_s)
    assert driver.brain.suspended
    driver.brain.expire(driver.now_s)  # said once


def test_a_new_epoch_voids_loads_and_keeps_what_the_host_holds():
    driver = TierDriver()
    old = list(driver.loading())
    driver.copies.clear()
    held = driver.brain.tiers.host.held
    driver.replace_worker(2, memory=Memory.KEPT)
    driver.brain.verify()
    assert driver.brain.tiers.host.held == held
    with pytest.raises(InvariantError, match="epoch 1 in 2"):
        driver.brain.copied(old[0].run(), driver.now_s)
    driver.settle()
    driver.check(9)
    assert driver.ends[9] is End.LENGTH
    assert driver.cached[9] == 16
    driver.check_home()


def test_what_the_host_held_is_not_believed_after_the_keeper_died():
    driver = TierDriver()
    driver.loading()
    driver.keeper_dies(2)
    assert driver.brain.tiers.host.held == 0
    driver.settle()
    driver.check(9)
    assert driver.ends[9] is End.LENGTH
    assert driver.cached[9] == 0
    assert driver.count("tier_failures_total", "bad_sum") == 0, "lost bytes were copied"
    driver.check_home()


def test_a_request_that_waits_for_the_disk_is_computed_when_the_keeper_dies():
    driver = TierDriver(host_pages=8, disk_pages=40)
    driver.evicted()
    driver.submit(9, PROMPT, 3)
    driver.tick()
    assert driver.brain.requests[9].phase is Phase.LOADING and driver.moves
    driver.keeper_dies(2)
    driver.settle()
    driver.check(9)
    assert driver.ends[9] is End.LENGTH
    driver.check_home()
    driver.evicted_again()
    driver.answer(19, PROMPT)
    assert driver.cached[19] == 16, "the new keeper's tiers are not used"
    driver.check_home()


def test_an_unknown_ticket_is_counted_and_dropped():
    driver = TierDriver()
    (first, *_) = driver.loading()
    ack = first.run()
    driver.brain.copied(ack, driver.now_s)
    driver.brain.copied(ack, driver.now_s)
    assert driver.count("stale_acks_total") == 1
    driver.brain.verify()


def test_a_late_move_is_not_waited_for():
    driver = TierDriver(host_pages=8, disk_pages=40, copy_timeout_s=2.0)
    driver.evicted()
    driver.submit(9, PROMPT, 3)
    driver.tick()
    assert driver.brain.requests[9].phase is Phase.LOADING
    assert driver.moves and not driver.copies
    driver.now_s += 2.0
    driver.brain.expire(driver.now_s)
    driver.run()
    assert driver.ends[9] is End.LENGTH
    driver.check(9)
    driver.settle()
    driver.check_home()


def test_a_running_row_waits_for_loads_instead_of_failing_for_want_of_pages():
    driver = TierDriver(pages=9)
    driver.evicted()
    driver.submit(8, OTHER[:3], 20)
    driver.tick()
    driver.submit(9, PROMPT, 3)
    for _ in range(60):
        driver.tick()
        if driver.copies and any(plan.copies.size for plan in driver.plans[-1:]):
            break
    assert any((plan.copies["kind"] == LOAD).any() for plan in driver.plans)
    driver.run()
    driver.settle()
    assert (driver.ends[8], driver.ends[9]) == (End.LENGTH, End.LENGTH)
    driver.check(8)
    driver.check(9)
    driver.check_home()


def test_a_tier_without_room_is_an_option_error():
    with pytest.raises(OptionError, match="--disk-pages"):
        limits_of(disk_pages=1)
