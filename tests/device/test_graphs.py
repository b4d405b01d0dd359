"""device.graphs on the CPU: what is replayed, what is not and why, and that nobody can tell.

A `Rerun` stands for CUDA graphs, so this is the logic around a replay. The judge is always a runner
without graphs: results are compared whole, logprobs to the bit.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from devicekit import VOCAB, Hand, Request, make_runner

from holdfast.config import Limits
from holdfast.device.capture import Rerun
from holdfast.errors import InvariantError, OptionError
from holdfast.ops import kernels
from holdfast.wire.envelope import Graphs, buckets
from holdfast.wire.plan import ROW_NOT_FINITE, StepPlan, StepResult

LIMITS = Limits(
    vocab_size=VOCAB,
    context_tokens=48,
    page_tokens=3,
    pages=200,
    rows_max=9,
    prefill_tokens=64,
    live_tokens=1 << 12,
)
TIMES = {"device_ns"}


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def graph_hand(spec, limits: Limits = LIMITS, capture: Rerun | None = None) -> Hand:
    runner = make_runner(spec, limits, graphs=True)
    if capture is not None:
        runner._graphs._capture = capture
    runner.warm_up()
    return Hand(runner)


def assert_same(one: StepResult, other: StepResult) -> None:
    for field in fields(StepResult):
        if field.name not in TIMES:
            found, expected = getattr(one, field.name), getattr(other, field.name)
            assert np.array_equal(found, expected), field.name


KINDS = [
    Request(prompt_of(1, 5)),
    Request(prompt_of(2, 3), fields={"temperature": 1.0, "seed": 7}),
    Request(prompt_of(3, 8), fields={"temperature": 0.8, "seed": 1 << 62}),
    Request(prompt_of(4, 4), fields={"top_p": 0.9, "temperature": 1.0, "seed": 5}),
    Request(prompt_of(5, 6), fields={"repetition_penalty": 1.3}),
    Request(prompt_of(6, 2), fields={"top_logprobs": 3}),
    Request(prompt_of(7, 4), stops=[3, 5], fields={"stop_from": 9}),
]


def both(spec) -> tuple[Hand, Hand]:
    return Hand(make_runner(spec, LIMITS)), graph_hand(spec)


def run_both(hands: tuple[Hand, Hand], rows) -> StepResult:
    plain, graphed = (hand.run(rows) for hand in hands)
    assert_same(graphed, plain)
    return plain


def admit(hands: tuple[Hand, Hand], row: int, request: Request, tokens: int = 20) -> None:
    pages = hands[0].fresh_pages(tokens)
    for hand in hands:
        hand.admit(row, request, pages)


def test_every_kind_of_row_draws_in_a_graph_what_it_draws_without(spec):
    hands = both(spec)
    for row, request in enumerate(KINDS, start=1):
        admit(hands, row, request)
    run_both(hands, [(row, len(request.prompt), 1) for row, request in enumerate(KINDS, start=1)])
    for rows in ([1, 2, 3], [3, 1], [2], [4, 1], [5, 6], [7, 2, 1], [1, 2, 3, 4, 5, 6, 7]):
        run_both(hands, [(row, 1, 1) for row in rows])
    # Row 7 keeps stop ids away until position 9, and asks for nothing from then on.
    for _ in range(5):
        run_both(hands, [(7, 1, 1), (1, 1, 1)])
    stats = hands[1].runner.stats
    assert stats.eager_steps == {"prefill": 1}
    assert stats.graph_steps == {"fast": 6, "general": 6}
    assert not hands[0].runner.stats.graph_steps and not hands[0].runner.stats.eager_steps


def test_a_chunk_of_one_token_waits_in_a_bucket_and_draws_later(spec):
    hands = both(spec)
    admit(hands, 1, KINDS[0])
    admit(hands, 2, KINDS[2])
    run_both(hands, [(1, 5, 1), (2, 5, 0)])
    assert run_both(hands, [(2, 1, 0), (1, 1, 1)]).tokens[0] == 0
    run_both(hands, [(1, 1, 1), (2, 1, 0)])
    run_both(hands, [(2, 1, 1), (1, 1, 1)])
    assert hands[1].runner.stats.graph_steps == {"fast": 3}


def test_eager_inside_a_bucket_is_the_same_bits_and_counted(spec):
    hands = both(spec)
    hands[1].runner._graphs._graphs = Graphs((), LIMITS.windows, enabled=False)
    for row, request in enumerate(KINDS, start=1):
        admit(hands, row, request)
        run_both(hands, [(row, len(request.prompt), 1)])
    for _ in range(3):
        run_both(hands, [(row, 1, 1) for row in range(1, 8)])
        run_both(hands, [(2, 1, 1), (1, 1, 1)])
    stats = hands[1].runner.stats
    assert stats.eager_steps == {"disabled": 13} and not stats.graph_steps


class Recorder(Rerun):
    """Counts replays by the rows of their bucket, in the order of capture."""

    def __init__(self) -> None:
        self.captured: list[str] = []
        self.replays: list[str] = []

    def capture(self, work, rehearsal=None):
        name = f"{work.func.__name__}{work.args[0]}"
        self.captured.append(name)
        (rehearsal or work)()

        def replay() -> None:
            self.replays.append(name)
            work()

        return replay


def test_buckets_are_captured_largest_first_and_the_smallest_that_holds_a_step_is_replayed(spec):
    recorder = Recorder()
    runner = make_runner(spec, LIMITS, graphs=True)
    runner._graphs._capture = recorder
    seen: list[tuple[int, int]] = []
    runner.warm_up(lambda done, total: seen.append((done, total)))
    ladder = [*reversed(buckets(LIMITS.rows_max))]
    assert recorder.captured == [f"{part}{n}" for n in ladder for part in ("_body", "_tail")]
    assert seen == [(2 * at, 2 * len(ladder)) for at in range(1, len(ladder) + 1)]
    hand = Hand(runner)
    for row in range(1, 10):
        hand.admit(row, Request(prompt_of(row, 1 + row % 2)), hand.fresh_pages(20))
        hand.run([(row, 1 + row % 2, 1)])
    recorder.replays.clear()
    for count, bucket in ((9, 9), (3, 4), (1, 1), (5, 8), (9, 9), (2, 2)):
        hand.run([(row, 1, 1) for row in range(1, count + 1)])
        assert recorder.replays == [f"_body{bucket}", f"_tail{bucket}"]
        recorder.replays.clear()


def test_a_warm_up_rests_after_each_of_its_shapes_and_captures(spec):
    recorder = Recorder()
    runner = make_runner(spec, LIMITS, graphs=True)
    runner._graphs._capture = recorder
    forwards: list[int] = []
    forward = runner.decoder.forward
    runner.decoder.forward = lambda *step: forwards.append(1) or forward(*step)
    rests: list[tuple[int, int]] = []
    runner.warm_up(rest=lambda: rests.append((len(forwards), len(recorder.captured))))
    captures = range(1, 2 * len(buckets(LIMITS.rows_max)) + 1)
    # After row state, each of two shapes, the sums of pages, and each capture.
    assert rests == [(0, 0), (1, 0), (2, 0), (2, 0), *((2, done) for done in captures)]


@pytest.mark.parametrize("which", ["tokens", "page_table", "slots", "drawn"])
def test_a_buffer_that_moved_behind_a_graph_is_noticed_and_not_replayed(spec, which):
    recorder = Recorder()
    plain, graphed = Hand(make_runner(spec, LIMITS)), graph_hand(spec, capture=recorder)
    hands = (plain, graphed)
    admit(hands, 1, KINDS[0])
    run_both(hands, [(1, 5, 1)])
    run_both(hands, [(1, 1, 1)])
    rows = graphed.runner.rows
    moved = getattr(rows._buckets, which).clone()
    rows._buckets = replace(rows._buckets, **{which: moved})
    if which == "drawn":
        rows.drawn = moved
        rows._results = torch.stack((moved, rows.finite))
        rows.drawn, rows.finite = rows._results[0], rows._results[1]
        rows._buckets = replace(rows._buckets, drawn=rows.drawn, finite=rows.finite)
    recorder.replays.clear()
    run_both(hands, [(1, 1, 1)])
    assert recorder.replays == []
    assert graphed.runner.stats.eager_steps == {"prefill": 1, "address_moved": 1}


def test_the_pool_that_moved_is_noticed(spec):
    hand = graph_hand(spec)
    hand.admit(1, KINDS[0], hand.fresh_pages(20))
    hand.run([(1, 5, 1)])
    hand.runner._graphs._pool = hand.runner.memory.pool.clone()
    hand.run([(1, 1, 1)])
    assert hand.runner.stats.eager_steps["address_moved"] == 1


def test_a_full_context_is_replayed_to_its_last_token(spec):
    hands = both(spec)
    admit(hands, 1, Request(prompt_of(1, 44)), tokens=48)
    run_both(hands, [(1, 44, 1)])
    for _ in range(4):
        run_both(hands, [(1, 1, 1)])
    assert hands[1].runner.stats.graph_steps == {"fast": 4}


def test_padding_changes_no_page_but_the_trash_page(spec):
    hand = graph_hand(spec)
    pages = {}
    for row in range(1, 10):
        pages[row] = hand.fresh_pages(6)
        hand.admit(row, Request(prompt_of(row, 2)), pages[row])
    hand.run([(row, 2, 1) for row in range(1, 10)])
    words = hand.runner.memory.page_words
    words[hand.next_page :] = 0x3F3F3F3F
    for count in (9, 3, 5, 1):
        before = words.clone()
        hand.run([(row, 1, 1) for row in range(1, count + 1)])
        changed = set((words != before).any(dim=1).nonzero()[:, 0].tolist())
        own = {page for row in range(1, count + 1) for page in pages[row]}
        assert changed <= own | {0} and len(changed - {0}) == count


def test_a_row_that_is_not_finite_fails_alone_in_its_bucket(spec):
    hand = graph_hand(spec)
    other = Hand(make_runner(spec, LIMITS))
    pages = {row: hand.fresh_pages(9) for row in (1, 2)}
    for row in (1, 2):
        hand.admit(row, KINDS[row - 1], pages[row])
        other.admit(row, KINDS[row - 1], pages[row])
    for each in (hand, other):
        each.run([(1, 5, 1), (2, 3, 1)])
        each.runner.memory.pool[pages[2][0], :, :, 0] = float("nan")
    found, expected = hand.run([(2, 1, 1), (1, 1, 1)]), other.run([(2, 1, 1), (1, 1, 1)])
    assert found.faults.tolist() == [ROW_NOT_FINITE, 0]
    assert_same(found, expected)
    assert hand.runner.stats.graph_steps == {"fast": 1}


def test_a_new_epoch_replays_the_graphs_of_the_old_one_on_empty_rows(spec):
    hand = graph_hand(spec)
    hand.generate(1, KINDS[2], 6)
    before = hand.runner.rows.addresses
    hand.runner.reset(2)
    again = Hand(hand.runner)
    again.next_page = hand.next_page
    plain = Hand(make_runner(spec, LIMITS))
    assert again.generate(1, KINDS[1], 6) == plain.generate(1, KINDS[1], 6)
    assert hand.runner.rows.addresses == before
    assert hand.runner.stats.graph_steps == {"fast": 10}


def test_results_come_in_order_and_a_third_plan_in_flight_is_our_own_bug(spec):
    hand = graph_hand(spec)
    hand.admit(1, KINDS[0], hand.fresh_pages(20))
    plans = [hand.plan([(1, 5, 1)]), hand.plan([(1, 1, 1)]), hand.plan([(1, 1, 1)])]
    runner = hand.runner
    runner.launch(plans[0])
    runner.launch(plans[1])
    assert runner.in_flight == 2 and runner.ready
    with pytest.raises(InvariantError, match="2 plans"):
        runner.launch(plans[2])
    assert [runner.collect().step for _ in range(2)] == [1, 2]
    runner.launch(plans[2])
    assert runner.collect().step == 3 and runner.in_flight == 0


def test_the_reference_attention_is_never_captured(spec):
    runner = make_runner(spec, LIMITS, graphs=True)

    class Baking(Rerun):
        bakes = True

    made = runner._graphs
    with pytest.raises(InvariantError, match="reference attention plans on the host"):
        type(made)(
            LIMITS,
            runner.rows,
            made._decoder,
            runner.memory.pool,
            runner.memory.weights,
            capture=Baking(),
            attention=made._attention,
            draw=None,
        )


def test_graphs_on_a_gpu_name_their_option_where_they_cannot_be_had():
    from holdfast.device import build

    class OnGpu:
        pool = type("Pool", (), {"device": torch.device("cuda", 0)})()

    with pytest.raises(OptionError, match="--graphs"):
        build.build_runner(LIMITS, None, OnGpu(), graphs=object())


SMALL = replace(LIMITS, rows_max=3, context_tokens=18, pages=40)


@pytest.fixture
def device_runner(spec, monkeypatch):
    """Graphs over row state in device memory, through Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from holdfast.device.device_rows import DeviceRows
    from holdfast.device.graphs import ReferenceAttention, StepGraphs
    from holdfast.device.runner import Runner

    plain = make_runner(spec, SMALL, graphs=True)
    old = plain._graphs
    rows = DeviceRows(SMALL, "cpu")
    graphs = StepGraphs(
        SMALL,
        rows,
        old._decoder,
        plain.memory.pool,
        plain.memory.weights,
        capture=Rerun(),
        attention=ReferenceAttention(rows, SMALL, torch.device("cpu")),
        draw=old._draw,
    )
    runner = Runner(SMALL, plain.decoder, plain.memory, rows=rows, graphs=graphs)
    runner.warm_up()
    return runner


interpreted = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def marked(test):
    for mark in interpreted:
        test = mark(test)
    return test


# Draws 7 once; again only by who does not know yet that it was drawn.
ONCE = Request(prompt_of(5, 6), bias={7: 50.0}, fields={"presence_penalty": 100.0})


def scripted(hand: Hand) -> list[StepPlan]:
    """Plans of three rows: prompts in chunks, decode, a general row, a row that is used again."""
    hand.admit(1, KINDS[0], hand.fresh_pages(15))
    hand.admit(2, ONCE, hand.fresh_pages(15))
    plans = [hand.plan([(1, 3, 0), (2, 6, 1)]), hand.plan([(2, 1, 1), (1, 1, 0)])]
    plans += [hand.plan([(1, 1, 1)]), hand.plan([(1, 1, 1), (2, 1, 1)])]
    hand.clear(2)
    hand.admit(2, KINDS[1], hand.fresh_pages(12))
    plans += [hand.plan([(1, 1, 1)]), hand.plan([(2, 3, 1), (1, 1, 1)])]
    plans += [hand.plan([(1, 1, 1), (2, 1, 1)]) for _ in range(3)]
    return [*plans, hand.plan()]


@marked
def test_launched_one_step_ahead_on_the_device_every_result_is_that_of_a_runner_that_waits(
    spec, device_runner
):
    plain = make_runner(spec, SMALL)
    expected = [plain.run(plan) for plan in scripted(Hand(plain))]
    assert expected[0].tokens[1] == 7 != expected[1].tokens[0]
    found: list[StepResult] = []
    for plan in scripted(Hand(device_runner)):
        device_runner.launch(plan)
        if device_runner.in_flight == 2:
            found.append(device_runner.collect())
    found.append(device_runner.collect())
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    stats = device_runner.stats
    assert stats.graph_steps == {"fast": 5, "general": 2}
    assert stats.eager_steps == {"prefill": 2}
