"""Staging: padded to the bucket, every buffer is what a fresh one would be, whatever was before."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.config import Limits
from holdfast.errors import InvariantError
from holdfast.wire.envelope import bucket_of, buckets
from holdfast.wire.plan import PAGE_WRITE, StepPlan
from holdfast.wire.rows import RowTable
from holdfast.wire.staging import Staged, Staging

LIMITS = Limits(
    vocab_size=500, context_tokens=24, page_tokens=4, pages=300, rows_max=33, prefill_tokens=64
)
LADDER = buckets(LIMITS.rows_max)
FREE_FROM = 1 + LIMITS.rows_max * LIMITS.table_columns  # pages that nobody owns


def table_with(lengths: list[int], room: int = 1) -> RowTable:
    """Row i + 1 has lengths[i] tokens and the pages that it and `room` tokens more need."""
    table = RowTable(LIMITS)
    for row, length in enumerate(lengths, start=1):
        columns = LIMITS.pages_for_tokens(length + room)
        writes = np.zeros(columns, PAGE_WRITE)
        writes["row"], writes["column"] = row, np.arange(columns)
        writes["page"] = 1 + (row - 1) * LIMITS.table_columns + np.arange(columns)
        table.apply(StepPlan(epoch=1, step=1, page_writes=writes))
        table.length[row] = length
        table.tokens[row] = 1000 * row + np.arange(LIMITS.context_tokens + 1)
    return table


def decode(rows: list[int], query_len: int = 1) -> StepPlan:
    return StepPlan(
        epoch=1,
        step=2,
        rows=np.array(rows, np.int32),
        query_lens=np.full(len(rows), query_len, np.int32),
        samples=np.ones(len(rows), np.uint8),
    )


def same(one: Staged, other: Staged) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(Staged)
    )


def stores(staged: Staged) -> list[int]:
    """The page that takes each query token's KV."""
    row = np.repeat(np.arange(staged.rows.size), staged.query_len)
    return staged.page_table[0, row, staged.positions // LIMITS.page_tokens].tolist()


def lengths_of(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 20, LIMITS.rows_max).tolist()


def test_rows_are_staged_in_plan_order_and_the_rest_is_the_trash_row():
    table = table_with([5, 0, 8])
    staged = Staging(LIMITS, 1).fill(decode([3, 1]), table, 4)
    assert staged.rows.tolist() == [3, 1, 0, 0]
    assert staged.lengths.tolist() == [8, 5, 0, 0]
    assert staged.samples.tolist() == [1, 1, 0, 0]
    assert staged.positions.tolist() == [8, 5, 0, 0]
    assert staged.tokens.tolist() == [3008, 1005, 0, 0]
    assert staged.page_table[0].tolist() == [
        [13, 14, 15, 0, 0, 0],
        [1, 2, 0, 0, 0, 0],
        *[[0] * 6] * 2,
    ]


def test_drafts_are_left_open_and_their_kv_has_a_page():
    table = table_with([3, 6], room=3)
    staging = Staging(LIMITS, 3)
    staging.fill(decode([1, 2], 3), table, 4, drafts=2).tokens[1:3] = 77  # the device drafts
    staged = staging.fill(decode([1, 2], 3), table, 4, drafts=2)
    assert staged.tokens.tolist() == [1003, 0, 0, 2006, 0, 0, *[0] * 6]
    assert staged.positions.tolist() == [3, 4, 5, 6, 7, 8, *[0, 1, 2] * 2]
    assert stores(staged) == [1, 2, 2, 8, 8, 9, *[0] * 6]


def test_a_token_in_the_last_page_of_the_longest_context_has_its_page():
    table = table_with([LIMITS.context_tokens - 1])
    staged = Staging(LIMITS, 1).fill(decode([1]), table, 1)
    assert staged.page_table[0].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert stores(staged) == [6]


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("count", range(1, LIMITS.rows_max + 1))
def test_after_a_full_batch_any_smaller_one_is_as_in_fresh_buffers(count, query_len):
    table = table_with(lengths_of(count), query_len)
    used = Staging(LIMITS, query_len)
    used.fill(decode(list(range(1, LIMITS.rows_max + 1)), query_len), table, LIMITS.rows_max)
    plan, bucket = decode(list(range(count, 0, -1)), query_len), bucket_of(count, LADDER)
    staged = used.fill(plan, table, bucket)
    assert same(staged, Staging(LIMITS, query_len).fill(plan, table, bucket))
    assert same(used.view(LIMITS.rows_max), padded_to_the_end(plan, table, query_len))


def padded_to_the_end(plan: StepPlan, table: RowTable, query_len: int) -> Staged:
    return Staging(LIMITS, query_len).fill(plan, table, LIMITS.rows_max)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(1, 33), min_size=1), min_size=1, max_size=6), st.integers(0, 9))
def test_batches_that_shrink_and_grow_leave_nothing_behind(batches, seed):
    used = Staging(LIMITS, 1)
    for number, batch in enumerate(batches):
        table = table_with(lengths_of(seed + number))  # rows with fewer pages than before, too
        plan, bucket = decode(sorted(batch)), bucket_of(len(batch), LADDER)
        used.fill(plan, table, bucket)
        assert same(used.view(33), padded_to_the_end(plan, table, 1))


@pytest.mark.parametrize("count", range(1, LIMITS.rows_max + 1))
def test_a_step_stores_to_the_pages_of_its_rows_and_the_trash_page_alone(count):
    """A kernel stores one value a query token, padding and all."""
    table = table_with(lengths_of(count))
    pages = np.full((LIMITS.pages, LIMITS.page_tokens), -1, np.int64)  # the canary
    staging = Staging(LIMITS, 1)
    staging.fill(decode(list(range(1, LIMITS.rows_max + 1))), table, LIMITS.rows_max)
    rows = list(range(1, count + 1))
    staged = staging.fill(decode(rows), table, bucket_of(count, LADDER))
    pages[stores(staged), staged.positions % LIMITS.page_tokens] = staged.tokens
    changed = {int(page) for page in np.flatnonzero((pages != -1).any(axis=1))} - {0}
    own = {int(table.page_table[0, row, table.length[row] // 4]) for row in rows}
    assert changed == own
    assert all(page < FREE_FROM for page in changed)


def test_one_set_of_addresses_serves_all_buckets_and_steps():
    table, staging = table_with([5, 6, 7]), Staging(LIMITS, 1)
    before = staging.addresses
    for rows in ([1, 2, 3], [2], [1, 3]):
        staged = staging.fill(decode(rows), table, bucket_of(len(rows), LADDER))
        assert staged.rows.ctypes.data == before[0]
    assert staging.addresses == before
    assert Staging(LIMITS, 1).addresses != before


def test_what_does_not_fit_is_our_own_bug():
    table = table_with([5, 6, 7])
    with pytest.raises(InvariantError, match="bucket of 2"):
        Staging(LIMITS, 1).fill(decode([1, 2, 3]), table, 2)
    with pytest.raises(InvariantError, match="bucket of 34"):
        Staging(LIMITS, 1).fill(decode([1]), table, 34)
    with pytest.raises(InvariantError, match="query lengths"):
        Staging(LIMITS, 1).fill(decode([1], 2), table, 1)
