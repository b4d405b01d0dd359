"""The brain against a device that sees only through its rows and pages."""

from __future__ import annotations

import random

import numpy as np
import pytest
from brain_driver import VOCAB, Driver, limits_of

from holdfast.core.flight import SealBatch
from holdfast.core.journal import recover
from holdfast.core.scheduler import SEAL_WAIT_STEPS
from holdfast.errors import InvariantError, OptionError, WorkerFault
from holdfast.sim.fake_worker import expected_token
from holdfast.wire.messages import Cancel, End, Finish, Resume, Sampling
from holdfast.wire.plan import ROW_NOT_FINITE


def prompt(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def test_a_request_gets_its_tokens_in_order_and_ends_at_its_length():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 11), max_tokens=9)
    d.run()
    assert d.accepted == {1}
    assert d.tokens[1] == d.expected(1, 9)
    assert d.ends == {1: End.LENGTH}
    d.check_home()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 64, 100])
def test_prompts_at_page_and_chunk_edges_are_read_whole(length):
    d = Driver(limits_of())
    d.submit(1, prompt(length, length), max_tokens=128 - length)
    d.run()
    assert d.tokens[1] == d.expected(1, 128 - length)
    d.check_home()


def test_many_requests_share_the_steps_and_none_sees_another():
    d = Driver(limits_of(rows_max=8, prefill_tokens=32))
    for request in range(40):
        d.submit(request, prompt(request, 1 + request), max_tokens=1 + request % 13)
    d.run()
    for request in range(40):
        assert d.tokens[request] == d.expected(request, 1 + request % 13)
    d.check_home()


def test_a_stop_id_ends_with_its_token_and_journals_the_end():
    d = Driver(limits_of())
    text = prompt(5, 6)
    wanted = [expected_token(np.array(text, np.int32), VOCAB)]
    wanted.append(expected_token(np.array(text + wanted, np.int32), VOCAB))
    d.submit(1, text, max_tokens=50, sampling=Sampling(temperature=0.0, stop_ids=(wanted[1], 3)))
    d.run()
    assert d.tokens[1] == wanted
    assert d.ends[1] is End.STOP
    assert recover(d.journal_buffer)[1].end == End.STOP
    d.check_home()


def test_one_step_is_in_flight_while_the_next_is_planned():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=20)
    assert d.launch() and d.launch()
    assert not d.launch(), "a third unanswered plan"
    assert d.brain.in_flight == 2
    d.run()
    assert d.tokens[1] == d.expected(1, 20)


def test_overlap_can_be_switched_off():
    d = Driver(limits_of(steps_ahead=1))
    d.submit(1, prompt(1, 9), max_tokens=10)
    assert d.launch()
    assert not d.launch()
    d.run()
    assert d.tokens[1] == d.expected(1, 10)


def test_decode_rows_are_never_left_out_for_a_prompt():
    d = Driver(limits_of(context_tokens=128, prefill_tokens=8))
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.tick()
    d.submit(2, prompt(2, 100), max_tokens=4)
    while 2 not in d.tokens:
        before = len(d.tokens.get(1, []))
        d.tick()
        assert len(d.tokens.get(1, [])) == before + 1, "a step without the decoding row"
    # And the prompt moved on although the decode row came first.
    chunks = [int(p.query_lens[p.query_lens > 1].sum()) for p in d.plans]
    assert max(chunks) <= 8
    d.run()
    d.check(1)
    d.check(2)


def prompt_tokens_of_plans(d: Driver) -> tuple[list[int], list[int]]:
    """Prompt tokens of each plan: of those that decode request 1 as well, and of those that do not.

    The prompts are longer than one token, and request 1's row is the one that was admitted first.
    """
    row = int(d.plans[0].rows[0])
    beside, alone = [], []
    for at, plan in enumerate(d.plans):
        decodes = at > 0 and row in plan.rows[plan.query_lens == 1].tolist()
        taken = int(plan.query_lens.sum()) - (1 if decodes else 0)
        (beside if decodes else alone).append(taken)
    return beside, alone


@pytest.mark.parametrize("mixed", [4, 7, 12, 16, 40, 64])
def test_a_step_that_decodes_and_takes_prompts_has_at_most_its_own_bound_of_tokens(mixed):
    d = Driver(limits_of(prefill_tokens=64, mixed_tokens=mixed, pages=129))
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.tick()
    for request in (2, 3):
        d.submit(request, prompt(request, 90), max_tokens=1)
    while not {2, 3} <= set(d.ends):
        d.tick()
    beside, _ = prompt_tokens_of_plans(d)
    # One row gets eight tokens a step, or a quarter of the bound; a page's worth of prompts at
    # least, for which the smallest bound has no room beside the row. That of all steps is none.
    most = mixed if mixed == 64 else min(mixed, max(mixed // 4, 8))
    assert max(beside) == max(most - 1, 4), "the decode row is part of --mixed-tokens"
    d.run()
    for request in (1, 2, 3):
        d.check(request)
    d.check_home()


def test_beside_many_rows_that_decode_prompts_get_half_of_the_bound():
    d = Driver(limits_of(prefill_tokens=64, mixed_tokens=24, pages=257, rows_max=22))
    for request in range(1, 21):
        d.submit(request, prompt(request, 3), max_tokens=30)
    d.tick()
    d.submit(30, prompt(30, 60), max_tokens=1)
    while 30 not in d.ends:
        d.tick()
    chunks = [
        int(plan.query_lens.max()) for plan in d.plans if plan.query_lens.tolist().count(1) >= 20
    ]
    assert [chunk for chunk in chunks if chunk > 1] == [12] * 5
    d.run()
    for request in (*range(1, 21), 30):
        d.check(request)
    d.check_home()


@pytest.mark.parametrize(("rows", "tokens"), [(1, 12), (2, 16), (4, 32), (5, 40), (6, 48), (9, 48)])
def test_a_chunk_grows_with_the_rows_that_wait_for_it_from_a_quarter_to_all(rows, tokens):
    d = Driver(limits_of(prefill_tokens=64, mixed_tokens=48, pages=257, rows_max=12))
    for request in range(1, rows + 1):
        d.submit(request, prompt(request, 3), max_tokens=30)
    d.tick()
    d.submit(30, prompt(30, 110), max_tokens=1)
    while 30 not in d.ends:
        d.tick()
    lens = [plan.query_lens for plan in d.plans]
    assert {int(n.sum()) for n in lens if n.max() > 3 and (n == 1).sum() == rows} >= {tokens}
    assert max(int(n.sum()) for n in lens if n.max() > 3 and (n == 1).sum() == rows) == tokens
    d.run()
    for request in (*range(1, rows + 1), 30):
        d.check(request)
    d.check_home()


def test_a_step_without_decode_takes_all_its_tokens_of_prompts_whatever_the_bound_beside_it():
    d = Driver(limits_of(prefill_tokens=64, mixed_tokens=4, pages=129))
    for request in (1, 2):
        d.submit(request, prompt(request, 100), max_tokens=1)
    d.run()
    chunks = [int(plan.query_lens.sum()) for plan in d.plans if plan.rows.size]
    assert chunks == [64, 64, 64, 8]
    d.check(1)
    d.check(2)


def test_beside_decode_a_prompt_gets_a_page_a_step_however_small_the_bound():
    d = Driver(limits_of(prefill_tokens=16, mixed_tokens=1))
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.tick()
    d.submit(2, prompt(2, 40), max_tokens=1)
    while 2 not in d.ends:
        d.tick()
    beside, _ = prompt_tokens_of_plans(d)
    assert [taken for taken in beside if taken] == [4] * 10
    d.run()
    d.check(2)


def test_a_stream_of_prompts_beside_decode_ends_and_no_decode_step_is_left_out():
    d = Driver(limits_of(prefill_tokens=32, mixed_tokens=4, pages=129, rows_max=3))
    d.submit(1, prompt(1, 4), max_tokens=120)
    d.tick()
    for request in range(2, 22):
        d.submit(request, prompt(request, 15), max_tokens=2)
    while set(d.ends) != set(range(1, 22)):
        before = len(d.tokens[1]) if 1 in d.tokens else 0
        assert d.tick(), "idle though somebody waits"
        assert 1 in d.ends or len(d.tokens[1]) == before + 1, "a step without the decoding row"
    d.run()
    for request in range(1, 22):
        d.check(request)
    d.check_home()


def test_a_bound_beside_decode_above_that_of_all_steps_is_refused_by_its_name():
    for wrong in (17, -1):
        with pytest.raises(OptionError, match=f"--mixed-tokens.*16.*{wrong}"):
            limits_of(prefill_tokens=16, mixed_tokens=wrong)


def test_a_second_request_with_the_same_prompt_computes_only_what_is_new():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 23), max_tokens=4)
    d.run()
    steps = len(d.plans)
    d.submit(2, prompt(1, 23), max_tokens=4)
    d.run()
    computed = sum(int(p.query_lens.sum()) for p in d.plans[steps:])
    assert d.cached[2] == 20, "five full pages of four tokens"
    assert computed == 3 + 3
    d.check(2)
    d.check_home()


@pytest.mark.parametrize("answered", [2, 21])
def test_who_asks_again_before_the_sums_are_in_waits_for_them_and_shares(answered):
    d = Driver(limits_of())
    d.submit(1, prompt(1, 15), max_tokens=answered)
    until_end(d, 1)
    d.submit(2, [*prompt(1, 15), *d.tokens[1], 5], max_tokens=4)
    d.run()
    assert d.cached[2] == (14 + answered) // 4 * 4
    d.check(2)
    d.check_home()


def until_end(d: Driver, request: int) -> None:
    """Until its last token is out; the sums of its last pages are not in."""
    while request not in d.ends:
        d.tick()
    assert d.brain.scheduler.seals, "nothing is asked for any more"


@pytest.mark.parametrize(
    ("text", "tenant"), [(prompt(1, 15), "b"), (prompt(2, 15), ""), (prompt(1, 4), "")]
)
def test_nobody_waits_for_sums_of_pages_that_he_cannot_use(text, tenant):
    d = Driver(limits_of())
    d.submit(1, prompt(1, 15), max_tokens=2)
    until_end(d, 1)
    d.submit(2, text, max_tokens=4, tenant=tenant)
    assert d.launch() and d.plans[-1].admits.size == 1
    d.run()
    assert d.cached[2] == 0
    d.check(2)


def test_who_waits_for_a_sum_holds_up_nobody_and_keeps_its_place():
    d = Driver(limits_of(prefill_tokens=64))
    d.submit(1, prompt(1, 15), max_tokens=2)
    until_end(d, 1)
    for request in (2, 3):
        d.submit(request, [*prompt(1, 15), request], max_tokens=4, priority=1)
    d.submit(4, prompt(4, 15), max_tokens=4)
    assert d.launch() and d.plans[-1].admits.size == 1, "4 goes, and neither 2 nor 3"
    d.run()
    assert [d.cached[request] for request in (2, 3, 4)] == [12, 12, 0]
    first = [next(b.step for b in d.batches if one in b.requests) for one in (2, 3, 4)]
    assert first[2] < first[0] <= first[1]
    for request in (2, 3, 4):
        d.check(request)
    d.check_home()


def test_only_so_many_that_wait_for_a_sum_are_looked_up_in_a_step(monkeypatch):
    monkeypatch.setattr("holdfast.core.scheduler.SEAL_WAITERS_MAX", 2)
    d = Driver(limits_of(prefill_tokens=64))
    d.submit(1, prompt(1, 15), max_tokens=2)
    until_end(d, 1)
    looked = []
    find = d.brain.ledger.find
    monkeypatch.setattr(d.brain.ledger, "find", lambda *a: looked.append(a) or find(*a))
    for request in range(2, 8):
        d.submit(request, prompt(1, 15), max_tokens=4)
    assert d.launch() and d.plans[-1].admits.size == 0
    assert len(looked) == 2
    d.run()
    assert [d.cached[request] for request in range(2, 8)] == [12] * 6
    d.check_home()


def test_nobody_waits_for_a_sum_longer_than_a_few_steps(monkeypatch):
    monkeypatch.setattr(SealBatch, "begins", lambda *_: True)  # as if each step began another
    d = Driver(limits_of(page_tokens=1, pages=257))
    d.submit(1, prompt(1, 15), max_tokens=100)
    d.tick()
    d.submit(2, prompt(2, 15), max_tokens=2)
    while 2 not in d.ends:
        d.tick()
    assert 1 not in d.ends
    admitted = [plan.step for plan in d.plans if plan.admits.size]
    assert admitted[0] == 1 and 3 < admitted[1] <= 3 + SEAL_WAIT_STEPS


def test_a_follow_up_turn_reuses_the_pages_of_the_answer():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 8), max_tokens=12)
    d.run()
    d.submit(2, prompt(1, 8) + d.tokens[1] + [7], max_tokens=3)
    d.run()
    # 19 of the 20 tokens have their KV; the pages that hold 16 of them are full.
    assert d.cached[2] == 16
    d.check(2)


def test_prefixes_are_not_shared_between_tenants():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 16), tenant="a")
    d.run()
    d.submit(2, prompt(1, 16), tenant="b")
    d.run()
    d.submit(3, prompt(1, 16), tenant="a")
    d.run()
    assert d.cached[2] == 0
    assert d.cached[3] == 12
    d.check(2)


def test_choices_of_one_prompt_wait_for_its_pages_and_share_them():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 41), ids=(1, 2, 3, 4), max_tokens=5)
    d.run()
    computed = sum(int(p.query_lens.sum()) for p in d.plans)
    assert [d.cached[i] for i in (1, 2, 3, 4)] == [0, 40, 40, 40]
    assert computed == 41 + 3 * 1 + 4 * 4
    for request in (1, 2, 3, 4):
        d.check(request)
    d.check_home()


def test_choices_still_run_when_the_first_one_is_cancelled():
    d = Driver(limits_of(prefill_tokens=4))
    d.submit(1, prompt(1, 41), ids=(1, 2), max_tokens=5)
    d.tick()
    d.brain.receive(0, Cancel((1,)), d.now_s)
    d.run()
    assert 1 not in d.tokens
    assert d.tokens[2] == d.expected(2, 5)
    d.check_home()


def test_cancel_frees_pages_within_two_steps_and_no_token_follows():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 30), max_tokens=90)
    d.submit(2, prompt(2, 3), max_tokens=90)
    for _ in range(6):
        d.tick()
    had = len(d.tokens[1])
    d.brain.receive(0, Cancel((1,)), d.now_s)
    d.tick()
    d.tick()
    d.brain.verify()
    assert d.brain.ledger.held() <= 5, "pages of the cancelled request are still held"
    d.run()
    assert len(d.tokens[1]) == had
    d.check(2)
    d.check_home()


@pytest.mark.parametrize("when", range(12))
def test_cancel_at_any_moment_leaves_the_others_alone(when):
    d = Driver(limits_of(prefill_tokens=8, pages=33))
    for request in range(6):
        d.submit(request, prompt(request, 5 + 4 * request), max_tokens=12)
    for at in range(60):
        launched = d.launch()
        if at == when:
            d.brain.receive(0, Cancel((2,)), d.now_s)
            d.brain.verify()
        if d.brain.in_flight == 2 or not launched:
            if not d.pending:
                break
            d.commit()
    d.run()
    for request in range(6):
        d.check(request)
        assert request == 2 or len(d.tokens[request]) == 12
    d.check_home()


def test_finish_cuts_at_the_stop_string_and_later_tokens_are_void():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 5), max_tokens=50)
    while len(d.tokens.get(1, [])) < 6:
        d.tick()
    d.brain.receive(0, Finish(1, 4), d.now_s)
    d.run()
    assert len(d.tokens[1]) == 6
    found = recover(d.journal_buffer)[1]
    assert (found.end, len(found.tokens)) == (End.STOP, 4)
    d.check_home()


def test_short_pages_preempt_the_youngest_and_everybody_still_ends_right():
    d = Driver(limits_of(pages=17, rows_max=4))
    for request in range(4):
        d.submit(request, prompt(request, 4), max_tokens=40)
    d.run()
    assert d.brain.scheduler.preempted > 0
    for request in range(4):
        assert d.tokens[request] == d.expected(request, 40)
    d.check_home()


def test_half_computed_prompts_that_block_each_other_are_preempted():
    d = Driver(limits_of(pages=33, prefill_tokens=8, rows_max=4))
    d.submit(1, prompt(1, 100), max_tokens=20)
    d.tick()
    for request in (2, 3, 4):
        d.submit(request, prompt(request, 90), max_tokens=30)
    d.run()
    for request, count in ((1, 20), (2, 30), (3, 30), (4, 30)):
        assert d.tokens[request] == d.expected(request, count)
    d.check_home()


def test_a_preempted_request_of_low_priority_lets_the_high_one_finish_first():
    d = Driver(limits_of(pages=25, rows_max=2))
    d.submit(1, prompt(1, 8), max_tokens=60, priority=0)
    d.submit(2, prompt(2, 8), max_tokens=60, priority=5)
    order = []
    while len(order) < 2:
        d.tick()
        order += [r for r in d.ends if r not in order]
    assert order == [2, 1]
    d.check(1)
    d.check(2)


def test_the_last_request_that_cannot_go_on_fails_alone_and_the_server_goes_on():
    d = Driver(limits_of(pages=33))
    lost = d.brain.ledger.reserve(20)  # As if a fault had put these pages in quarantine.
    d.submit(1, prompt(1, 40), max_tokens=40)
    d.submit(2, prompt(2, 4), max_tokens=8)
    d.run()
    assert d.ends == {1: End.ENGINE_FAULT, 2: End.LENGTH}
    assert d.tokens[2] == d.expected(2, 8)
    d.check(1)
    d.brain.ledger.release(lost, 0)
    d.submit(3, prompt(1, 40), max_tokens=40)
    d.run()
    assert d.tokens[3] == d.expected(3, 40)
    d.check_home()


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    d = Driver(limits_of(pages=9))
    d.submit(1, prompt(1, 30), max_tokens=20)
    assert d.refused[1].status == 400
    assert "13 KV pages" in d.refused[1].message and "8 in all" in d.refused[1].message
    assert d.refused[1].field == "max_tokens"


def test_a_full_queue_refuses_with_429_and_a_time_to_come_back():
    d = Driver(limits_of(queue_requests=3))
    for request in range(5):
        d.submit(request, prompt(request, 4))
    assert set(d.refused) == {3, 4}
    assert d.refused[3].status == 429
    assert d.refused[3].retry_after_s >= 1
    d.run()
    assert set(d.tokens) == {0, 1, 2}


def test_the_bound_in_tokens_refuses_too():
    d = Driver(limits_of(live_tokens=128))
    d.submit(1, prompt(1, 60), max_tokens=60)
    d.submit(2, prompt(2, 6), max_tokens=6)
    assert d.refused[2].status == 429
    d.run()
    d.submit(3, prompt(3, 6), max_tokens=6)
    d.run()
    assert set(d.tokens) == {1, 3}


def test_a_request_that_waited_for_a_starting_core_lives_no_longer_for_it():
    """Its message lay in a socket: the deadline is when the client set it, not from the reading."""
    d = Driver(limits_of())
    asked_s = d.now_s
    d.now_s += 7.0
    d.submit(1, prompt(1, 4), max_tokens=100, timeout_s=asked_s + 5.0 - d.now_s)
    d.brain.expire(d.now_s)
    d.collect()
    assert d.ends[1] == End.DEADLINE
    assert not d.launch()


def test_a_deadline_ends_waiting_and_running_requests_with_their_reason():
    d = Driver(limits_of(rows_max=1))
    d.submit(1, prompt(1, 4), max_tokens=100, timeout_s=5.0)
    d.submit(2, prompt(2, 4), max_tokens=100, timeout_s=6.0)
    d.submit(3, prompt(3, 4), max_tokens=3, timeout_s=60.0)
    for _ in range(4):
        d.tick()
    assert d.brain.next_deadline_s == d.now_s + 5.0
    d.now_s += 7.0
    d.brain.expire(d.now_s)
    d.collect()
    assert d.ends == {1: End.DEADLINE, 2: End.DEADLINE}
    d.run()
    assert d.ends[3] is End.LENGTH
    d.check_home()


def test_keys_take_turns_whoever_sent_more():
    d = Driver(limits_of(rows_max=1))
    for request in range(6):
        d.submit(request, prompt(request, 4), max_tokens=2, tenant="big")
    d.submit(100, prompt(100, 4), max_tokens=2, tenant="small")
    order = []
    while len(order) < 7:
        d.tick()
        order += [r for r in d.ends if r not in order]
    assert order.index(100) == 1


def test_priorities_go_first():
    d = Driver(limits_of(rows_max=1))
    for request in range(4):
        d.submit(request, prompt(request, 4), max_tokens=2)
    d.submit(9, prompt(9, 4), max_tokens=2, priority=3)
    order = []
    while len(order) < 5:
        d.tick()
        order += [r for r in d.ends if r not in order]
    assert order[0] == 9


def test_a_resent_submit_is_admitted_once():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=3)
    d.submit(1, prompt(1, 4), max_tokens=3)
    assert d.brain.live == 1
    d.run()
    assert d.tokens[1] == d.expected(1, 3)


def test_a_device_whose_rows_differ_ends_the_epoch_before_a_token_counts():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 6), max_tokens=20)
    d.tick()
    seen = len(d.tokens[1])
    d.worker.rows.page_table[0, 1, 0] += 1
    d.launch()
    with pytest.raises(WorkerFault, match="not the brain's"):
        while d.pending:
            d.commit()
    assert len(d.tokens[1]) <= seen + 1


@pytest.mark.parametrize("field", ["length", "tokens", "stop_ids", "seed"])
def test_the_digest_sees_every_part_of_a_row(field):
    d = Driver(limits_of())
    d.submit(1, prompt(1, 6), max_tokens=20, sampling=Sampling(stop_ids=(5000,)))
    d.tick()
    rows = d.worker.rows
    if field == "length":
        rows.length[1] -= 1
    elif field == "tokens":
        rows.tokens[1, rows.length[1]] += 1
    elif field == "stop_ids":
        rows.stop_ids[1, 0] += 1
    else:
        rows.records["seed"][1] += np.uint64(1)
    d.launch()
    with pytest.raises(WorkerFault):
        while d.pending:
            d.commit()


def test_a_result_that_comes_twice_counts_once():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 6), max_tokens=20)
    d.launch()
    d.launch()
    again = d.pending[0]
    d.commit()
    seen = list(d.tokens[1])
    d.brain.commit(again, d.now_s)
    d.collect()
    assert d.tokens[1] == seen
    d.run()
    d.check(1)


def test_a_row_that_is_not_finite_fails_alone_and_its_pages_are_zeroed_first():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 6), max_tokens=20)
    d.submit(2, prompt(2, 6), max_tokens=20)
    d.tick()
    d.launch()
    bad = int(d.plans[-1].rows[0])
    d.pending[-1].faults = np.array([ROW_NOT_FINITE, 0], np.uint8)
    wrote = d.worker.rows.page_table[0, bad, :3].copy()
    while d.pending:
        d.commit()
    assert d.ends == {1: End.NOT_FINITE}
    d.run()
    zeroed = np.concatenate([p.zeros for p in d.plans if p.zeros.size])
    assert set((zeroed & np.uint64(0xFFFFFF)).tolist()) <= set(wrote.tolist())
    assert zeroed.size
    assert d.tokens[2] == d.expected(2, 20)
    d.check_home()


def test_a_new_worker_recomputes_and_no_token_is_lost_or_repeated():
    d = Driver(limits_of(rows_max=3, prefill_tokens=8))
    for request in range(5):
        d.submit(request, prompt(request, 6 + 5 * request), max_tokens=15)
    for epoch in range(2, 8):
        for _ in range(4):
            d.tick()
        d.launch()
        d.replace_worker(epoch)
        d.brain.verify()
    d.run()
    for request in range(5):
        assert d.tokens[request] == d.expected(request, 15)
    d.check_home()


def test_a_suspended_brain_launches_nothing_and_still_admits():
    d = Driver(limits_of())
    d.brain.suspend()
    d.submit(1, prompt(1, 4))
    assert not d.launch()
    assert d.accepted == {1}
    d.replace_worker(2)
    d.run()
    d.check(1)


def test_a_new_core_goes_on_from_the_journal():
    d = Driver(limits_of(rows_max=2))
    for request in range(4):
        d.submit(request, prompt(request, 9), max_tokens=12)
    d.submit(9, prompt(9, 4), max_tokens=1)
    for _ in range(5):
        d.tick()
    seen = {request: len(tokens) for request, tokens in d.tokens.items()}
    old = d.brain
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    assert d.brain.live == old.live
    d.pending.clear()
    d.replace_worker(2)
    pairs = tuple((r, seen.get(r, 0)) for r in range(4) if r not in d.ends)
    d.brain.receive(0, Resume(pairs), d.now_s)
    d.run()
    for request in range(4):
        assert d.tokens[request] == d.expected(request, 12)
    d.check_home()


def test_a_stop_id_whose_end_was_not_journalled_any_more_still_ends_its_request():
    d = Driver(limits_of())
    sampling = Sampling(temperature=0.0, stop_ids=(VOCAB - 1,))
    d.submit(1, prompt(1, 9), max_tokens=12, sampling=sampling)
    d.brain.journal.tokens(0, np.array([1], np.uint64), np.array([VOCAB - 1], np.int32))
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    assert d.brain.live == 0
    assert recover(d.journal_buffer)[1].end == End.STOP
    d.brain.receive(0, Resume(((1, 0),)), d.now_s)
    d.collect()
    assert (d.tokens[1], d.ends[1]) == ([VOCAB - 1], End.STOP)


def test_pages_that_a_dead_core_gave_out_are_zeroed_before_they_are_used():
    d = Driver(limits_of())
    memory = d.worker.pages
    d.submit(1, prompt(1, 9), max_tokens=12)
    plan = d.brain.plan(d.now_s)
    assert plan is not None
    d.worker.run(plan, spoil=0)
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    d.replace_worker(2)
    d.worker.pages = memory
    d.brain.receive(0, Resume(((1, 0),)), d.now_s)
    d.run()
    assert d.tokens[1] == d.expected(1, 12)
    d.check_home()


def test_what_was_journalled_and_never_sent_reaches_the_client_after_a_restart():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 9), max_tokens=12)
    for _ in range(5):
        d.tick()
    held_back = 2
    del d.tokens[1][-held_back:]
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    d.pending.clear()
    d.replace_worker(2)
    d.brain.receive(0, Resume(((1, len(d.tokens[1])),)), d.now_s)
    d.run()
    assert d.tokens[1] == d.expected(1, 12)


def test_a_request_whose_acceptance_was_lost_goes_on_when_it_is_submitted_again():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 9), max_tokens=12)
    d.submit(2, prompt(2, 9), max_tokens=2)
    for _ in range(5):
        d.tick()
    for seen in (d.accepted, d.tokens, d.ends):
        seen.clear()  # The core died before any of it was read.
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    d.pending.clear()
    d.replace_worker(2)
    d.submit(1, prompt(1, 9), max_tokens=12)
    d.submit(2, prompt(2, 9), max_tokens=2)
    assert d.brain.live == 1, "an ended request was admitted once more"
    d.run()
    assert d.accepted == {1, 2}
    assert d.tokens == {1: d.expected(1, 12), 2: d.expected(2, 2)}
    assert d.ends == {1: End.LENGTH, 2: End.LENGTH}


def test_the_end_at_a_stop_id_is_said_with_its_token_after_a_restart_as_well():
    d = Driver(limits_of())
    d.prompts[1] = prompt(1, 9)
    wanted = d.expected(1, 3)
    sampling = Sampling(temperature=0.0, stop_ids=(wanted[-1],))
    d.submit(1, prompt(1, 9), max_tokens=12, sampling=sampling)
    d.run()
    assert (d.tokens.pop(1), d.ends.pop(1)) == (wanted, End.STOP)
    d.brain = d.new_brain()
    d.brain.restore(recover(d.journal_buffer), d.now_s)
    d.batches.clear()
    d.brain.receive(0, Resume(((1, 1),)), d.now_s)
    d.tokens[1] = wanted[:1]
    d.collect()
    assert d.tokens[1] == wanted
    assert d.batches[-1].ends.tolist() == [0, int(End.STOP)]


def test_the_journal_compacts_and_still_knows_every_live_request():
    limits = limits_of(queue_requests=4, live_tokens=512)
    d = Driver(limits)
    for request in range(400):
        d.submit(request, prompt(request, 20), max_tokens=30)
        d.run()
    assert d.brain.journal.compactions > 1
    d.submit(1000, prompt(1, 20), max_tokens=30)
    for _ in range(8):
        d.tick()
    found = recover(d.journal_buffer)[1000]
    assert found.tokens == d.tokens[1000]
    assert np.frombuffer(found.admission.prompt, np.int32).tolist() == prompt(1, 20)


def test_drain_refuses_new_requests_and_finishes_the_live_ones():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=6)
    d.brain.drain()
    d.submit(2, prompt(2, 4))
    assert d.refused[2].status == 503
    d.run()
    assert d.tokens[1] == d.expected(1, 6)


def test_the_drain_deadline_ends_what_is_left():
    d = Driver(limits_of(rows_max=1))
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.submit(2, prompt(2, 4), max_tokens=60)
    d.tick()
    d.brain.end_all(End.SHUTDOWN, "shutting down", d.now_s)
    d.collect()
    assert d.ends == {1: End.SHUTDOWN, 2: End.SHUTDOWN}
    d.run()
    d.check_home()


def test_requests_of_a_dead_api_process_are_cancelled():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.tick()
    d.brain.drop_api(0, d.now_s)
    assert d.brain.live == 0
    d.run()
    d.check_home()


def test_an_api_process_that_is_new_to_a_restored_core_takes_nothing_over():
    """Its index's requests are those of the process before it: known by their ids."""
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=60)
    d.submit(9, prompt(2, 4), max_tokens=60)
    d.tick()
    d.brain.drop_api(0, d.now_s, 9)
    assert set(d.brain.requests) == {9}
    d.run()
    d.check_home()


def test_an_idle_engine_seals_what_the_last_step_completed():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 9), max_tokens=4)
    d.run()
    assert d.plans[-1].rows.size == 0 and d.plans[-1].seals.size
    assert d.brain.ledger.cached == 3
    d.check_home()


def test_a_request_cannot_end_twice():
    d = Driver(limits_of())
    d.submit(1, prompt(1, 4), max_tokens=6)
    request = d.brain.requests[1]
    d.run()
    with pytest.raises(InvariantError):
        request.finish(End.STOP)


@pytest.mark.parametrize("seed", range(16))
def test_random_load_with_aborts_preemption_and_worker_loss_ends_home(seed):
    rng = random.Random(seed)
    prefill_tokens = rng.choice([1, 7, 16, 64])
    d = Driver(
        limits_of(
            page_tokens=rng.choice([1, 2, 3, 4, 16]),
            pages=rng.choice([130, 140, 200]),
            rows_max=rng.choice([1, 2, 5, 9]),
            prefill_tokens=prefill_tokens,
            mixed_tokens=min(prefill_tokens, rng.choice([0, 1, 7])),
            steps_ahead=rng.choice([1, 2]),
        )
    )
    epoch, submitted = 1, 0
    for _ in range(400):
        action = rng.random()
        if action < 0.25 and submitted < 60:
            base = prompt(rng.randrange(5), 40)
            length = rng.randint(1, 60)
            text = (base + prompt(submitted, 40))[:length]
            n = rng.choice([1, 1, 1, 3])
            ids = tuple(range(submitted, submitted + n))
            d.submit(
                ids[0],
                text,
                max_tokens=rng.randint(1, 60),
                ids=ids,
                tenant=rng.choice("ab"),
                priority=rng.choice([0, 0, 1]),
                timeout_s=rng.choice([60.0, 3.0]),
            )
            submitted += n
        elif action < 0.6:
            d.launch()
        elif action < 0.9:
            if d.pending:
                d.commit()
        elif action < 0.95 and submitted:
            victim = rng.randrange(submitted)
            if victim not in d.ends and rng.random() < 0.5:
                d.brain.receive(0, Cancel((victim,)), d.now_s)
                d.ends[victim] = End.CANCELLED
            elif victim in d.tokens and victim not in d.ends:
                d.brain.receive(0, Finish(victim, len(d.tokens[victim])), d.now_s)
                d.ends[victim] = End.STOP
        elif action < 0.96:
            epoch += 1
            d.replace_worker(epoch)
        else:
            d.now_s += 0.2
            d.brain.expire(d.now_s)
            d.collect()
        d.brain.verify()
    d.run()
    for request in d.tokens:
        d.check(request)
    assert set(d.ends) | set(d.refused) == set(range(submitted))
    d.check_home()
