"""Graph admission: the smallest graph that is right for the step, or the reason why none is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.wire.envelope import (
    ANY,
    BEYOND,
    WITHIN,
    Envelope,
    Footing,
    Graphs,
    MixedEnvelope,
    MixedShape,
    Refusal,
    StepShape,
    admit,
    admit_mixed,
    bucket_of,
    buckets,
    has_room,
    in_phase,
    shape_of,
)

WINDOW = 32
WINDOWS = (0, WINDOW)
NOW = Footing(3, 1, "page-major", "reference", (100, 200))


def graph(rows=4, query_len=1, context=64, phase=WITHIN, **footing) -> Envelope:
    return Envelope(rows, query_len, context, (ANY, phase), NOW._replace(**footing))


def step(rows=4, query_len=1, seen=(5, 9), **fields) -> StepShape:
    base = {"prefill": False, "moves_bytes": False}
    return StepShape(rows, query_len, seen_min=seen[0], seen_max=seen[1], **(base | fields))


def judge(shape: StepShape, *graphs: Envelope, **options) -> Envelope | Refusal:
    return admit(shape, NOW, Graphs(graphs, WINDOWS, **options))


@pytest.mark.parametrize("rows_max", [1, 2, 3, 4, 5, 7, 8, 9, 16, 20, 33, 256, 257, 300, 320, 4096])
def test_buckets_rise_and_end_with_rows_max(rows_max):
    ladder = buckets(rows_max)
    assert ladder[-1] == rows_max
    assert list(ladder) == sorted(set(ladder))
    assert ladder[0] == 1


def test_the_ladder_of_buckets():
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert buckets(24) == (1, 2, 4, 8, 16, 24)
    assert buckets(400)[-5:] == (248, 256, 320, 384, 400)
    assert len(buckets(4096)) == 95


@pytest.mark.parametrize("rows_max", [1, 3, 20, 33, 300])
def test_every_number_of_rows_has_the_smallest_bucket_that_holds_it(rows_max):
    ladder = buckets(rows_max)
    for rows in range(1, rows_max + 1):
        assert bucket_of(rows, ladder) == min(b for b in ladder if b >= rows)


@pytest.mark.parametrize("bucket", [1, 2, 4, 8, 16, 24, 33])
def test_a_batch_at_a_bucket_s_boundary_gets_that_bucket_and_one_more_row_the_next(bucket):
    graphs = [graph(rows) for rows in buckets(33)]
    assert judge(step(bucket), *graphs).rows == bucket
    if bucket > 1:
        assert judge(step(bucket - 1), *graphs).rows == bucket_of(bucket - 1, buckets(33))
    after = judge(step(bucket + 1), *graphs)
    assert after == Refusal.TOO_MANY_ROWS if bucket == 33 else after.rows > bucket


@pytest.mark.parametrize(
    ("seen", "phase"),
    [
        ((1, WINDOW - 1), WITHIN),
        ((1, WINDOW), WITHIN),
        ((WINDOW, WINDOW), WITHIN),  # both are right; the order of phases decides
        ((WINDOW - 1, WINDOW + 1), None),
        ((WINDOW, WINDOW + 1), BEYOND),
        ((WINDOW + 1, WINDOW + 1), BEYOND),
        ((1, WINDOW + 1), None),
    ],
)
def test_the_window_phase_changes_exactly_where_a_token_falls_out_of_sight(seen, phase):
    found = judge(step(seen=seen), graph(phase=WITHIN), graph(phase=BEYOND))
    assert found == (Refusal.WINDOW_PHASE if phase is None else graph(phase=phase))
    assert judge(step(seen=seen), graph(phase=ANY)) == graph(phase=ANY)


@given(
    phase=st.sampled_from([WITHIN, BEYOND]),
    window=st.integers(1, 6),
    length=st.integers(0, 14),
    query_len=st.integers(1, 4),
)
def test_a_phase_holds_where_what_it_bakes_in_is_what_each_query_token_sees(
    phase, window, length, query_len
):
    seen = range(length + 1, length + query_len + 1)
    truly = [max(0, count - window) for count in seen]
    baked = [0 if phase == WITHIN else count - window for count in seen]
    assert in_phase(phase, window, seen[0], seen[-1]) == (truly == baked)


@pytest.mark.parametrize(("longest", "admitted"), [(63, True), (64, True), (65, False)])
def test_a_context_is_admitted_up_to_the_width_of_the_captured_page_table(longest, admitted):
    only = graph(phase=ANY)
    want = only if admitted else Refusal.CONTEXT_TOO_LONG
    assert judge(step(seen=(1, longest)), only) == want


def test_the_shorter_page_table_is_chosen_while_it_suffices():
    short, long = graph(context=16), graph(context=64)
    assert judge(step(seen=(1, 16)), long, short) == short
    assert judge(step(seen=(1, 17)), long, short) == long


@pytest.mark.parametrize(
    ("shape", "captured", "reason"),
    [
        (step(0), graph(), "empty"),
        (step(prefill=True), graph(), "prefill"),
        (step(query_len=0), graph(), "mixed_query_lens"),
        (step(moves_bytes=True), graph(), "bytes_moved"),
        (step(query_len=2), graph(), "not_captured"),
        (step(), graph(layout="layer-major"), "not_captured"),
        (step(), graph(attention="fa2"), "not_captured"),
        (step(5), graph(), "too_many_rows"),
        (step(), graph(pool_epoch=2), "pool_epoch"),
        (step(), graph(pool_epoch=4), "pool_epoch"),
        (step(), graph(weights_epoch=2), "weights_epoch"),
        (step(), graph(addresses=(100, 201)), "address_moved"),
        (step(), graph(addresses=(100,)), "address_moved"),
        (step(seen=(1, 65)), graph(phase=ANY), "context_too_long"),
        (step(seen=(1, 33)), graph(), "window_phase"),
    ],
)
def test_what_is_outside_is_refused_by_name(shape, captured, reason):
    assert judge(shape, captured) == reason


def test_graphs_that_are_switched_off_admit_nothing():
    assert judge(step(), graph(), enabled=False) == "disabled"
    assert judge(step()) == "not_captured"


def test_the_reason_is_of_the_graph_that_came_furthest():
    old, short = graph(pool_epoch=2), graph(context=8)
    assert judge(step(), old, short) == "context_too_long"
    assert judge(step(), old) == "pool_epoch"


def test_a_graph_names_a_phase_for_each_layer_group():
    with pytest.raises(ValueError, match="phases"):
        Graphs([Envelope(1, 1, 64, (ANY,), NOW)], WINDOWS)


@pytest.mark.parametrize(
    ("query_lens", "drafts", "query_len", "prefill"),
    [
        ([1, 1, 1], [], 1, False),
        ([1], [], 1, False),
        ([3, 3], [2, 2], 3, False),
        ([3, 1], [2, 0], 0, False),
        ([3, 3], [], 3, True),
        ([1, 2], [], 0, True),
        ([3, 3], [2, 1], 3, True),  # a row that computes two known tokens is no verification
        ([4], [2], 4, True),
    ],
)
def test_the_shape_of_a_step_tells_decode_verification_and_prefill_apart(
    query_lens, drafts, query_len, prefill
):
    lengths = np.arange(7, 7 + len(query_lens), dtype=np.int32)
    counts = np.array(drafts, np.uint8)
    shape = shape_of(np.array(query_lens, np.int32), lengths, lengths + 2, counts)
    assert (shape.rows, shape.query_len, shape.prefill) == (len(query_lens), query_len, prefill)
    assert shape.seen_min == 8
    assert shape.seen_max == max(
        length + 2 + query for length, query in zip(lengths, query_lens, strict=True)
    )


def test_a_step_without_rows_has_a_shape_too():
    none = np.empty(0, np.int32)
    assert judge(shape_of(none, none, none), graph()) == "empty"


# --- against an oracle of its own ---

near = st.sampled_from
footings = st.builds(
    Footing,
    near([2, 3]),
    near([1, 2]),
    near(["page-major", "layer-major"]),
    near(["reference", "fa2"]),
    near([(100, 200), (100, 201)]),
)
envelopes = st.builds(
    Envelope,
    near([1, 2, 4, 8]),
    near([1, 3]),
    near([31, 32, 33, 64]),
    st.tuples(st.just(ANY), near([WITHIN, BEYOND, ANY])),
    st.one_of(st.just(NOW), footings),
)
shapes = st.builds(
    StepShape,
    near([-1, 0, 1, 2, 3, 4, 5, 7, 8, 9]),
    near([0, 1, 2, 3]),
    near([False, False, True]),
    near([False, False, True]),
    near([1, 31, 32, 33]),
    near([1, 31, 32, 33, 34, 63, 64, 65]),
)

# Each condition said again, apart from the order in which admit tries graphs.
CONDITIONS = (
    (
        "not_captured",
        lambda g, s: (g.query_len, g.footing[2:4]) == (s.query_len, NOW[2:4]),
    ),
    ("too_many_rows", lambda g, s: g.rows >= s.rows),
    ("pool_epoch", lambda g, s: g.footing.pool_epoch == 3),
    ("weights_epoch", lambda g, s: g.footing.weights_epoch == 1),
    ("address_moved", lambda g, s: g.footing.addresses == (100, 200)),
    ("context_too_long", lambda g, s: s.seen_max <= g.context_tokens),
    (
        "window_phase",
        lambda g, s: {WITHIN: s.seen_max <= WINDOW, BEYOND: s.seen_min >= WINDOW, ANY: True}[
            g.phases[1]
        ],
    ),
)


def oracle(shape: StepShape, graphs: list[Envelope]) -> Envelope | str:
    for unfit, reason in (
        (shape.rows < 1, "empty"),
        (shape.prefill, "prefill"),
        (shape.query_len < 1, "mixed_query_lens"),
        (shape.moves_bytes, "bytes_moved"),
    ):
        if unfit:
            return reason
    for reason, holds in CONDITIONS:
        graphs = [g for g in graphs if holds(g, shape)]
        if not graphs:
            return reason
    return min(graphs, key=lambda g: (g.rows, g.context_tokens, g.phases))


@settings(max_examples=1500, deadline=None)
@given(shapes, st.lists(envelopes, max_size=8))
def test_admission_agrees_with_a_brute_force_oracle(shape, graphs):
    assert judge(shape, *graphs) == oracle(shape, graphs)


def mixed(tokens=128, prompts=4, gathered=1024, **footing) -> MixedEnvelope:
    return MixedEnvelope(tokens, prompts, gathered, 512, NOW._replace(**footing))


def prompts_of(tokens=5, prompts=1, gathered=128, seen=20) -> MixedShape:
    return MixedShape(tokens, prompts, gathered, seen)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 128), (128, 128), (129, 256), (256, 256), (257, 640), (640, 640)]
)
def test_a_step_with_prompts_has_the_smallest_graph_that_holds_its_tokens(tokens, bucket):
    captured = [mixed(128), mixed(256), mixed(640)]
    assert admit_mixed(prompts_of(tokens), NOW, captured) == mixed(bucket)


@pytest.mark.parametrize(
    ("shape", "captured", "reason"),
    [
        (prompts_of(0), [mixed()], "empty"),
        (prompts_of(), [], "not_captured"),
        (prompts_of(), [mixed(layout="layer-major")], "not_captured"),
        (prompts_of(), [mixed(attention="fa2")], "not_captured"),
        (prompts_of(129), [mixed()], "too_many_tokens"),
        (prompts_of(prompts=5), [mixed()], "too_many_prompts"),
        (prompts_of(gathered=1152), [mixed()], "too_many_gathered"),
        (prompts_of(seen=513), [mixed()], "context_too_long"),
        (prompts_of(), [mixed(pool_epoch=2)], "pool_epoch"),
        (prompts_of(), [mixed(weights_epoch=4)], "weights_epoch"),
        (prompts_of(), [mixed(addresses=(100, 201))], "address_moved"),
        (prompts_of(129), [mixed(), mixed(256, addresses=())], "address_moved"),
        (prompts_of(seen=513), [mixed(addresses=())], "address_moved"),
        # As `admit` has it: the reason is of the graph that came furthest.
        (prompts_of(prompts=5), [mixed(), mixed(256, prompts=8, pool_epoch=2)], "pool_epoch"),
        (prompts_of(), [mixed(pool_epoch=2), mixed(256, weights_epoch=2)], "weights_epoch"),
        (prompts_of(), [mixed(addresses=()), mixed(256, pool_epoch=2)], "address_moved"),
    ],
)
def test_a_step_with_prompts_that_no_graph_may_be_replayed_for_has_one_reason(
    shape, captured, reason
):
    assert admit_mixed(shape, NOW, captured) is Refusal(reason)


def test_graphs_that_are_too_small_or_moved_do_not_hide_larger_ones_that_hold():
    captured = [mixed(128), mixed(256, addresses=()), mixed(640, prompts=9)]
    assert admit_mixed(prompts_of(200), NOW, captured) == captured[-1]
    assert admit_mixed(prompts_of(prompts=9), NOW, captured) == captured[-1]


def test_whether_a_graph_has_room_is_no_matter_of_where_it_stands():
    assert has_room(prompts_of(), mixed(pool_epoch=9))
    assert not has_room(prompts_of(seen=513), mixed()) and not has_room(prompts_of(129), mixed())
