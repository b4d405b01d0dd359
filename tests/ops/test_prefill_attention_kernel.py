"""ops.kernels.prefill_attention and ops.attention_triton through Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_twin import LAYER, Shape, Step, close

from holdfast.errors import InvariantError
from holdfast.ops import kernels
from holdfast.ops.attention import Scratch

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    # What a NaN or an infinity is for, numpy calls an accident.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*divide by zero.*:RuntimeWarning"),
]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Read where the modules' kernels are decorated.
    from holdfast.ops import attention_triton

    return attention_triton


def made(module, shape: Shape, *, rows_max=64, query_len_max=1, rows=16, block=16):
    """TritonAttention of small programs: `rows` query rows and `block` positions each."""
    return module.TritonAttention(
        "cpu",
        rows_max=rows_max,
        query_len_max=query_len_max,
        context_max=256,
        config_of=lambda _: module.DecodeConfig(block=16, splits=2),
        prefill_config=module.PrefillConfig(rows=rows, block=block),
        **shape.made_for(),
    )


def planned(module, step: Step, **options):
    attention = made(module, step.shape, **options)
    plan = attention.plan(
        step.batch(),
        step.pool,
        step.shape.heads,
        step.shape.kv_heads,
        step.qkv.dtype,
        Scratch(step.qkv.device),
    )
    return attention, plan


def run(module, step: Step, *, window=0, **options) -> torch.Tensor:
    attention, plan = planned(module, step, **options)
    out = step.out()
    attention.attend(plan, step.pool, LAYER, step.qkv, out, window)
    return out


@pytest.mark.parametrize("page_tokens", [1, 3, 16])
def test_chunks_at_the_edges_of_pages_tiles_and_blocks_match_the_reference(module, page_tokens):
    # Tiles of 8 tokens (16 rows, groups of 2) and blocks of 16 positions.
    lens = [2, 7, 8, 9, 15, 16, 17, 33, 5, 8, 9]
    starts = [0, 0, 0, 0, 1, 0, 0, 0, 11, 24, 30]
    step = Step(Shape(page_tokens=page_tokens), lens, starts)
    close(run(module, step), step.reference())


@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (3, 80), (4, 128), (7, 64), (8, 80), (20, 96)]
)
def test_any_group_and_head_dim_matches_the_reference(module, group, head_dim):
    shape = Shape(group=group, head_dim=head_dim, page_tokens=16)
    step = Step(shape, [5, 2], [14, 0])
    close(run(module, step), step.reference())


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_a_window_sees_as_many_positions_and_never_reads_what_it_forgot(module, window):
    lens, starts = [9, 20, 3, 33], [0, 3, window + 7, 16]
    step = Step(Shape(page_tokens=4), lens, starts)
    expected = step.windowed(window)
    step.forget([max(0, start - window + 1) for start in starts], column_page=0)
    close(run(module, step, window=window), expected, window)


def test_decode_rows_between_chunks_go_to_the_split_kernel_and_match_too(module, monkeypatch):
    from holdfast.ops.kernels import decode_attention

    seen = []
    inner = decode_attention.DecodeAttention.run
    monkeypatch.setattr(
        decode_attention.DecodeAttention,
        "run",
        lambda self, *args, **kwargs: (seen.append(args[4].tolist()), inner(self, *args, **kwargs)),
    )
    lens, starts = [1, 9, 1, 1, 17, 1], [20, 3, 0, 47, 0, 9]
    step = Step(Shape(group=3, page_tokens=3), lens, starts)
    close(run(module, step), step.reference())
    assert seen == [[21, 1, 48, 10]]


def test_rows_that_are_alike_and_short_are_decoded_with_their_drafts(module):
    step = Step(Shape(), [3] * 4, [0, 12, 14, 30])
    attention, plan = planned(module, step, query_len_max=4)
    assert plan.tiles.numel() == 0 and plan.query_len == 3 and plan.first_tokens is None
    out = step.out()
    attention.attend(plan, step.pool, LAYER, step.qkv, out)
    close(out, step.reference())
    _, chunked = planned(module, step, query_len_max=2)
    assert chunked.lengths.numel() == 0 and chunked.tiles.shape[0] == 4


def test_static_buffers_give_the_bits_of_the_planned_step(module):
    step = Step(Shape(), [1] * 5, [3, 40, 15, 0, 22])
    attention, plan = planned(module, step)
    expected = step.out()
    attention.attend(plan, step.pool, LAYER, step.qkv, expected)
    table = torch.zeros(5, step.table.shape[1] + 9, dtype=torch.int32)
    table[:, : step.table.shape[1]] = torch.from_numpy(step.table)
    lengths, out = torch.from_numpy(step.lengths), step.out()
    attention.require_static(step.pool, step.qkv, table, lengths, out, 1)
    attention.decode(step.pool, LAYER, step.qkv, table, lengths, out)
    assert torch.equal(out, expected)


def test_nan_of_one_row_stays_in_that_row(module):
    step = Step(Shape(), [5, 20, 1], [3, 4, 7])
    step.pool[int(step.table[1, 1]), LAYER] = float("nan")
    out = run(module, step)
    assert not bool(out[:5].isnan().any()) and not bool(out[25:].isnan().any())
    assert bool(out[5:25].isnan().all())


def test_bfloat16_chunks_are_served_within_their_precision(module):
    step = Step(Shape(head_dim=64, page_tokens=16), [20], [7], dtype=torch.bfloat16)
    out = run(module, step).float()
    torch.testing.assert_close(out, step.reference(), atol=2e-2, rtol=2e-2)


def test_tiles_cover_each_query_token_once_and_the_longest_come_first(module):
    lens, starts = np.array([1, 40, 16, 17], np.int32), np.array([9, 0, 200, 3], np.int32)
    from holdfast.ops.kernels.prefill_attention import cut_tiles

    row, first, count, position = cut_tiles(lens, starts, 16)
    covered = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
    assert sorted(covered.tolist()) == list(range(74))
    assert count.max() == 16 and bool((np.diff(position + count) <= 0).all())
    offsets = first - (np.cumsum(lens) - lens)[row]
    assert np.array_equal(position, starts[row] + offsets)


def test_a_step_of_another_shape_or_of_a_page_outside_the_pool_is_our_bug(module):
    step = Step(Shape(), [4, 1], [0, 5])
    attention = made(module, step.shape)
    scratch, dtype = Scratch(step.qkv.device), step.qkv.dtype
    with pytest.raises(InvariantError, match="heads"):
        attention.plan(step.batch(), step.pool, 8, 2, dtype, scratch)
    with pytest.raises(InvariantError, match="KV pool"):
        attention.plan(step.batch(), step.pool[..., :8].contiguous(), 4, 2, dtype, scratch)
    step.table[0, 0] = step.pool.shape[0]
    with pytest.raises(InvariantError, match="pages"):
        attention.plan(step.batch(), step.pool, 4, 2, dtype, scratch)
    with pytest.raises(InvariantError, match="2 rows"):
        alone = made(module, step.shape, rows_max=1)
        lengths, table = torch.from_numpy(step.lengths), torch.from_numpy(step.table)
        alone.require_static(step.pool, step.qkv, table, lengths, step.out(), 1)
