"""The row table: two tables that get the same deltas agree, and any difference shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.config import Limits
from holdfast.errors import InvariantError, LinkError
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan, StepResult
from holdfast.wire.rows import RowTable

LIMITS = Limits(
    vocab_size=50,
    context_tokens=32,
    page_tokens=4,
    pages=64,
    rows_max=5,
    windows=(0, 4),
    stop_ids=4,
)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def admit(row: int, tokens: list[int], *, length: int = 0, **fields) -> StepPlan:
    record = np.zeros(1, ADMIT)
    record["row"], record["owner"], record["tokens_len"] = row, 100 + row, len(tokens)
    record["length"] = length
    for name, value in fields.items():
        record[name] = value
    return StepPlan(
        epoch=1,
        step=1,
        admits=record,
        admit_tokens=i32(*tokens),
        stop_ids=i32(*range(fields.get("stop_len", 0))),
        bias_ids=i32(*range(fields.get("bias_len", 0))),
        bias_values=np.ones(fields.get("bias_len", 0), np.float32),
    )


def step(rows: list[int], lens: list[int], samples: list[int] | None = None) -> StepPlan:
    samples = [1] * len(rows) if samples is None else samples
    return StepPlan(
        epoch=1,
        step=2,
        rows=i32(*rows),
        query_lens=i32(*lens),
        samples=np.array(samples, np.uint8),
    )


def test_inputs_are_ragged_in_plan_order():
    table = RowTable(LIMITS)
    table.apply(admit(3, [9, 8, 7, 6]))
    table.apply(admit(1, [5, 4, 3], length=2))
    row, position, token = table.inputs(i32(1, 3), i32(1, 3))
    assert row.tolist() == [1, 3, 3, 3]
    assert position.tolist() == [2, 0, 1, 2]
    assert token.tolist() == [3, 9, 8, 7]


def test_advance_stores_the_drawn_token_as_the_next_input():
    table = RowTable(LIMITS)
    table.apply(admit(2, [9, 8]))
    table.advance(step([2], [2]), i32(41))
    assert table.length[2] == 2
    assert table.inputs(i32(2), i32(1))[2].tolist() == [41]


def test_a_chunk_that_draws_nothing_stores_nothing():
    table = RowTable(LIMITS)
    table.apply(admit(2, [9, 8, 7]))
    table.advance(step([2], [2], [0]), i32(0))
    assert table.inputs(i32(2), i32(1))[2].tolist() == [7]


def test_clear_empties_a_row_and_its_page_table():
    table = RowTable(LIMITS)
    table.apply(admit(2, [9, 8], stop_len=2))
    writes = np.array([(0, 2, 0, 7), (1, 2, 0, 9)], PAGE_WRITE)
    table.apply(StepPlan(epoch=1, step=1, page_writes=writes))
    table.apply(StepPlan(epoch=1, step=2, clears=i32(2)))
    assert not table.page_table.any() and not table.length.any()
    assert table.digest(step([2], [1])) == table.digest_full(step([2], [1]))


@pytest.mark.parametrize("row", [0, -1])
def test_the_trash_row_is_never_admitted_cleared_or_written(row):
    table = RowTable(LIMITS)
    with pytest.raises((InvariantError, IndexError)):
        table.apply(admit(row, [1]))
    with pytest.raises(InvariantError):
        table.apply(StepPlan(epoch=1, step=1, clears=i32(row)))
    with pytest.raises(InvariantError):
        writes = np.array([(0, row, 0, 7)], PAGE_WRITE)
        table.apply(StepPlan(epoch=1, step=1, page_writes=writes))


def test_a_held_row_is_not_admitted_again():
    table = RowTable(LIMITS)
    table.apply(admit(1, [1]))
    with pytest.raises(InvariantError):
        table.apply(admit(1, [2]))


def test_a_page_outside_the_table_is_refused():
    table = RowTable(LIMITS)
    writes = np.array([(0, 1, LIMITS.table_columns, 7)], PAGE_WRITE)
    with pytest.raises(InvariantError):
        table.apply(StepPlan(epoch=1, step=1, page_writes=writes))


@st.composite
def deltas(draw):
    """A run of legal plans over the rows of LIMITS."""
    held: dict[int, int] = {}
    plans = []
    for number in range(draw(st.integers(1, 12))):
        clears = [row for row in list(held) if draw(st.booleans()) and draw(st.booleans())]
        for row in clears:
            del held[row]
        plan = StepPlan(epoch=1, step=number + 1, clears=i32(*clears))
        free = [row for row in range(1, 6) if row not in held]
        if free and draw(st.booleans()):
            row = draw(st.sampled_from(free))
            tokens = draw(st.lists(st.integers(0, 49), min_size=1, max_size=20))
            new = admit(
                row,
                tokens,
                stop_len=draw(st.integers(0, 4)),
                bias_len=draw(st.integers(0, 3)),
                temperature=draw(st.floats(0, 2, width=32)),
                seed=draw(st.integers(0, 2**64 - 1)),
            )
            for name in ("admits", "admit_tokens", "stop_ids", "bias_ids", "bias_values"):
                setattr(plan, name, getattr(new, name))
            held[row] = len(tokens)
        cells = draw(
            st.lists(
                st.tuples(
                    st.integers(0, 1), st.sampled_from(sorted(held) or [1]), st.integers(0, 7)
                ),
                max_size=4,
                unique=True,
            )
        )
        if held:
            writes = [(g, r, c, draw(st.integers(0, 63))) for g, r, c in cells]
            plan.page_writes = np.array(writes, PAGE_WRITE)
        rows = [row for row in held if held[row] < 28 and draw(st.booleans())]
        plan.rows = i32(*rows)
        plan.query_lens = i32(*[draw(st.integers(1, 3)) for _ in rows])
        plan.samples = np.array([draw(st.integers(0, 1)) for _ in rows], np.uint8)
        for row, count in zip(rows, plan.query_lens.tolist(), strict=True):
            held[row] = max(held[row], int(held[row]) + count)
        plans.append(plan)
    return plans


@settings(max_examples=150, deadline=None)
@given(deltas())
def test_the_incremental_digest_is_the_digest_of_the_contents(plans):
    mirror, device = RowTable(LIMITS), RowTable(LIMITS)
    rng = np.random.default_rng(0)
    for plan in plans:
        mirror.apply(plan)
        device.apply(StepPlan.decode(plan.encode()))
        if int(device.length.max(initial=0)) + 4 > LIMITS.context_tokens:
            return
        assert mirror.digest(plan) == device.digest_full(plan)
        tokens = rng.integers(0, 50, plan.rows.size).astype(np.int32)
        mirror.advance(plan, tokens)
        device.advance(plan, tokens)


@settings(max_examples=100, deadline=None)
@given(deltas(), st.integers(0, 11), st.sampled_from(["lost", "twice"]))
def test_a_lost_or_repeated_delta_changes_the_digest_or_is_refused(plans, at, kind):
    mirror, device = RowTable(LIMITS), RowTable(LIMITS)
    at %= len(plans)
    for plan in plans[:at]:
        mirror.apply(plan)
        device.apply(plan)
    broken = plans[at]
    mirror.apply(broken)
    rows = np.flatnonzero(mirror.records["owner"]).astype(np.int32)
    probe = StepPlan(
        epoch=1,
        step=99,
        rows=rows,
        query_lens=np.ones_like(rows),
        samples=np.ones(rows.size, np.uint8),
    )
    if kind == "twice":
        device.apply(broken)
        if not broken.admits.size:
            return  # clears and page writes are idempotent
        with pytest.raises(InvariantError):
            device.apply(
                StepPlan(epoch=1, step=99, admits=broken.admits, admit_tokens=broken.admit_tokens)
            )
        return
    changed = not (
        np.array_equal(mirror.records[rows], device.records[rows])
        and np.array_equal(mirror.page_table[:, rows], device.page_table[:, rows])
    )
    if changed:
        assert mirror.digest(probe) != device.digest_full(probe)


def test_a_plan_survives_the_wire_bit_by_bit():
    plan = admit(3, [1, 2, 3], stop_len=2, bias_len=1, seed=2**64 - 1)
    plan.rows, plan.query_lens, plan.samples = i32(3), i32(3), np.array([1], np.uint8)
    plan.seals = np.array([2**63 + 5], np.uint64)
    back = StepPlan.decode(plan.encode())
    for name in plan.__slots__:
        assert np.array_equal(getattr(back, name), getattr(plan, name)), name


def test_a_result_survives_the_wire_with_an_unsigned_digest():
    result = StepResult(epoch=2, step=7, digest=2**64 - 3, tokens=i32(5), top_k=2)
    back = StepResult.decode(result.encode())
    assert (back.epoch, back.step, back.digest, back.top_k) == (2, 7, 2**64 - 3, 2)


@pytest.mark.parametrize("cut", [0, 3, 40, -1])
def test_a_cut_frame_is_refused(cut):
    frame = admit(3, [1, 2, 3]).encode()
    with pytest.raises(LinkError):
        StepPlan.decode(frame[:cut])
    with pytest.raises(LinkError):
        StepPlan.decode(frame + b"\0" * 8)
    with pytest.raises(LinkError):
        StepResult.decode(frame)
