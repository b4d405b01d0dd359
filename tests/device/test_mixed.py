"""device.mixed on the CPU: steps with prompts, computed by replays.

A `Rerun` stands for CUDA graphs, so this is the logic around a replay. The judge is a runner
without graphs: on a CPU in float32 rows of padding change no bit, so results are compared whole.
tests/device/test_mixed_kernels.py has the same over row state on the device and kernels.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from devicekit import VOCAB, Hand, Request, make_runner

from holdfast.config import Limits
from holdfast.device.build import Mixed, build_engine, build_runner
from holdfast.device.capture import Rerun
from holdfast.device.memory import DeviceMemory
from holdfast.device.mixed import MixedGraphs
from holdfast.errors import InvariantError
from holdfast.model.decoder import Decoder
from holdfast.model.weights import WeightsLayout
from holdfast.ops.mixed_config import prompt_rows, token_buckets
from holdfast.wire.envelope import Graphs
from holdfast.wire.plan import ROW_NOT_FINITE, StepResult

LIMITS = Limits(
    vocab_size=VOCAB,
    context_tokens=60,
    page_tokens=3,
    pages=400,
    rows_max=9,
    prefill_tokens=64,
    live_tokens=1 << 12,
)
# Two that follow each other, so that a step of 16 and one of 17 tokens are computed differently.
LADDER = (8, 16, 40)


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


class Recorder(Rerun):
    """Rerun that notes what is captured and replayed, by bucket; of decode's bodies and tails
    nothing."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.rehearsed: list[int] = []
        self.replays: list[int] = []

    def capture(self, work, rehearsal=None):
        (rehearsal or work)()
        if len(work.args) < 2 or not isinstance(work.func.__self__, MixedGraphs):
            return work
        tokens = work.args[0]
        self.captured.append(tokens)
        self.rehearsed.append(len(rehearsal.args[1].layers))

        def replay() -> None:
            self.replays.append(tokens)
            work()

        return replay


def recorded(spec, ladder=LADDER, **options) -> tuple[Hand, Recorder]:
    runner = make_runner(spec, LIMITS, graphs=True, token_buckets=ladder, **options)
    recorder = Recorder()
    runner._graphs._capture = runner._graphs._mixed._capture = recorder
    runner.warm_up()
    return Hand(runner), recorder


class Pair:
    """The same plans for a runner without graphs and for one with graphs of steps with prompts."""

    def __init__(self, spec) -> None:
        self.plain = Hand(make_runner(spec, LIMITS))
        self.graphed, self.recorder = recorded(spec)

    def admit(self, row: int, request: Request, tokens: int = 60) -> None:
        pages = self.plain.fresh_pages(tokens)
        for hand in (self.plain, self.graphed):
            hand.admit(row, request, pages)

    def clear(self, row: int) -> None:
        self.plain.clear(row)
        self.graphed.clear(row)

    def run(self, rows) -> StepResult:
        one, other = self.graphed.run(rows), self.plain.run(rows)
        for field in fields(StepResult):
            if field.name != "device_ns":
                found, expected = getattr(one, field.name), getattr(other, field.name)
                assert np.array_equal(found, expected), field.name
        # The trash page is anybody's; every other byte of the pool is the same.
        pools = [hand.runner.memory.pool[1:] for hand in (self.plain, self.graphed)]
        assert torch.equal(*pools)
        return other

    def replayed(self) -> list[int]:
        """Buckets of the replays since this was asked last."""
        buckets, self.recorder.replays = self.recorder.replays, []
        return buckets

    @property
    def stats(self):
        return self.graphed.runner.stats


@pytest.fixture
def pair(spec) -> Pair:
    return Pair(spec)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(2, 8), (7, 8), (8, 8), (9, 16), (15, 16), (16, 16), (17, 40), (40, 40)]
)
def test_a_step_of_prompts_is_replayed_in_the_smallest_bucket_that_holds_it(pair, tokens, bucket):
    pair.admit(1, Request(prompt_of(1, tokens)))
    pair.run([(1, tokens, 1)])
    assert pair.replayed() == [bucket]
    assert pair.stats.eager_steps == {}
    assert sum(pair.stats.mixed_steps.values()) == 1


def test_a_step_of_more_tokens_than_every_bucket_runs_eagerly_and_is_counted(pair):
    pair.admit(1, Request(prompt_of(1, 41)))
    pair.run([(1, 41, 1)])
    assert pair.replayed() == []
    assert pair.stats.eager_steps == {"too_many_tokens": 1} and not pair.stats.mixed_steps


def test_chunks_beside_rows_that_decode_say_what_they_say_without_graphs(pair):
    """Prompts in chunks over several steps of every bucket and none, beside decode; rows that end
    and are used again; plain draws and those of the general sampler."""
    pair.admit(1, Request(prompt_of(1, 30), fields={"temperature": 0.9, "seed": 4}))
    pair.admit(2, Request(prompt_of(2, 5), fields={"top_logprobs": 3}))
    pair.run([(1, 12, 0), (2, 5, 1)])
    pair.run([(2, 1, 1), (1, 6, 0)])
    pair.run([(1, 12, 1), (2, 1, 1)])
    pair.run([(1, 1, 1), (2, 1, 1)])
    pair.clear(2)
    pair.admit(2, Request(prompt_of(3, 44), fields={"repetition_penalty": 1.2}))
    pair.admit(3, Request(prompt_of(4, 3), fields={"temperature": 1.0, "top_p": 0.8, "seed": 9}))
    pair.run([(1, 1, 1), (2, 41, 0)])
    pair.run([(2, 3, 1), (1, 1, 1), (3, 3, 1)])
    for _ in range(3):
        pair.run([(1, 1, 1), (2, 1, 1), (3, 1, 1)])
    assert pair.replayed() == [40, 8, 16, 8]
    assert pair.stats.mixed_steps == {"general": 4}
    assert pair.stats.eager_steps == {"too_many_tokens": 1}
    assert sum(pair.stats.graph_steps.values()) == 4


def test_more_prompts_than_a_bucket_has_room_for_take_a_larger_one_or_none(pair):
    assert [prompt_rows(tokens, 9) for tokens in LADDER] == [8, 8, 8]
    for row in range(1, 10):
        pair.admit(row, Request(prompt_of(row, 6)))
    pair.run([(row, 2, 0) for row in range(1, 9)])
    pair.run([(row, 2, 0) for row in range(1, 10)])
    # The ninth row decodes, so to speak: it has one token.
    pair.run([*((row, 2, int(row < 9)) for row in range(1, 9)), (9, 1, 0)])
    assert pair.replayed() == [16, 40]
    assert pair.stats.eager_steps == {"too_many_prompts": 1}


def test_padding_that_is_not_finite_reaches_no_row_of_the_step(pair):
    """What attention leaves behind a step's tokens is anybody's, here as bad as it can be."""
    ops = pair.graphed.runner._graphs._mixed._decoder.ops
    attend, padded = ops.attend, []

    def spoilt(step, *given) -> None:
        attend(step, *given)
        padded.append(given[-1][step.attention.tokens :].fill_(float("nan")).shape[0])

    ops.attend = spoilt
    pair.admit(1, Request(prompt_of(1, 39)))
    pair.admit(2, Request(prompt_of(2, 9), fields={"top_logprobs": 3}))
    pair.run([(1, 20, 0)])
    pair.run([(2, 9, 1), (1, 1, 0)])
    pair.run([(1, 18, 1), (2, 1, 1)])
    assert pair.replayed() == [40, 16, 40]
    # Each layer's.
    assert padded == [20, 20, 6, 6, 21, 21]


def test_a_row_that_is_not_finite_fails_alone_in_its_bucket(pair):
    pages = {row: pair.plain.fresh_pages(40) for row in (1, 2)}
    hands = pair.plain, pair.graphed
    for hand in hands:
        for row in (1, 2):
            hand.admit(row, Request(prompt_of(row, 12)), pages[row])
    pair.run([(1, 6, 0), (2, 6, 0)])
    for hand in hands:
        hand.runner.memory.pool[pages[1][0], :, :, 0] = float("nan")
    found = [hand.run([(2, 6, 1), (1, 6, 1)]) for hand in hands]
    assert [result.faults.tolist() for result in found] == [[0, ROW_NOT_FINITE]] * 2
    assert found[0].tokens[0] == found[1].tokens[0]
    assert pair.replayed() == [16, 16]


def test_a_moved_buffer_is_refused_counted_and_computed_in_the_same_bucket(pair):
    pair.admit(1, Request(prompt_of(1, 20)))
    pair.run([(1, 9, 0)])
    mixed = pair.graphed.runner._graphs._mixed
    old = mixed._hidden
    mixed._hidden = old.clone()
    rows: list[int] = []
    begin = mixed._decoder.begin
    mixed._decoder.begin = lambda *given: rows.append(given[3]) or begin(*given)
    pair.run([(1, 10, 0)])
    assert pair.replayed() == [16] and rows == [16]
    assert pair.stats.eager_steps == {"address_moved": 1}
    mixed._hidden = old
    pair.run([(1, 1, 1)])
    pair.admit(2, Request(prompt_of(1, 7)))
    pair.run([(2, 7, 1)])
    assert pair.replayed() == [8]


@pytest.mark.parametrize("name", ["_weights", "_pool"])
def test_memory_that_moved_is_noticed(pair, name):
    mixed = pair.graphed.runner._graphs._mixed
    setattr(mixed, name, getattr(mixed, name).clone())
    # Not of the pair: what is stored in a pool elsewhere is not the runner's.
    pair.graphed.admit(1, Request(prompt_of(1, 5)), pair.graphed.fresh_pages(5))
    pair.graphed.run([(1, 5, 1)])
    assert pair.replayed() == [] and pair.stats.eager_steps == {"address_moved": 1}


def test_graphs_that_are_disabled_are_so_for_steps_with_prompts_too(pair):
    pair.graphed.runner._graphs._graphs = Graphs((), LIMITS.windows, enabled=False)
    pair.admit(1, Request(prompt_of(1, 5)))
    pair.run([(1, 5, 1)])
    assert pair.replayed() == [] and pair.stats.eager_steps == {"disabled": 1}


def test_padding_changes_no_page_but_those_of_the_step(spec):
    hand, _ = recorded(spec)
    pages = hand.fresh_pages(30)
    hand.admit(1, Request(prompt_of(1, 25)), pages)
    words = hand.runner.memory.page_words
    words[:] = 0x3F3F3F3F
    words[pages] = 0
    for count, length in ((17, 0), (6, 17), (2, 23)):
        before = words.clone()
        hand.run([(1, count, int(length == 23))])
        changed = set((words != before).any(dim=1).nonzero()[:, 0].tolist())
        first, last = length // 3, (length + count - 1) // 3
        assert changed == set(pages[first : last + 1])


def test_the_largest_bucket_is_captured_first_and_each_is_counted_rehearsed_and_rested_after(spec):
    deep = replace(spec, layers=4)
    memory = DeviceMemory.allocate(deep, LIMITS)
    memory.weights.view(torch.float32).normal_(std=0.05)
    views = WeightsLayout.of(deep, "float32").views(memory.weights)
    decoder = Decoder(deep, views)
    beside = decoder.beside()
    runner = build_runner(
        LIMITS,
        decoder,
        memory,
        graphs=Decoder(deep, views),
        mixed=Mixed(beside, LADDER, beside.rehearsal()),
    )
    recorder = Recorder()
    runner._graphs._capture = runner._graphs._mixed._capture = recorder
    seen: list[tuple[int, int]] = []
    rests: list[int] = []
    runner.warm_up(lambda *told: seen.append(told), lambda: rests.append(len(recorder.captured)))
    # No scratch moves behind a graph.
    assert recorder.captured == [40, 16, 8]
    assert recorder.rehearsed == [2, 2, 2], "a standby computes two layers, whatever the model has"
    assert seen[-1][0] == seen[-1][1] == 2 * len(runner._graphs.ladder) + 3
    assert [count for count in rests if count] == [1, 2, 3]
    assert not bool(memory.pool.any()), "a capture wrote a page that is not the trash page"


def test_an_engine_has_the_buckets_of_its_model(spec):
    memory = DeviceMemory.allocate(spec, LIMITS)
    views = WeightsLayout.of(spec, "float32").views(memory.weights)
    runner = build_engine(spec, LIMITS, views, memory, graphs=True)
    shape = {
        "hidden": spec.hidden_size,
        "intermediate": spec.intermediate_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
    }
    room = {"prefill_tokens": LIMITS.prefill_tokens, "rows_max": LIMITS.rows_max}
    assert runner._graphs._mixed.ladder == token_buckets(layers=2, **shape, **room) == (128,)


def test_a_layout_that_is_planned_on_the_host_is_never_captured(spec):
    class Baking(Rerun):
        bakes = True

    runner = make_runner(spec, LIMITS, graphs=True, token_buckets=LADDER)
    mixed = runner._graphs._mixed
    given = LIMITS, mixed._decoder, LADDER, mixed._layout, mixed._pool, mixed._weights
    with pytest.raises(InvariantError, match="plans on the host"):
        MixedGraphs(*given, capture=Baking())


def test_a_stream_beside_another_is_not_moved_by_larger_steps_of_it(spec):
    layout = WeightsLayout.of(spec, "float32")
    weights = layout.views(torch.zeros(layout.bytes, dtype=torch.uint8))
    decoder = Decoder(spec, weights)
    beside = decoder.beside()
    small = beside.stream(torch.zeros(8, dtype=torch.int64), 8)
    decoder.stream(torch.zeros(64, dtype=torch.int64), 64)
    again = beside.stream(torch.zeros(8, dtype=torch.int64), 8)
    assert small.x.data_ptr() == again.x.data_ptr() not in decoder.addresses
    assert beside.addresses == tuple(
        getattr(small, name).data_ptr() for name in ("x", "attended", "hidden")
    )
