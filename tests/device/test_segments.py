"""device.segments on the CPU: steps with prompts, computed between their attentions by replays.

A `Rerun` stands for CUDA graphs, so this is the logic around a replay. The judge is a runner
without graphs: on a CPU in float32 rows of padding change no bit, so results are compared whole.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from devicekit import VOCAB, Hand, Request, make_runner

from holdfast.config import Limits
from holdfast.device.build import build_engine
from holdfast.device.capture import Rerun
from holdfast.device.memory import DeviceMemory
from holdfast.errors import InvariantError
from holdfast.model.decoder import Decoder
from holdfast.model.weights import WeightsLayout
from holdfast.ops.segment_config import token_buckets
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
    """Rerun that counts what is replayed, by bucket and segment; of bodies and tails nothing."""

    def __init__(self) -> None:
        self.rehearsed: list[tuple[int, int]] = []
        self.captured: list[tuple[int, int]] = []
        self.replays: list[tuple[int, int]] = []

    def capture(self, work, rehearsal=None):
        (rehearsal or work)()
        if work.func.__name__ != "segment":
            return work
        index, stream = work.args
        name = (stream.tokens.numel(), index)
        self.captured.append(name)
        if rehearsal is None:
            self.rehearsed.append(name)

        def replay() -> None:
            self.replays.append(name)
            work()

        return replay


def recorded(spec, ladder=LADDER, **options) -> tuple[Hand, Recorder]:
    runner = make_runner(spec, LIMITS, graphs=True, token_buckets=ladder, **options)
    recorder = Recorder()
    runner._graphs._capture = runner._graphs._segments._capture = recorder
    runner.warm_up()
    return Hand(runner), recorder


class Pair:
    """The same plans for a runner without graphs and for one with segments."""

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
        """Buckets of the replays since this was asked last, each of all its segments in order."""
        names, self.recorder.replays = self.recorder.replays, []
        segments = self.graphed.runner._graphs._segments._decoder.segments
        buckets = [names[at][0] for at in range(0, len(names), segments)]
        assert names == [(bucket, at) for bucket in buckets for at in range(segments)]
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


def test_padding_that_is_not_finite_reaches_no_row_of_the_step(pair):
    """What attention leaves behind a step's tokens is anybody's, here as bad as it can be."""
    ops = pair.graphed.runner._graphs._segments._decoder.ops
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
    segments = pair.graphed.runner._graphs._segments
    old = segments._tokens
    segments._tokens = old.clone()
    rows: list[int] = []
    begin = segments._decoder.begin
    segments._decoder.begin = lambda *given: rows.append(given[3]) or begin(*given)
    pair.run([(1, 10, 0)])
    assert pair.replayed() == [16] and rows == [16]
    assert pair.stats.eager_steps == {"address_moved": 1}
    segments._tokens = old
    pair.run([(1, 1, 1)])
    pair.admit(2, Request(prompt_of(1, 7)))
    pair.run([(2, 7, 1)])
    assert pair.replayed() == [8]


def test_weights_that_moved_are_noticed(pair):
    segments = pair.graphed.runner._graphs._segments
    segments._weights = segments._weights.clone()
    pair.admit(1, Request(prompt_of(1, 5)))
    pair.run([(1, 5, 1)])
    assert pair.replayed() == [] and pair.stats.eager_steps == {"address_moved": 1}


def test_graphs_that_are_disabled_have_no_segments_either(pair):
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


def test_the_largest_bucket_is_captured_first_so_that_no_scratch_moves_behind_a_graph(spec):
    hand, recorder = recorded(spec)
    segments = hand.runner._graphs._segments
    assert recorder.captured == [(tokens, at) for tokens in (40, 16, 8) for at in range(3)]
    for name in ("tokens", "x", "attended", "hidden"):
        streams = [captured.stream for captured in segments._captured.values()]
        assert len({getattr(stream, name).data_ptr() for stream in streams}) == 1, name


def test_every_segment_is_captured_and_counted_and_few_of_them_are_rehearsed(spec):
    deep = replace(spec, layers=4)
    memory = DeviceMemory.allocate(deep, LIMITS)
    memory.weights.view(torch.float32).normal_(std=0.05)
    views = WeightsLayout.of(deep, "float32").views(memory.weights)
    runner = build_engine(deep, LIMITS, views, memory, graphs=True)
    recorder = Recorder()
    runner._graphs._capture = runner._graphs._segments._capture = recorder
    seen: list[tuple[int, int]] = []
    rests: list[int] = []
    runner.warm_up(lambda *told: seen.append(told), lambda: rests.append(len(recorder.captured)))
    ladder = token_buckets(
        layers=4,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        prefill_tokens=LIMITS.prefill_tokens,
        rows_max=LIMITS.rows_max,
    )
    assert ladder == (128,)
    assert recorder.captured == [(tokens, at) for tokens in reversed(ladder) for at in range(5)]
    assert recorder.rehearsed == [(tokens, at) for tokens in reversed(ladder) for at in (0, 1, 4)]
    # Every capture is counted, and after a bucket there is one rest.
    assert seen[-1][0] == seen[-1][1] == 2 * len(runner._graphs.ladder) + 5 * len(ladder)
    assert seen[-1][0] - seen[-2][0] == 5
    assert [count for count in rests if count] == [5 * at for at in range(1, len(ladder) + 1)]


def test_segments_that_leave_their_result_in_several_places_are_never_captured(spec):
    """As the reference's, whose products are tensors of their own."""

    class Baking(Rerun):
        bakes = True

    runner = make_runner(spec, LIMITS, graphs=True, token_buckets=LADDER)
    segments = runner._graphs._segments
    segments._capture = Baking()
    kept = []
    product = segments._decoder.ops.linear
    segments._decoder.ops.linear = lambda *given: kept.append(product(*given)) or kept[-1]
    with pytest.raises(InvariantError, match="leave q, k and v in 2 places"):
        segments.capture(lambda done: None, lambda: None)


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
