"""device.runner: plans written by hand, a real decoder, and transformers as the judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devicekit import LIMITS, VOCAB, Hand, Request, greedy, handles, make_runner

from holdfast.errors import WorkerFault
from holdfast.wire import checksum
from holdfast.wire.plan import ROW_NOT_FINITE, ROW_OK


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def words_of(hand: Hand, pages: list[int]) -> np.ndarray:
    return hand.runner.memory.page_words.numpy().view(np.uint32)[pages]


# --- the right tokens ---


def test_chunked_prefill_mixed_with_decode_gives_the_tokens_of_transformers(hand, reference):
    prompts = {1: prompt_of(1, 13), 7: prompt_of(2, 30), 64: prompt_of(3, 1)}
    expected = {row: greedy(reference, prompt, 12) for row, prompt in prompts.items()}
    found: dict[int, list[int]] = {row: [] for row in prompts}
    starts = {1: 0, 64: 2, 7: 3}  # the step in which each row joins
    done = dict.fromkeys(prompts, 0)
    for step in range(40):
        rows = []
        for row, prompt in prompts.items():
            if step < starts[row] or len(found[row]) >= 12:
                continue
            if step == starts[row]:
                hand.admit(row, Request(prompt), hand.fresh_pages(len(prompt) + 12))
            left = len(prompt) - done[row]
            part = min(5, left) if left > 0 else 1
            rows.append((row, part, int(left <= part)))
            done[row] += part
        if not rows:
            break
        result = hand.run(rows)
        for (row, _, samples), token in zip(rows, result.tokens.tolist(), strict=True):
            if samples:
                found[row].append(token)
            else:
                assert token == 0
    assert found == expected


def test_the_same_row_order_and_another_row_order_give_the_same_tokens(spec):
    prompts = {row: prompt_of(row, 3 + row) for row in range(1, 9)}
    drawn = []
    for order in (sorted(prompts), sorted(prompts, reverse=True)):
        hand = Hand(make_runner(spec))
        for row in order:
            hand.admit(row, Request(prompts[row]), hand.fresh_pages(30))
        tokens = [hand.run([(row, len(prompts[row]), 1) for row in order]).tokens.tolist()]
        tokens += [hand.run([(row, 1, 1) for row in order]).tokens.tolist() for _ in range(6)]
        drawn.append([dict(zip(order, step, strict=True)) for step in tokens])
    assert drawn[0] == drawn[1]


def requests_of_all_kinds() -> list[Request]:
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 1.0, "frequency_penalty": -0.5, "top_logprobs": 3},
        {"top_logprobs": 5, "repetition_penalty": 1.1},
    ]
    requests = []
    for at in range(64):
        fields = {"seed": 1000 + at, **kinds[at % len(kinds)]}
        bias = {7: 2.5, 11: -1.0} if at % 3 == 0 else {}
        stops = [3, 5, 9] if at % 4 == 0 else []
        prompt = prompt_of(100 + at, 2 + at % 9)
        fields["stop_from"] = len(prompt) + at % 7
        requests.append(Request(prompt, bias, stops, fields))
    return requests


def test_sampled_rows_of_every_kind_draw_alone_what_they_draw_in_a_batch_of_64(spec):
    requests = requests_of_all_kinds()
    count = 6
    together = Hand(make_runner(spec))
    for row, request in enumerate(requests, start=1):
        together.admit(row, request, together.fresh_pages(len(request.prompt) + count))
    rows = range(1, 65)
    results = [together.run([(row, len(requests[row - 1].prompt), 1) for row in rows])]
    results += [together.run([(row, 1, 1) for row in rows]) for _ in range(count - 1)]
    alone = Hand(make_runner(spec))
    for row, request in enumerate(requests, start=1):
        found = alone.generate(1, request, count, chunk=3)
        alone.clear(1)
        assert found == [int(result.tokens[row - 1]) for result in results], request


def test_min_tokens_keeps_stop_ids_away_until_their_position(hand, reference):
    prompt = prompt_of(5, 6)
    free = greedy(reference, prompt, 8)
    stops = sorted(set(free))
    request = Request(prompt, stops=stops, fields={"stop_from": len(prompt) + 3})
    found = hand.generate(2, request, 8)
    assert not set(found[:3]) & set(stops)
    again = Request(prompt + found[:3])
    assert found[3] == hand.generate(3, again, 1)[0]


def test_penalties_count_the_output_alone_and_also_that_of_a_readmitted_row(hand):
    prompt = prompt_of(6, 5)
    ban = {"frequency_penalty": 2.0, "presence_penalty": 100.0}
    found = hand.generate(1, Request(prompt, fields=ban), 30)
    assert len(set(found)) == 30
    # Preempted after 12 tokens: prompt_len still tells output from prompt.
    fields = {**ban, "prompt_len": len(prompt)}
    rest = hand.generate(2, Request(prompt + found[:12], fields=fields), 18)
    assert rest == found[12:]


def test_a_prefix_from_another_rows_pages_gives_the_same_tokens(hand, reference):
    prompt = prompt_of(7, 22)
    expected = greedy(reference, prompt, 6)
    assert hand.generate(1, Request(prompt), 6) == expected
    shared = hand.mirror.page_table[0, 1, :4].tolist()  # 16 tokens in full pages
    own = hand.fresh_pages(28 - 16)
    hand.admit(2, Request(prompt), shared + own, length=16)
    tokens = [int(hand.run([(2, 6, 1)]).tokens[0])]
    tokens += [int(hand.run([(2, 1, 1)]).tokens[0]) for _ in range(5)]
    assert tokens == expected


def test_a_cleared_row_holds_nothing_and_serves_the_next_request(hand, reference):
    first, second = prompt_of(8, 17), prompt_of(9, 4)
    hand.generate(3, Request(first, {1: 50.0}, [2], {"seed": 9}), 5)
    hand.clear(3)
    assert hand.generate(3, Request(second), 9) == greedy(reference, second, 9)
    hand.clear(3)
    hand.run()
    table = hand.runner.rows.table
    assert table.records[3]["owner"] == 0
    assert not table.page_table[0, 3].any()


# --- seals, zeros, digests ---


def test_seal_sums_are_the_definition_and_stay_the_same_fifty_steps_later(hand):
    prompt = prompt_of(10, 18)
    hand.generate(1, Request(prompt, fields={"temperature": 1.0}), 1)
    pages = hand.mirror.page_table[0, 1, :4].tolist()
    weights = checksum.weights(words_of(hand, pages).shape[1])
    others = [Request(prompt_of(20 + at, 9), fields={"temperature": 1.0}) for at in range(3)]
    for row, request in enumerate(others, start=2):
        hand.admit(row, request, hand.fresh_pages(9 + 60))
    first = hand.run([(row, 9, 1) for row in (2, 3, 4)], seals=pages)
    assert np.array_equal(first.seal_sums, checksum.page_sums(words_of(hand, pages), weights))
    for _ in range(50):
        hand.run([(row, 1, 1) for row in (2, 3, 4)])
    later = hand.run(seals=pages)
    assert np.array_equal(later.seal_sums, first.seal_sums)
    assert np.unique(first.seal_sums).size == 4


def test_a_plan_without_rows_seals_and_has_digest_zero(hand):
    result = hand.run(seals=[5, 9])
    assert (result.digest, result.tokens.size, result.seal_sums.size) == (0, 0, 2)
    assert hand.run().seal_sums.size == 0


def test_sums_are_of_the_page_after_zeros_and_before_the_steps_kernels(hand):
    pool = hand.runner.memory.pool
    pool[40] = 1.5
    pool[41] = 2.5
    size = words_of(hand, [40]).shape[1]
    held = checksum.page_sums(words_of(hand, [41]), checksum.weights(size))[0]
    hand.admit(1, Request([1, 2]), [50])
    result = hand.run([(1, 2, 1)], seals=[40, 41], zeros=[40])
    empty = checksum.page_sums(np.zeros((1, size), np.uint32), checksum.weights(size))[0]
    assert result.seal_sums.tolist() == [empty, held]
    assert not pool[40].any()


@pytest.mark.parametrize("what", ["token", "page", "length", "seed"])
def test_a_row_table_that_differs_from_the_mirror_has_another_digest(hand, what):
    hand.generate(1, Request(prompt_of(11, 9), fields={"seed": 4}), 2)
    table = hand.runner.rows.table
    if what == "token":
        table.tokens[1, table.length[1]] ^= 1
    elif what == "page":
        table.page_table[0, 1, 0] = 77
    elif what == "length":
        table.length[1] -= 1
    else:
        table.records["seed"][1] += 1
    with pytest.raises(AssertionError, match="digest of step"):
        hand.run([(1, 1, 1)])


# --- faults of one row ---


def test_nan_in_one_rows_page_faults_that_row_alone_and_zeros_heal_the_page(hand, reference):
    prompts = {row: prompt_of(30 + row, 10) for row in (1, 2, 3)}
    expected = {row: greedy(reference, prompt, 5) for row, prompt in prompts.items()}
    for row, prompt in prompts.items():
        hand.admit(row, Request(prompt, fields={"top_logprobs": 2}), hand.fresh_pages(16))
    found = [hand.run([(row, 10, 1) for row in (1, 2, 3)])]
    bad_pages = hand.mirror.page_table[0, 2, :4].tolist()
    hand.runner.memory.pool[bad_pages[1], 1, 1] = torch.nan
    found += [hand.run([(row, 1, 1) for row in (1, 2, 3)]) for _ in range(4)]
    assert [result.tokens[0] for result in found] == expected[1]
    assert [result.tokens[2] for result in found] == expected[3]
    for result in found[1:]:
        assert result.faults.tolist() == [ROW_OK, ROW_NOT_FINITE, ROW_OK]
        assert (result.tokens[1], result.logprobs[1]) == (0, 0)
        assert np.isfinite(result.top_logprobs).all()
    hand.clear(2)
    hand.run(zeros=bad_pages)
    assert not hand.runner.memory.pool[bad_pages].any()
    hand.admit(2, Request(prompts[1]), bad_pages)
    assert hand.run([(2, 10, 1)]).tokens[0] == expected[1][0]
    assert hand.runner.stats.rows_not_finite == 4


def test_a_row_that_is_not_finite_in_the_middle_of_its_prompt_faults_before_it_draws(hand):
    hand.admit(1, Request(prompt_of(40, 12)), [1, 2, 3])
    hand.admit(2, Request(prompt_of(41, 12)), [4, 5, 6])
    hand.run([(1, 4, 0), (2, 4, 0)])
    hand.runner.memory.pool[4, 0, 1] = torch.nan
    assert hand.run([(1, 4, 0), (2, 4, 0)]).faults.tolist() == [ROW_OK, ROW_NOT_FINITE]


def test_nan_weights_fault_every_row_and_end_nothing(hand):
    hand.runner.decoder.norm[3] = torch.nan
    hand.admit(1, Request([1, 2]), [1])
    hand.admit(2, Request([3], fields={"temperature": 1.0, "top_p": 0.5}), [2])
    result = hand.run([(1, 2, 1), (2, 1, 1)])
    assert result.faults.tolist() == [ROW_NOT_FINITE, ROW_NOT_FINITE]
    assert result.tokens.tolist() == [0, 0]


# --- logprobs ---


def test_logprobs_are_those_of_transformers_and_zero_for_rows_that_did_not_ask(hand, reference):
    prompts = {1: prompt_of(41, 6), 2: prompt_of(42, 8), 3: prompt_of(43, 9), 4: [5, 6]}
    asked = {1: 2, 2: -1, 3: 4, 4: 0}
    for row, prompt in prompts.items():
        fields = {"top_logprobs": asked[row], "temperature": 0.5, "seed": row}
        hand.admit(row, Request(prompt, {9: 3.0}, fields=fields), hand.fresh_pages(12))
    result = hand.run([(1, 6, 1), (2, 8, 1), (3, 4, 0), (4, 2, 1)])
    assert (result.top_k, result.logprobs.size) == (4, 4)
    top_ids = result.top_ids.reshape(4, 4)
    top_logprobs = result.top_logprobs.reshape(4, 4)
    for at in (1, 2):
        assert not top_ids[at].any()
        assert not result.logprobs[at]
    with torch.inference_mode():
        for at, row in ((0, 1), (3, 4)):
            raw = reference(torch.tensor([prompts[row]])).logits[0, -1].log_softmax(-1)
            token = int(result.tokens[at])
            np.testing.assert_allclose(result.logprobs[at], raw[token], atol=2e-4)
            values, ids = raw.topk(4)
            assert top_ids[at].tolist() == ids.tolist()
            np.testing.assert_allclose(top_logprobs[at], values, atol=2e-4)


def test_logprobs_are_absent_when_no_row_asks(hand):
    hand.admit(1, Request([1, 2]), [1])
    result = hand.run([(1, 2, 1)])
    assert (result.top_k, result.logprobs.size, result.top_ids.size) == (0, 0, 0)


# --- epochs, warm-up ---


def test_warming_up_leaves_pages_and_rows_untouched(spec, reference):
    runner = make_runner(spec)
    runner.memory.pool[1:] = 3.25
    runner.warm_up()
    assert not runner.memory.pool[0].any()
    assert bool((runner.memory.pool[1:] == 3.25).all())
    prompt = prompt_of(50, 7)
    assert Hand(runner).generate(1, Request(prompt), 4) == greedy(reference, prompt, 4)


def test_a_new_epoch_starts_with_free_rows_and_step_one(hand, reference):
    hand.generate(1, Request(prompt_of(51, 5)), 3)
    hand.runner.reset(2)
    fresh = Hand(hand.runner)
    prompt = prompt_of(52, 5)
    assert fresh.generate(1, Request(prompt), 3) == greedy(reference, prompt, 3)
    with pytest.raises(WorkerFault, match="epoch 2 after 2"):
        hand.runner.reset(2)


def test_stats_count_steps_tokens_and_seals(hand):
    hand.generate(1, Request(prompt_of(53, 9)), 3, chunk=4)
    hand.run(seals=[1, 2])
    stats = hand.runner.stats
    counts = (stats.steps, stats.query_tokens, stats.tokens_drawn, stats.pages_sealed)
    assert counts == (6, 11, 3, 2)
    assert stats.device_ns > 0


def test_pages_of_the_plan_are_those_of_its_handles(hand):
    """A handle's generation is the brain's business and must not reach a page number."""
    assert handles([3])[0] != 3
    assert hand.run(seals=[LIMITS.pages - 1]).seal_sums.size == 1
