"""device.mixed_kernels through Triton's interpreter: what a graph of a step with prompts reads is,
after random plans, what the host's row table says, and padding behind it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from interpreted import MARKS
from rowskit import Plans

from holdfast.config import Limits

pytestmark = MARKS

LIMITS = Limits(
    context_tokens=31,
    page_tokens=3,
    pages=90,
    rows_max=5,
    vocab_size=97,
    prefill_tokens=64,
    bias_entries=3,
    stop_ids=5,
)
BUCKETS = (16, 64, 160)


@pytest.fixture
def made(monkeypatch):
    """(DeviceRows, DeviceMixed) over them; walks of more than one turn."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from holdfast.device import device_rows
    from holdfast.device.mixed_kernels import DeviceMixed
    from holdfast.ops.attention_triton import TritonAttention

    monkeypatch.setattr(device_rows, "_BLOCK", 4)
    monkeypatch.setattr(device_rows, "_PROGRAMS", 2)
    rows = device_rows.DeviceRows(LIMITS, "cpu")
    attention = TritonAttention(
        "cpu",
        rows_max=LIMITS.rows_max,
        query_len_max=1,
        heads=2,
        kv_heads=1,
        head_dim=16,
        page_tokens=LIMITS.page_tokens,
        context_max=LIMITS.table_columns * LIMITS.page_tokens,
        itemsize=4,
    )
    pool = torch.zeros(LIMITS.pages, 1, 2, LIMITS.page_tokens, 1, 16)
    return rows, DeviceMixed(rows, attention, LIMITS, pool, torch.float32, BUCKETS[-1])


@pytest.mark.parametrize("seed", range(3))
def test_after_any_plan_a_bucket_has_what_the_hosts_table_says(made, seed):
    rows, mixed = made
    plans, addresses, seen = Plans(LIMITS, seed), None, 0
    for number in range(20):
        plan = plans.step(decode=False)
        rows.apply(plan, 1, number)
        if plan.rows.size:
            table, lens = plans.judge, plan.query_lens
            starts, total = table.length[plan.rows], int(lens.sum())
            bucket = next(tokens for tokens in BUCKETS if tokens >= total)
            shape = mixed.shape_of(plan)
            assert shape == (total, int((lens > 1).sum()), 0, int((starts + lens).max()))
            ends = mixed.prepare(plan, bucket)
            tokens, positions, attention = mixed.stage(bucket)
            # As rows.stage has it for a step of its own.
            batch = rows.stage(plan)
            for found, expected, padding in (
                (tokens, batch.tokens, 0),
                (positions, batch.positions, 0),
                (attention.slots, batch.attention.slots, -1),
            ):
                assert found.shape == (bucket,)
                assert torch.equal(found[:total], expected)
                assert bool((found[total:] == padding).all())
            assert torch.equal(ends.last_tokens, batch.last_tokens)
            assert torch.equal(ends.last_waiting, batch.last_waiting)
            index = attention.index
            order = [*np.flatnonzero(lens == 1).tolist(), *np.flatnonzero(lens != 1).tolist()]
            held = index.rows.numpy() >= 0
            assert index.rows.numpy()[held].tolist() == plan.rows[order].tolist()
            assert index.seen.numpy()[held].tolist() == (starts + lens)[order].tolist()
            assert not bool(index.seen.numpy()[~held].any())
            for at, row in zip(np.flatnonzero(held), order, strict=True):
                used = int(LIMITS.pages_for_tokens(int(starts[row] + lens[row])))
                expected = table.page_table[0, plan.rows[row], :used]
                assert attention.page_table[at, :used].tolist() == expected.tolist()
            seen += 1
            assert addresses in (None, mixed.addresses)
            addresses = mixed.addresses
        tokens = plans.tokens(plan)
        rows.advance(plan, tokens)
        plans.advance(plan, tokens)
    assert seen > 10


def test_a_step_of_no_row_is_all_padding(made):
    rows, mixed = made
    rows.warm_up()
    assert mixed.prepare(None, 16) is None
    tokens, positions, attention = mixed.stage(16)
    assert tokens.tolist() == positions.tolist() == [0] * 16
    assert attention.slots.tolist() == [-1] * 16


@pytest.mark.parametrize("name", ["length", "page_table", "tokens"])
def test_a_table_that_moved_is_in_the_manifest(made, name):
    rows, mixed = made
    before = mixed.addresses
    setattr(rows, name, getattr(rows, name).clone())
    assert mixed.addresses != before


def test_buffers_that_no_step_with_prompts_is_given_are_not_in_its_manifest(made):
    """Else a drill that moves a bucket and hides it would be told of by the steps beside."""
    rows, mixed = made
    decode, before = rows.addresses, mixed.addresses
    rows._buckets = dataclasses.replace(rows._buckets, tokens=rows._buckets.tokens.clone())
    assert rows.addresses != decode and mixed.addresses == before
