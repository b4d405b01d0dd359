"""device.checks: every unfit plan is refused, with its reason, before a kernel of it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from devicekit import LIMITS, VOCAB, Hand, Request, handles

from holdfast.device.checks import HeldColumns
from holdfast.errors import WorkerFault
from holdfast.wire.copies import COPY
from holdfast.wire.plan import PAGE_WRITE, StepPlan, handles_of
from holdfast.wire.rows import RowTable

Change = Callable[[StepPlan], None]


@pytest.fixture
def held(hand) -> Hand:
    """Row 1 has 9 known tokens and one drawn, in pages 1 .. 4 (16 positions)."""
    hand.generate(1, Request(list(range(9))), 7)
    hand.run(zeros=[40])
    return hand


def refused(hand: Hand, plan: StepPlan, reason: str) -> None:
    before = hand.runner.memory.kv.clone()
    with pytest.raises(WorkerFault, match=reason):
        hand.runner.run(plan)
    assert bool((hand.runner.memory.kv == before).all()), "memory was written"


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 2), (0, 1), (2, 1), (1, -1)])
def test_a_plan_out_of_order_is_refused(hand, epoch, step):
    refused(hand, StepPlan(epoch=epoch, step=step), "expected 1:1")


def test_a_repeated_plan_is_refused(hand):
    plan = hand.plan(seals=[1])
    hand.runner.run(plan)
    refused(hand, plan, "plan 1:1 .* after 1:1")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(0, 1, 1)], "rows: 0 is not in 1 .. 64"),
        ([(65, 1, 1)], "rows: 65 is not in 1 .. 64"),
        ([(-1, 1, 1)], "rows: -1"),
        ([(1, 1, 1), (1, 1, 1)], "rows are not distinct"),
        ([(2, 1, 1)], "row 2 .* is free"),
        ([(1, 0, 1)], "query lengths: 0"),
        ([(1, -3, 1)], "query lengths: -3"),
        ([(1, 2, 1)], "computes tokens that nobody knows"),
        ([(1, 97, 1)], "query lengths: 97"),
        ([(1, 96, 1)], "grows past the context"),
    ],
)
def test_rows_that_cannot_be_computed_are_refused(held, rows, reason):
    refused(held, held.plan(rows), reason)


def test_a_row_without_a_page_for_its_next_token_is_refused(held):
    held.run([(1, 1, 1)])
    refused(held, held.plan([(1, 1, 1)]), "needs a page that it does not hold")


def test_a_hole_in_the_pages_that_a_row_reads_is_refused(held):
    held._add("page_writes", (0, 1, 1, 0))
    refused(held, held.plan([(1, 1, 1)]), "needs a page that it does not hold")


def test_drawing_before_the_end_of_the_known_tokens_is_refused(hand):
    hand.admit(1, Request(list(range(9))), hand.fresh_pages(9))
    refused(hand, hand.plan([(1, 5, 1)]), "samples before the end")


def test_two_rows_that_write_one_page_are_refused(hand):
    hand.admit(1, Request([1, 2]), [5])
    hand.admit(2, Request([1, 2]), [5])
    refused(hand, hand.plan([(1, 2, 1), (2, 2, 1)]), "writes page 5 for two rows")


def test_sealing_a_page_that_the_step_writes_is_refused(held):
    page = int(held.mirror.page_table[0, 1, 3])
    refused(held, held.plan([(1, 1, 1)], seals=[page]), f"seals page {page} and writes it")


def test_zeroing_a_page_that_the_step_reads_is_refused(held):
    page = int(held.mirror.page_table[0, 1, 0])
    refused(held, held.plan([(1, 1, 1)], zeros=[page]), f"zeros page {page} and reads it")


@pytest.mark.parametrize("name", ["seals", "zeros"])
@pytest.mark.parametrize(
    ("group", "page", "reason"),
    [
        (0, LIMITS.pages, f"the page of {{}}: {LIMITS.pages}"),
        (0, 0, "the page of {}: 0"),
        (1, 3, "the group of {}: 1"),
    ],
)
def test_handles_outside_the_pool_are_refused(hand, name, group, page, reason):
    handle = handles_of(group, np.array([page]), np.array([1], np.uint32))
    plan = dataclasses.replace(hand.plan(), **{name: handle})
    refused(hand, plan, reason.format(name))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ((1, 1, 0, 5), "the group of page writes: 1"),
        ((0, 0, 0, 5), "the row of page writes: 0"),
        ((0, 65, 0, 5), "the row of page writes: 65"),
        ((0, 1, -1, 5), "the column of page writes: -1"),
        ((0, 1, LIMITS.table_columns, 5), "the column of page writes: 24"),
        ((0, 1, 0, LIMITS.pages), "the page of page writes: 1400"),
        ((0, 1, 0, -5), "the page of page writes: -5"),
    ],
)
def test_page_writes_outside_the_table_are_refused(hand, write, reason):
    plan = dataclasses.replace(hand.plan(), page_writes=np.array([write], PAGE_WRITE))
    refused(hand, plan, reason)


@pytest.mark.parametrize("row", [0, -1, 65])
def test_clears_outside_the_table_are_refused(hand, row):
    refused(hand, dataclasses.replace(hand.plan(), clears=np.array([row], np.int32)), "clears")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row", 0),
        ("row", 65),
        ("owner", 0),
        ("tokens_len", 0),
        ("tokens_len", 97),
        ("tokens_len", 2),
        ("bias_len", -1),
        ("bias_len", 301),
        ("bias_len", 2),
        ("stop_len", 65),
        ("stop_len", 0),
        ("length", 3),
        ("length", -1),
        ("prompt_len", 4),
        ("top_logprobs", 21),
        ("temperature", np.nan),
        ("temperature", -1.0),
        ("temperature", np.inf),
        ("top_p", 0.0),
        ("top_p", np.nan),
        ("min_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", np.inf),
        ("frequency_penalty", np.nan),
    ],
)
def test_admissions_with_a_field_out_of_range_are_refused(hand, name, value):
    hand.admit(1, Request([1, 2, 3], {4: 1.0}, [5]), [1])
    plan = hand.plan([(1, 3, 1)])
    plan.admits[name] = value
    refused(hand, plan, "refused")


@pytest.mark.parametrize("name", ["admit_tokens", "bias_ids", "stop_ids"])
@pytest.mark.parametrize("value", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_refused(hand, name, value):
    hand.admit(1, Request([1, 2, 3], {4: 1.0}, [5]), [1])
    plan = hand.plan([(1, 3, 1)])
    getattr(plan, name)[-1] = value
    refused(hand, plan, f"{value} is not in 0 .. {VOCAB - 1}")


def test_admitting_a_held_row_is_refused_unless_the_plan_clears_it(held):
    held.admit(1, Request([1]), [9])
    refused(held, held.plan([(1, 1, 1)]), "admits row 1, which is held")
    held.step -= 1
    held.clear(1)
    held.admit(1, Request([1]), [9])
    assert held.run([(1, 1, 1)]).tokens.size == 1


def test_admitting_one_row_twice_is_refused(hand):
    hand.admit(1, Request([1]), [])
    hand.admit(1, Request([2]), [])
    refused(hand, hand.plan(), "admitted rows are not distinct")


@pytest.mark.parametrize("name", ["query_lens", "samples", "bias_values"])
def test_arrays_of_differing_length_are_refused(hand, name):
    hand.admit(1, Request([1, 2, 3], {4: 1.0}, [5]), [1])
    plan = hand.plan([(1, 3, 1)])
    refused(hand, dataclasses.replace(plan, **{name: getattr(plan, name)[:0]}), "refused")


def test_a_device_without_other_tiers_refuses_to_copy(hand):
    refused(hand, dataclasses.replace(hand.plan(), copies=np.zeros(1, COPY)), "no other tier")


def test_handles_carry_the_generation_beside_the_page():
    assert handles([7])[0] == (1 << 24) | 7


def test_columns_that_were_looked_at_once_are_looked_at_again_when_they_are_given_back():
    limits = dataclasses.replace(LIMITS, rows_max=3, context_tokens=64, pages=60)
    rng = np.random.default_rng(7)
    table, held = RowTable(limits), HeldColumns(limits)
    found = []
    for step in range(400):
        writes = np.zeros(int(rng.integers(0, 4)), PAGE_WRITE)
        writes["row"] = rng.integers(1, 4, writes.size)
        # Rising columns as the brain writes them, and now and then any, or a page taken away.
        lens = table.pages_len[0, writes["row"]]
        anywhere = rng.random(writes.size) < 0.2
        columns = np.where(anywhere, rng.integers(0, limits.table_columns, writes.size), lens)
        writes["column"] = np.minimum(columns, limits.table_columns - 1)
        writes["page"] = rng.integers(0, 60, writes.size) * (rng.random(writes.size) < 0.9)
        places = np.unique(writes[["row", "column"]], return_index=True)[1]
        clears = np.array([rng.integers(1, 4)] if rng.random() < 0.03 else [], np.int32)
        plan = StepPlan(epoch=1, step=step, clears=clears, page_writes=writes[places])
        table.apply(plan)
        held.apply(plan)
        rows = rng.permutation(np.arange(1, 4))[: rng.integers(1, 4)]
        columns = np.minimum(table.pages_len[0, rows] + rng.integers(-2, 2, rows.size), 16)
        columns = np.maximum(columns, 0)
        expected = [
            bool((table.page_table[0, row, :count] == 0).any())
            for row, count in zip(rows, columns, strict=True)
        ]
        assert held.missing(table, 0, rows, columns).tolist() == expected
        found += expected
    assert min(sum(found), len(found) - sum(found)) > 50, "nearly all was of one kind"
