"""ops.mixed_config: which token buckets a model has and what they hold, as its docstring says."""

from __future__ import annotations

import itertools

import pytest

from holdfast.ops.mixed_config import (
    ALIGN,
    LAYERS_MAX,
    layer_parameters,
    prompt_rows,
    token_buckets,
)

SMALL = {"hidden": 1024, "intermediate": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128}
EIGHT = {"hidden": 4096, "intermediate": 12288, "heads": 32, "kv_heads": 8, "head_dim": 128}
TINY = {"hidden": 64, "intermediate": 176, "heads": 4, "kv_heads": 4, "head_dim": 16}
HUGE = {"hidden": 16384, "intermediate": 53248, "heads": 128, "kv_heads": 8, "head_dim": 128}


def test_a_small_model_has_buckets_for_every_mixed_step_and_a_large_one_few_or_none():
    room = {"prefill_tokens": 8192, "rows_max": 256}
    small = token_buckets(layers=28, **SMALL, **room)
    assert small == (*range(128, 1025, 128), 1280, 1536, 1792, 2048, 2304, 2560)
    assert token_buckets(layers=36, **EIGHT, **room) == (128, 256, 384, 512)
    assert token_buckets(layers=126, **HUGE, **room) == ()


@pytest.mark.parametrize("shape", [SMALL, EIGHT, TINY])
@pytest.mark.parametrize("layers", [1, 2, 28, 80, 399, 1000])
@pytest.mark.parametrize(("prefill", "rows"), [(1, 1), (120, 8), (121, 8), (512, 64), (8192, 256)])
def test_buckets_rise_in_tiles_and_never_exceed_a_step_or_the_graphs_there_may_be(
    shape, layers, prefill, rows
):
    found = token_buckets(layers=layers, **shape, prefill_tokens=prefill, rows_max=rows)
    assert list(found) == sorted(set(found)) and all(tokens % ALIGN == 0 for tokens in found)
    assert len(found) * layers <= LAYERS_MAX
    if found:
        assert found[-1] < prefill + rows + ALIGN
        # The host is what waits at the largest: 350 us a layer, 700e12 operations a second.
        assert 2 * layer_parameters(**shape) * found[-1] / 700e12 <= 350e-6
    for below, above in itertools.pairwise(found):
        assert above - below == ALIGN or above <= below * 1.25


def test_a_step_as_large_as_it_may_be_has_a_bucket_where_the_model_is_small():
    assert token_buckets(layers=2, **TINY, prefill_tokens=500, rows_max=64)[-1] == 640
    assert token_buckets(layers=2, **TINY, prefill_tokens=448, rows_max=64)[-1] == 512


def test_a_larger_bucket_never_has_room_for_fewer_prompts_and_none_for_more_than_rows():
    for rows_max in (1, 9, 256):
        room = [prompt_rows(tokens, rows_max) for tokens in range(128, 4096, 128)]
        assert room == sorted(room) and room[0] == min(10, rows_max) and room[-1] <= rows_max
