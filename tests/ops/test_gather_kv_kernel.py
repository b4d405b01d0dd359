"""ops.kernels.gather_kv through Triton's interpreter, and steps of ops.attention_triton of which
some rows are gathered; the kernel over the scratch, which is not interpreted, has a twin here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_twin import LAYER, NAN, Shape, Step, close
from hypothesis import given
from hypothesis import strategies as st

from holdfast.ops import kernels
from holdfast.ops.attention import Scratch
from holdfast.ops.kernels import gather_config

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
    from holdfast.ops.kernels import gather_kv

    return gather_kv


@pytest.fixture
def triton_attention(monkeypatch):
    """TritonAttention for float32, as if a kernel over a scratch took it; rows from 8 query tokens
    on are gathered."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from holdfast.ops import attention_triton

    monkeypatch.setattr(attention_triton, "fits", lambda *shape: True)

    def make(shape: Shape, *, context_max: int = 1024, rows_max: int = 64):
        return attention_triton.TritonAttention(
            "cpu",
            rows_max=rows_max,
            query_len_max=1,
            context_max=context_max,
            config_of=lambda _: attention_triton.DecodeConfig(block=16, splits=2),
            prefill_config=attention_triton.PrefillConfig(rows=16, block=16),
            gather_query_tokens=8,
            make_gathered=Twin,
            **shape.made_for(),
        )

    return make


class Twin:
    """WarpPrefill in plain torch: reads what that reads of tiles, places and scratch, tile by tile
    in whole blocks of 128 positions, all products included."""

    tile_tokens = 5

    def __init__(self, scratch: torch.Tensor, *, heads: int, kv_heads: int) -> None:
        self.scratch, self.heads, self.kv_heads = scratch.fill_(NAN), heads, kv_heads
        self.rows: list[int] = []

    def run(self, q, pool, layer, rows, out, *, window=0) -> None:
        from holdfast.ops.kernels.gather_kv import gather_kv

        gather_kv(pool, layer, rows, self.scratch, window=window)
        self.rows.append(rows.places.shape[1])
        _, kv_heads, _, head_dim = self.scratch.shape
        for row, first, tokens, position in rows.tiles.T.tolist():
            if tokens == 0:
                continue
            place = int(rows.places[0, row])
            high = -(-(position + tokens) // 128) * 128
            low = max(0, position - window + 1) // 128 * 128 if window else 0
            kv = self.scratch[:, :, place + low : place + high]
            of = q[first : first + tokens, : self.heads * head_dim]
            of = of.view(tokens, kv_heads, -1, head_dim)
            scores = torch.einsum("tkgd,kpd->tkgp", of, kv[0]) / head_dim**0.5
            distance = position + torch.arange(tokens)[:, None] - torch.arange(low, high)
            hidden = (distance < 0) | (distance >= (window or high))
            scores.masked_fill_(hidden[:, None, None], float("-inf"))
            attended = torch.einsum("tkgp,kpd->tkgd", scores.softmax(-1), kv[1])
            out[first : first + tokens] = attended.reshape(tokens, -1)


def run(make, step: Step, *, window: int = 0, **limits) -> tuple[torch.Tensor, object]:
    """(out, the plan) of the step by a new TritonAttention."""
    attention, shape = make(step.shape, **limits), step.shape
    scratch = Scratch(step.qkv.device)
    heads = shape.heads, shape.kv_heads
    plan = attention.plan(step.batch(), step.pool, *heads, step.qkv.dtype, scratch)
    out = step.out()
    attention.attend(plan, step.pool, LAYER, step.qkv, out, window)
    return out, plan


@pytest.mark.parametrize("window", [0, 5], ids=["", "window"])
@pytest.mark.parametrize(("page_tokens", "programs"), [(1, 1024), (3, 1), (16, 16)])
def test_the_scratch_has_each_row_in_order_and_zeros_around_it(
    module, page_tokens, programs, window, monkeypatch
):
    """However few programs there are to bring it."""
    monkeypatch.setattr(module, "_PROGRAMS_MAX", programs)
    step = Step(Shape(page_tokens=page_tokens), [4, 140, 1, 128], [0, 150, 0, 0])
    lengths, starts = step.lengths, step.starts
    places, owners, used = module.place_rows(lengths, starts)
    assert places.tolist() == [[0, 128, 512, 640], [4, 290, 1, 128], starts.tolist()]
    assert owners.tolist() == [0, 1, 1, 1, 2, 3] and used.tolist() == [6]
    assert module.positions_of(lengths) == 6 * 128
    # What lies behind those in use, as in a graph's buffer, is nobody's.
    owners = np.append(owners, np.int32([3, 1 << 20]))
    before = [max(0, start - window + 1) if window else 0 for start in starts]
    step.forget(before, column_page=0)
    scratch = torch.full((2, 2, 1024, 16), NAN)
    tiles = torch.empty(4, 0, dtype=torch.int32)
    on_device = (torch.from_numpy(array) for array in (step.table, places, owners, used))
    rows = module.Gathered(*on_device, tiles)
    module.gather_kv(step.pool, LAYER, rows, scratch, window=window)
    for row, (place, length) in enumerate(zip(*places[:2].tolist(), strict=True)):
        at = np.arange(before[row], length)
        pages = torch.from_numpy(step.table[row, at // page_tokens].astype(np.int64))
        kv = step.pool[pages, LAYER, :, at % page_tokens].permute(1, 2, 0, 3)
        assert torch.equal(scratch[:, :, place + before[row] : place + length], kv)
        end = place + gather_config.aligned(length)
        assert not bool(scratch[:, :, place + length : end].any())
        tile = before[row] // 128 * 128
        assert not bool(scratch[:, :, place + tile : place + before[row]].any())
    assert bool(scratch[:, :, 768:].isnan().all())


@pytest.mark.parametrize("group", [1, 3])
def test_a_step_of_decode_short_chunks_and_gathered_rows_matches_the_reference(
    triton_attention, group
):
    lens, starts = [1, 9, 3, 1, 140, 8, 7], [20, 3, 5, 47, 2, 120, 0]
    step = Step(Shape(group=group, page_tokens=3), lens, starts)
    out, plan = run(triton_attention, step)
    close(out, step.reference())
    assert plan.lengths.tolist() == [21, 48]
    assert plan.gathered.places[1].tolist() == [12, 142, 128]
    assert sorted(set(plan.tiles[0].tolist())) == [2, 3]


@pytest.mark.parametrize("window", [1, 5, 127, 128, 129])
def test_gathered_rows_in_a_window_never_read_what_it_forgot(triton_attention, window):
    lens, starts = [9, 20, 8, 33], [0, 3, window + 7, 160]
    step = Step(Shape(page_tokens=4), lens, starts)
    expected = step.windowed(window)
    step.forget([max(0, start - window + 1) for start in starts], column_page=0)
    out, _ = run(triton_attention, step, window=window)
    close(out, expected, window)


def test_nan_of_one_gathered_row_stays_in_that_row(triton_attention):
    step = Step(Shape(), [10, 20, 9], [3, 4, 7])
    step.pool[int(step.table[1, 1]), LAYER] = NAN
    out, _ = run(triton_attention, step)
    assert not bool(out[:10].isnan().any()) and not bool(out[30:].isnan().any())
    assert bool(out[10:30].isnan().all())


def test_rows_that_the_scratch_has_no_room_for_are_read_from_pages(triton_attention):
    step = Step(Shape(), [9, 8, 130, 10], [0, 0, 0, 0])
    out, plan = run(triton_attention, step, context_max=128, rows_max=2)
    close(out, step.reference())
    assert plan.gathered.places[1].tolist() == [9, 8]
    assert sorted(set(plan.tiles[0].tolist())) == [0, 1]


def test_what_only_decodes_has_no_scratch_and_what_gathers_has_one_for_all_plans(triton_attention):
    attention, scratch = triton_attention(Shape()), Scratch(torch.device("cpu"))

    def plan(step: Step):
        return attention.plan(step.batch(), step.pool, 4, 2, step.qkv.dtype, scratch)

    for lens in ([1, 1], [7]):
        assert plan(Step(Shape(), lens, [9] * len(lens))).gathered is None
    assert attention._gathered is None
    assert plan(Step(Shape(), [8], [0])).gathered is not None
    first = attention._gathered
    assert first.scratch.shape == (2, 2, gather_config.TOKENS_MAX, 16)
    plan(Step(Shape(), [100, 8], [0, 5]))
    assert attention._gathered is first


def test_without_warp_groups_nothing_is_gathered(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from holdfast.ops.attention_triton import TritonAttention

    shape = Shape(head_dim=64)
    attention = TritonAttention(
        "cpu", rows_max=2, query_len_max=1, context_max=512, **shape.made_for()
    )
    step = Step(shape, [300], [0], dtype=torch.bfloat16)
    scratch = Scratch(torch.device("cpu"))
    plan = attention.plan(step.batch(), step.pool, 4, 2, torch.bfloat16, scratch)
    assert plan.gathered is None and plan.tiles.numel()


@given(
    rows=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 600)), max_size=20),
    room=st.integers(0, 20),
)
def test_gathered_rows_fit_the_scratch_and_none_that_fits_alone_before_them_is_left(rows, room):
    from holdfast.ops.kernels.gather_kv import choose_rows, place_rows

    lens, starts = np.array(rows, np.int32).reshape(-1, 2).T
    room *= gather_config.ALIGN
    taken = choose_rows(lens, starts, room)
    places, owners, used = place_rows((lens + starts)[taken], starts[taken])
    assert used.tolist() == [owners.size]
    assert owners.size * gather_config.ALIGN <= room
    assert bool((lens[taken] >= gather_config.QUERY_TOKENS_MIN).all())
    ends = places[0] + np.array([gather_config.aligned(n) for n in places[1]], np.int64)
    assert np.array_equal(ends[:-1], places[0][1:])
    for number, owner in enumerate(owners):
        assert places[0, owner] <= number * gather_config.ALIGN < ends[owner]
    wanted = np.flatnonzero((lens >= gather_config.QUERY_TOKENS_MIN) & (lens + starts <= room))
    if wanted.size:
        assert taken[wanted[0]]


@pytest.mark.parametrize(
    ("shape", "fit"),
    [
        ((32, 8, 128, 2), True),
        ((6, 2, 64, 2), True),
        ((28, 4, 80, 2), True),
        ((32, 8, 128, 4), False),
        ((8, 1, 256, 2), False),
        ((8, 8, 84, 2), False),
        ((256, 1, 64, 2), False),
    ],
)
def test_shapes_that_a_bulk_copy_or_a_tile_refuses_are_not_gathered(shape, fit):
    assert gather_config.fits(*shape) == fit
    assert bool(gather_config.scratch_bytes(*shape, 64, 4096)) == fit
