"""ops.kernels.gather_kv and bulk_prefill through Triton's interpreter, against the dense twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_twin import LAYER, NAN, Shape, Step, close

from holdfast.ops import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    # What a NaN or an infinity is for, numpy calls an accident.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*divide by zero.*:RuntimeWarning"),
]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Read where the modules' kernels are decorated.
    from holdfast.ops.kernels import bulk_prefill, gather_kv

    return bulk_prefill, gather_kv


def run(modules, step: Step, *, window=0, rows=16, block=16, **options) -> torch.Tensor:
    """out of the step by small programs, over a scratch full of NaN."""
    from holdfast.ops.kernels.prefill_attention import cut_tiles

    bulk, gather = modules
    shape = step.shape
    tokens = gather.placed_tokens(step.lengths)
    scratch = torch.full((2, shape.kv_heads, tokens, shape.head_dim), NAN, dtype=step.pool.dtype)
    places = torch.from_numpy(gather.place_rows(step.lengths, step.starts))
    table = torch.from_numpy(step.table)
    longest = int(step.lengths.max())
    gather.gather_kv(step.pool, LAYER, table, places, scratch, longest, window=window)
    attention = bulk.BulkPrefill(
        scratch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        config=bulk.BulkConfig(rows=rows, block=block, **options),
    )
    tiles = torch.from_numpy(cut_tiles(step.lens, step.starts, attention.tile_tokens))
    out = step.out()
    attention.run(step.qkv, places, tiles, out, window=window)
    return out


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("page_tokens", [1, 3, 16])
def test_chunks_at_the_edges_of_pages_tiles_and_blocks_match_the_reference(
    modules, page_tokens, ahead
):
    # Tiles of 8 tokens (16 rows, groups of 2) and blocks of 16 positions.
    lens = [1, 2, 7, 8, 9, 15, 16, 17, 33, 5, 8, 9]
    starts = [0, 0, 0, 0, 0, 1, 0, 0, 0, 11, 24, 127]
    step = Step(Shape(page_tokens=page_tokens), lens, starts)
    close(run(modules, step, ahead=ahead), step.reference())


@pytest.mark.parametrize(
    ("group", "head_dim", "heads"),
    [(1, 64, 0), (3, 80, 0), (4, 128, 1), (4, 128, 2), (7, 64, 0), (8, 80, 8), (20, 96, 0)],
)
def test_any_group_head_dim_and_cut_of_a_group_matches_the_reference(
    modules, group, head_dim, heads
):
    shape = Shape(group=group, head_dim=head_dim, page_tokens=16)
    step = Step(shape, [5, 2], [14, 0])
    close(run(modules, step, heads=heads, tiles_first=heads > 0), step.reference())


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_a_window_sees_as_many_positions_and_never_reads_what_it_forgot(modules, window, ahead):
    lens, starts = [9, 20, 3, 33], [0, 3, window + 7, 150]
    step = Step(Shape(page_tokens=4), lens, starts)
    expected = step.windowed(window)
    step.forget([max(0, start - window + 1) for start in starts], column_page=0)
    close(run(modules, step, window=window, ahead=ahead), expected, window)


def test_nan_of_one_row_stays_in_that_row(modules):
    step = Step(Shape(), [5, 20, 1], [3, 4, 7])
    step.pool[int(step.table[1, 1]), LAYER] = NAN
    out = run(modules, step)
    assert not bool(out[:5].isnan().any()) and not bool(out[25:].isnan().any())
    assert bool(out[5:25].isnan().all())


def test_bfloat16_chunks_are_served_within_their_precision(modules):
    step = Step(Shape(head_dim=64, page_tokens=16), [20], [7], dtype=torch.bfloat16)
    torch.testing.assert_close(run(modules, step).float(), step.reference(), atol=2e-2, rtol=2e-2)


def test_the_scratch_has_each_row_in_order_and_zeros_around_it(modules):
    _, gather = modules
    step = Step(Shape(page_tokens=3), [4, 140], [0, 10])
    tokens = gather.placed_tokens(step.lengths)
    assert tokens == 128 + 256
    places = gather.place_rows(step.lengths, step.starts)
    assert places.tolist() == [[0, 128], [4, 150], [0, 10]]
    scratch = torch.full((2, 2, tokens, 16), NAN)
    table = torch.from_numpy(step.table)
    gather.gather_kv(step.pool, LAYER, table, torch.from_numpy(places), scratch, 150)
    for row, (place, length) in enumerate(zip(*places[:2].tolist(), strict=True)):
        at = np.arange(length)
        pages = torch.from_numpy(step.table[row, at // 3].astype(np.int64))
        kv = step.pool[pages, LAYER, :, at % 3].permute(1, 2, 0, 3)
        assert torch.equal(scratch[:, :, place : place + length], kv)
        span = -(-length // 128) * 128
        assert not bool(scratch[:, :, place + length : place + span].any())
