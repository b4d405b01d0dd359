"""ops.mixed_arrays through Triton's interpreter: a bucket of fixed room computes any step that it
has room for, whatever step it had before, by tiles over pages and over gathered K and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_twin import Shape, Step, close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_gather_kv_kernel import Twin

from holdfast.errors import InvariantError
from holdfast.ops import kernels
from holdfast.ops.mixed_config import prompt_rows
from holdfast.ops.pinned import SLOTS, Ring
from holdfast.wire.envelope import Footing, MixedEnvelope, MixedShape, Refusal, admit_mixed

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*divide by zero.*:RuntimeWarning"),
]

SHAPE = Shape(page_tokens=3)
# Tokens of the longest row of a step that is judged for its room alone.
CONTEXT = 1000
# Query tokens and cached tokens of each row.
MIXES = {
    "a prompt beside many that decode": ([1, 1, 9, 1, 1, 1], [4, 0, 0, 19, 2, 7]),
    "prompts of all lengths": ([2, 17, 5], [0, 0, 0]),
    "a prompt goes on from the middle": ([1, 8, 1], [3, 131, 0]),
    "a prompt alone": ([31], [2]),
    "rows that decode alone": ([1, 1], [5, 128]),
    "the bucket is full": ([30, 1, 1], [0, 0, 9]),
    "each row has a tile of its own": ([2] * 8, [0] * 8),
}


@pytest.fixture(params=[True, False], ids=["gathered", "from pages"])
def bucket(request, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from mixed_twin import Bucket

    from holdfast.ops import attention_triton

    monkeypatch.setattr(attention_triton, "fits", lambda *shape: True)
    attention = attention_triton.TritonAttention(
        "cpu",
        rows_max=8,
        query_len_max=1,
        context_max=256,
        config_of=lambda _: attention_triton.DecodeConfig(block=16, splits=2),
        prefill_config=attention_triton.PrefillConfig(rows=16, block=16),
        make_gathered=Twin if request.param else None,
        **SHAPE.made_for(),
    )
    pool = Step(SHAPE, [1], [0]).pool
    found = Bucket(attention, pool, tokens=32, rows_max=8)
    assert (found.arrays.cut.gathered_tokens > 0) is request.param
    return found


@pytest.mark.parametrize("mix", list(MIXES))
def test_a_step_in_a_bucket_is_the_reference_and_padding_is_left_alone(bucket, mix):
    step = Step(SHAPE, *MIXES[mix])
    out, count = bucket.attend(step), step.qkv.shape[0]
    close(out[:count], step.reference())
    assert bool(out[count:].isnan().all()), "a program of nothing wrote a row"


def test_a_step_sees_nothing_of_the_larger_step_before_it(bucket):
    # In each of the slots that it comes from, too.
    for _ in range(SLOTS):
        bucket.put(Step(SHAPE, [20, 1, 5, 1, 3], [40, 1, 2, 3, 0]))
    step = Step(SHAPE, [4, 1], [1, 2], seed=3)
    out = bucket.attend(step)
    close(out[:5], step.reference())
    assert bool(out[5:].isnan().all())


def test_a_window_is_masked_as_in_every_other_step(bucket):
    step = Step(SHAPE, [9, 1, 6], [140, 20, 3])
    close(bucket.attend(step, window=5)[:16], step.windowed(5), "window")


def test_no_row_is_a_step_too(bucket):
    nothing = np.empty(0, np.int32)
    bucket.put(Step(SHAPE, [20, 1], [0, 9]))
    bucket.arrays.put(32, nothing, nothing, nothing)
    index = bucket.arrays.index(32)
    assert index.rows.tolist() == [-1] * index.rows.numel()
    for name in ("seen", "first_tokens", "tiles", "places", "owners", "used"):
        assert not bool(getattr(index, name).any()), name


def test_every_array_of_every_bucket_begins_on_a_line(bucket):
    from mixed_twin import MixedArrays

    arrays = MixedArrays(torch.device("cpu"), bucket.arrays.cut, rows_max=7, tokens_max=130)
    for tokens in (130, 5, 33):
        index = arrays.index(tokens)
        for name in ("rows", "seen", "first_tokens", "tiles", "places", "owners", "used"):
            array = getattr(index, name)
            assert array.numel() == 0 or array.data_ptr() % 16 == arrays.addresses[0] % 16, name


def test_what_a_bucket_has_no_room_for_is_never_cut_short(bucket):
    with pytest.raises(InvariantError, match="9 prompts in 8 and 8"):
        bucket.put(Step(SHAPE, [2] * 9, [0] * 9))
    with pytest.raises(InvariantError, match="tiles"):
        bucket.put(Step(SHAPE, [200], [0]))
    if bucket.arrays.cut.gathered_tokens:
        lens, starts = np.full(8, 2, np.int32), np.full(8, 1 << 12, np.int32)
        assert bucket.arrays.gathered_tokens(lens, starts) > bucket.arrays.cut.gathered_tokens
        with pytest.raises(InvariantError, match="pieces of the scratch"):
            bucket.arrays.put(32, np.arange(8, dtype=np.int32), lens, starts)
    else:
        assert bucket.arrays.gathered_tokens(np.array([9]), np.array([5])) == 0


@st.composite
def steps(draw) -> tuple[int, int, np.ndarray, np.ndarray, list[int]]:
    """(query tokens of a tile, rows_max, query lengths, tokens before them, buckets): at the edges
    of tiles, pieces of the scratch and the context, in buckets that are full or nearly so."""
    tile = draw(st.sampled_from([1, 3, 16, 42, 128]))
    rows_max = draw(st.integers(1, 24))
    count = draw(st.sampled_from([rows_max, draw(st.integers(1, rows_max))]))
    edges = [1, 2, tile, tile + 1, 2 * tile + 1]
    lens = draw(st.lists(st.sampled_from(edges), min_size=count, max_size=count))
    starts = [draw(st.sampled_from([0, 127, CONTEXT - length])) for length in lens]
    ladder = {sum(lens) + draw(st.sampled_from([-1, 0, 1, 64])), draw(st.integers(1, 900))}
    found = np.array(lens, np.int32), np.array(starts, np.int32)
    return tile, rows_max, *found, sorted(tokens for tokens in ladder if tokens > 0)


@settings(max_examples=300, deadline=None)
@given(step=steps(), gathers=st.booleans())
def test_a_step_that_is_admitted_to_a_bucket_has_room_in_all_of_its_arrays(step, gathers):
    """wire.envelope judges by numbers of its own; the arrays are never asked before."""
    from holdfast.ops.kernels import gather_config
    from holdfast.ops.mixed_arrays import MixedArrays, PromptCut

    tile, rows_max, lens, starts, ladder = step
    assume(ladder)
    # Of half the rows, so that not every step fits.
    room = gather_config.scratch_tokens(-(-rows_max // 2), CONTEXT) if gathers else 0
    cut = PromptCut(tile, room)
    arrays = MixedArrays(torch.device("cpu"), cut, rows_max=rows_max, tokens_max=ladder[-1])
    footing = Footing(1, 1, "page-major", "triton", ())
    envelopes = [
        MixedEnvelope(tokens, prompt_rows(tokens, rows_max), cut.gathered_tokens, CONTEXT, footing)
        for tokens in ladder
    ]
    total, prompts = int(lens.sum()), int(np.count_nonzero(lens > 1))
    shape = MixedShape(
        total, prompts, arrays.gathered_tokens(lens, starts), int((lens + starts).max())
    )
    found = admit_mixed(shape, footing, envelopes)
    if isinstance(found, Refusal):
        assert all(
            total > one.tokens or prompts > one.prompt_rows or shape.gathered_tokens > room
            for one in envelopes
        )
        return
    arrays.put(found.tokens, np.arange(lens.size, dtype=np.int32), lens, starts)
    index = arrays.index(found.tokens)
    assert int(index.tiles[2].sum()) == int(lens[lens > 1].sum())
    assert int((index.rows >= 0).sum()) == lens.size
    if gathers:
        assert int(index.used) * gather_config.ALIGN == shape.gathered_tokens


def test_a_step_is_not_laid_out_over_one_whose_copy_is_still_on_its_way(bucket):
    """One step ahead a copy may wait behind two steps, and its slot is read until then."""
    looks: list[str] = []

    class Event:
        def query(self) -> bool:
            looks.append("looked")
            return True

        def record(self) -> None:
            looks.append("told")

    step, arrays = Step(SHAPE, [4, 1], [1, 2]), bucket.arrays
    arrays._ring = Ring(torch.device("cpu"), arrays._buffer.numel(), Event)
    slots = []
    for _ in range(SLOTS + 1):
        bucket.put(step)
        slots.append(arrays._ring._turn)
    assert len(set(slots)) == SLOTS
    assert looks == ["told"] * SLOTS + ["looked", "told"]
