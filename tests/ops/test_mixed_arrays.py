"""ops.mixed_arrays through Triton's interpreter: a bucket of fixed room computes any step that it
has room for, whatever step it had before, by tiles over pages and over gathered K and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_twin import Shape, Step, close
from test_gather_kv_kernel import Twin

from holdfast.errors import InvariantError
from holdfast.ops import kernels
from holdfast.ops.pinned import SLOTS

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*divide by zero.*:RuntimeWarning"),
]

SHAPE = Shape(page_tokens=3)
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
