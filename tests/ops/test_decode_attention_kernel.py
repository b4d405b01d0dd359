"""ops.kernels.decode_attention through Triton's interpreter, against the torch reference.

What the interpreter cannot show (that it compiles, spills, how fast it is) is
test_kernels_compile's and tools/gpu/bench_attention's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from attention_twin import LAYER, Shape, Step, close

from holdfast.ops import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    # What a NaN or an infinity is for, numpy calls an accident.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*divide by zero.*:RuntimeWarning"),
]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Read where the module's kernels are decorated.
    from holdfast.ops.kernels import decode_attention

    return decode_attention


def run(module, step: Step, *, query_len=1, window=0, splits=3, block=16, **options):
    """out of a kernel with so many splits of whole blocks."""
    attention = module.DecodeAttention(
        "cpu",
        rows_max=step.lens.size,
        query_len_max=query_len,
        context_max=4096,
        config_of=lambda rows: module.DecodeConfig(block=block, splits=splits, **options),
        **step.shape.made_for(),
    )
    out = step.out()
    # What a split did not write is never what this step is made of.
    attention._partial.fill_(float("nan"))
    attention._partial_lse.fill_(float("nan"))
    attention.run(
        step.qkv,
        step.pool,
        LAYER,
        torch.from_numpy(step.table),
        torch.from_numpy(step.lengths),
        out,
        query_len=query_len,
        window=window,
    )
    return out


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page_tokens", [1, 3, 16])
def test_lengths_at_the_edges_of_pages_and_blocks_match_the_reference(module, page_tokens, splits):
    edges = {1, 2, 15, 16, 17, 31, 32, 33, 49}
    for size in (page_tokens, 2 * page_tokens):
        edges |= {max(1, size - 1), size, size + 1}
    lengths = sorted(edges)
    step = Step(Shape(page_tokens=page_tokens), [1] * len(lengths), [n - 1 for n in lengths])
    close(run(module, step, splits=splits), step.reference())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
def test_any_number_of_rows_matches_the_reference(module, rows):
    shape = Shape(group=1, kv_heads=1, page_tokens=3)
    step = Step(shape, [1] * rows, [(7 * row) % 23 for row in range(rows)])
    close(run(module, step, splits=2), step.reference())


@pytest.mark.parametrize("query_len", [2, 3, 4])
def test_drafts_see_what_lies_before_them_and_not_each_others_future(module, query_len):
    starts = [0, 1, 12, 13, 14, 15, 16, 30]
    step = Step(Shape(group=3, kv_heads=1), [query_len] * len(starts), starts)
    for splits in (1, 2, 4):
        close(run(module, step, query_len=query_len, splits=splits), step.reference(), splits)


@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (3, 80), (4, 128), (7, 64), (8, 80), (20, 96)]
)
def test_any_group_and_head_dim_matches_the_reference(module, group, head_dim):
    shape = Shape(group=group, head_dim=head_dim, page_tokens=16)
    step = Step(shape, [2] * 3, [0, 18, 39])
    close(run(module, step, query_len=2), step.reference())


def test_a_group_that_no_product_holds_is_cut_into_several(module):
    step = Step(Shape(group=40, kv_heads=1), [2] * 2, [0, 21])
    close(run(module, step, query_len=2), step.reference())


@pytest.mark.parametrize("query_len", [1, 3])
def test_a_window_sees_as_many_positions_and_never_reads_what_it_forgot(module, query_len):
    window = 10
    lengths = [query_len, window - 1, window, window + 1, 25, 26, 27, 28, 50]
    lengths = [max(query_len, n) for n in lengths]
    starts = [n - query_len for n in lengths]
    step = Step(Shape(page_tokens=4), [query_len] * len(starts), starts)
    expected = step.windowed(window)
    step.forget([max(0, start - window + 1) for start in starts])
    for splits in (1, 3):
        close(run(module, step, query_len=query_len, window=window, splits=splits), expected)


@pytest.mark.parametrize("splits", [1, 2])
def test_padding_rows_are_zero_and_no_page_of_theirs_is_looked_up(module, splits):
    step = Step(Shape(), [1, 1, 1], [3, 0, 20])
    expected = step.reference()
    lengths = step.lengths.copy()
    lengths[1] = 0
    step.starts = lengths - step.lens
    step.table[1] = 0x3FFF_FFFF
    out = run(module, step, splits=splits)
    close(out[[0, 2]], expected[[0, 2]])
    assert bool((out[1] == 0).all())


def test_a_row_too_long_for_its_parts_is_cut_into_more_of_them(module):
    step = Step(Shape(), [1] * 3, [0, 40, 90])
    close(run(module, step, splits=6, parts=2, blocks_max=2), step.reference())


def test_more_splits_than_are_joined_at_once_are_joined_in_turns(module):
    step = Step(Shape(group=1, kv_heads=1, page_tokens=16), [1] * 2, [700, 30])
    close(run(module, step, splits=40), step.reference())


def test_a_length_beyond_the_table_reads_no_further_than_the_table(module):
    step = Step(Shape(page_tokens=4), [1], [15])
    table = np.ascontiguousarray(step.table[:, :4])
    expected = step.reference()
    step.table, step.starts = table, step.starts + 1000
    close(run(module, step), expected)


def test_nan_of_one_row_stays_in_that_row(module):
    step = Step(Shape(), [1] * 3, [9, 20, 33])
    page = int(step.table[1, 2])
    step.pool[page, LAYER] = float("nan")
    out = run(module, step)
    assert not bool(out[[0, 2]].isnan().any()) and bool(out[1].isnan().all())


def test_rows_scattered_over_a_step_are_found_and_no_other_is_written(module):
    shape = Shape()
    step = Step(shape, [1] * 3, [4, 30, 11])
    attention = module.DecodeAttention(
        "cpu",
        rows_max=3,
        query_len_max=1,
        context_max=64,
        config_of=lambda rows: module.DecodeConfig(block=16, splits=2),
        **shape.made_for(),
    )
    places = torch.tensor([5, 0, 7], dtype=torch.int32)
    qkv = torch.full((9, shape.width + 8), float("nan"))
    qkv[places.long(), : shape.width] = step.qkv
    out = torch.full((9, shape.heads * shape.head_dim), 7.0)
    table, lengths = torch.from_numpy(step.table), torch.from_numpy(step.lengths)
    attention.run(qkv, step.pool, LAYER, table, lengths, out, first_tokens=places)
    close(out[places.long()], step.reference())
    others = [row for row in range(9) if row not in places.tolist()]
    assert bool((out[others] == 7.0).all())


def test_a_page_that_lies_beyond_32_bits_of_elements_is_found(module):
    step = Step(Shape(page_tokens=16), [1] * 2, [20, 37], dtype=torch.bfloat16)
    expected = run(module, step)
    pages, *page = step.pool.shape
    far = (1 << 31) // step.pool[0].numel()
    pool = torch.empty((far + pages, *page), dtype=torch.bfloat16)  # Touched at its end alone.
    pool[far:] = step.pool
    step.pool, step.table = pool, np.where(step.table < pages, step.table + far, step.table)
    assert torch.equal(run(module, step), expected)


def test_bfloat16_pages_are_served_within_their_precision(module):
    step = Step(Shape(head_dim=64, page_tokens=16), [1] * 2, [0, 40], dtype=torch.bfloat16)
    out = run(module, step).float()
    torch.testing.assert_close(out, step.reference(), atol=2e-2, rtol=2e-2)


def test_the_workspace_holds_every_bucket_and_splits_fill_the_gpu(module):
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_tokens": 16}
    attention = module.DecodeAttention(
        "meta", rows_max=256, query_len_max=4, context_max=40960, sm_count=132, **sizes
    )
    found = {rows: attention.config(rows) for rows in (1, 8, 64, 128, 256)}
    for rows, config in found.items():
        programs = rows * 8 * config.splits
        assert 132 <= programs <= 4096, (rows, config)
        assert config.block == (32 if rows >= 64 else 64)
        # Rows that fill the GPU are cut for their length alone.
        assert rows < 64 or (config.parts, config.block * config.blocks_max) == (1, 1024)
        parts = rows * config.splits * 32 * 4
        assert attention.workspace_bytes >= parts * 129 * 4
    assert attention.workspace_bytes < 64 << 20
    short = dataclasses.asdict(module.choose_config(1, 8, 128, 2, 512, 132))
    assert short["splits"] == 8, "a context of 8 blocks has no more parts"
