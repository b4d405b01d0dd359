"""device.device_rows through Triton's interpreter: the twin of wire.rows and wire.staging, to the
bit, over random plans."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from rowskit import Plans

from holdfast.config import Limits
from holdfast.device.batch import HostRows
from holdfast.device.buckets import Bucket
from holdfast.errors import InvariantError, WorkerFault
from holdfast.ops import kernels
from holdfast.wire.envelope import bucket_of, buckets
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan
from holdfast.wire.rows import RowTable
from holdfast.wire.staging import Staging

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
    # numpy scalars in the interpreter say so when uint64 wraps, which is what it is for.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

COMMON = {"vocab_size": 97, "prefill_tokens": 64, "bias_entries": 3, "stop_ids": 5}
# Odd page sizes, one and two groups, a table wider than a block of the kernels (monkeypatched).
SHAPES = [
    Limits(context_tokens=23, page_tokens=3, pages=64, rows_max=4, **COMMON),
    Limits(context_tokens=40, page_tokens=1, pages=300, rows_max=5, windows=(0, 6), **COMMON),
    Limits(context_tokens=31, page_tokens=5, pages=64, rows_max=3, windows=(0, 4, 9), **COMMON),
    Limits(context_tokens=9, page_tokens=16, pages=8, rows_max=1, **COMMON),
]


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Read where the module's kernels are decorated.
    from holdfast.device import device_rows

    # Smaller than the tables, so that every walk takes more than one turn.
    monkeypatch.setattr(device_rows, "_BLOCK", 8)
    monkeypatch.setattr(device_rows, "_PROGRAMS", 2)
    return device_rows


def assert_tables_equal(rows, table: RowTable, *, tokens: bool = True) -> None:
    assert np.array_equal(rows.length.numpy(), table.length)
    assert np.array_equal(rows.page_table.numpy(), table.page_table)
    assert np.array_equal(rows.pages_len.numpy(), table.pages_len)
    assert np.array_equal(rows.stop_ids.numpy(), table.stop_ids)
    assert np.array_equal(rows.bias_ids.numpy(), table.bias_ids)
    assert np.array_equal(rows.bias_values.numpy(), table.bias_values.view(np.int32))
    words = table.records.view(np.int32).reshape(table.records.size, -1)
    assert np.array_equal(rows.records.numpy(), words)
    if tokens:
        assert np.array_equal(rows.tokens.numpy(), table.tokens)


def slots_of(staged, plan: StepPlan, page_tokens: int) -> np.ndarray:
    """int64[groups, B]: by the definition, from wire.staging's own buffers."""
    column = staged.positions // page_tokens
    pages = np.take_along_axis(staged.page_table, column[None, :, None], 2)[:, :, 0]
    slots = pages.astype(np.int64) * page_tokens + staged.positions % page_tokens
    slots[:, plan.rows.size :] = -1
    return slots


def assert_staged_equal(rows, staging: Staging, plan: StepPlan, table: RowTable) -> None:
    limits, n = rows.limits, plan.rows.size
    count = bucket_of(n, buckets(limits.rows_max))
    staged = staging.fill(plan, table, count)
    rows.stage_bucket(count)
    found = rows.bucket(count)
    assert np.array_equal(found.rows, staged.rows)
    assert np.array_equal(found.lengths, staged.lengths)
    assert np.array_equal(found.samples, staged.samples)
    seen = np.where(np.arange(count) < n, staged.lengths + 1, 0)
    assert np.array_equal(found.seen, seen)
    assert np.array_equal(found.tokens, staged.tokens)
    assert np.array_equal(found.positions, staged.positions)
    assert np.array_equal(found.page_table, staged.page_table)
    assert np.array_equal(found.slots, slots_of(staged, plan, limits.page_tokens))
    records = table.records[plan.rows]
    assert np.array_equal(found.seeds.numpy().view(np.uint64)[:n], records["seed"])
    assert np.array_equal(found.temperature[:n], records["temperature"])
    assert np.array_equal(found.draw_positions, staged.lengths + 1)
    assert not found.seeds[n:].any() and not found.temperature[n:].any()
    # The host's twin, of which graphs on a CPU are made, fills every buffer alike.
    host = HostRows(limits)
    host.table = table
    host.prepare(plan, count)
    for field in fields(Bucket):
        if field.name not in ("drawn", "finite"):
            mine, its = (getattr(each, field.name) for each in (found, host.bucket(count)))
            assert torch.equal(mine, its), field.name


def assert_ragged_equal(rows, plan: StepPlan, table: RowTable) -> None:
    batch = rows.stage(plan)
    row, position, token = table.inputs(plan.rows, plan.query_lens)
    size = rows.limits.page_tokens
    page = table.page_table[0, row, position // size].astype(np.int64)
    assert np.array_equal(batch.tokens, token)
    assert np.array_equal(batch.positions, position)
    assert np.array_equal(batch.attention.slots, page * size + position % size)
    last = np.cumsum(plan.query_lens) - 1
    assert np.array_equal(batch.last_tokens, last[batch.drawing.rows])
    assert np.array_equal(batch.last_waiting, last[batch.drawing.waiting])


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("seed", range(2))
def test_after_any_plan_the_devices_tables_digest_and_staging_are_the_hosts(device, shape, seed):
    limits = SHAPES[shape]
    plans, staging = Plans(limits, seed), Staging(limits, 1)
    # Frames so small that some plans take several.
    rows = device.DeviceRows(limits, "cpu", delta_words=64)
    for step in range(25):
        plan = plans.step()
        rows.apply(plan, 1, step)
        assert rows.digest(plan) == plans.judge.digest(plan) == plans.judge.digest_full(plan)
        assert_tables_equal(rows, plans.judge)
        if plan.rows.size:
            if plan.query_lens.max() == 1:
                assert_staged_equal(rows, staging, plan, plans.judge)
            assert_ragged_equal(rows, plan, plans.judge)
        tokens = plans.tokens(plan)
        rows.advance(plan, tokens)
        plans.advance(plan, tokens)
        assert_tables_equal(rows, plans.judge)
        assert np.array_equal(rows.table.tokens, plans.judge.tokens)


@pytest.mark.parametrize("seed", range(4))
def test_with_results_a_step_late_the_digests_are_those_of_a_table_that_waits(device, seed):
    """Plan N + 1 is applied and launched before result N was taken."""
    limits = SHAPES[seed % len(SHAPES)]
    plans = Plans(limits, 100 + seed)
    rows = device.DeviceRows(limits, "cpu")
    late = []
    for step in range(30):
        plan = plans.step(decode=step % 3 != 0)
        rows.apply(plan, 1, step)
        expected = plans.judge.digest(plan)
        rows.begin_digest(plan)
        tokens = plans.tokens(plan)
        # The draws lie by plan row or by place, as a bucket's and any other step's do.
        placed = step % 2 == 0
        order = np.argsort(plan.samples == 0, kind="stable") if placed else slice(None)
        rows.drawn[: plan.rows.size] = torch.from_numpy(tokens[order])
        rows.finite[: plan.rows.size] = 1
        rows.settle(plan, placed=placed)
        plans.advance(plan, tokens)
        late.append((rows.fetch(plan, placed=placed), expected, tokens))
        if len(late) == 2:
            assert rows.lags
            fetch, digest, drawn = late.pop(0)
            found = fetch.take()
            assert found[0] == digest
            assert np.array_equal(found[1], drawn) and found[2].all()
    for fetch, digest, _ in late:
        assert fetch.take()[0] == digest
    assert not rows.lags
    assert_tables_equal(rows, plans.judge)
    held = np.flatnonzero(rows.table.records["owner"])
    for row in held:
        known = rows.table.length[row] + 1
        assert np.array_equal(rows.table.tokens[row, :known], plans.judge.tokens[row, :known])


def test_a_late_token_is_not_given_to_the_next_request_in_its_row(device):
    limits = SHAPES[0]

    def admit(step: int, owner: int, tokens: list[int], clears: list[int]) -> StepPlan:
        record = np.zeros(1, ADMIT)
        record["row"], record["owner"], record["tokens_len"] = 1, owner, len(tokens)
        record["top_p"] = record["repetition_penalty"] = 1.0
        writes = np.array([(0, 1, 0, owner), (0, 1, 1, owner + 10)], PAGE_WRITE)
        return StepPlan(
            epoch=1,
            step=step,
            rows=np.array([1], np.int32),
            query_lens=np.array([1], np.int32),
            samples=np.array([len(tokens) == 1], np.uint8),
            clears=np.array(clears, np.int32),
            admits=record,
            admit_tokens=np.array(tokens, np.int32),
            page_writes=writes,
        )

    rows = device.DeviceRows(limits, "cpu")
    first = admit(1, 1, [5], [])
    rows.apply(first, 1, 0)
    rows.drawn[0], rows.finite[0] = 77, 1
    rows.settle(first, placed=False)
    late = rows.fetch(first, placed=False)
    rows.apply(admit(2, 2, [6, 7, 8], [1]), 1, 1)
    assert late.take()[1].tolist() == [77]
    assert rows.table.tokens[1, :3].tolist() == [6, 7, 8]
    assert rows.tokens[1, :3].tolist() == [6, 7, 8]


@pytest.mark.parametrize("table", ["records", "page_table", "tokens", "stop_ids", "bias_values"])
def test_a_word_that_changed_on_the_device_changes_the_digest(device, table):
    limits = SHAPES[1]
    plans, rows = Plans(limits, 5), device.DeviceRows(limits, "cpu")
    for step in range(30):
        plan = plans.step(decode=True)
        rows.apply(plan, 1, step)
        whole = rows.digest(plan)
        records = plans.judge.records[plan.rows]
        some = np.flatnonzero((records["stop_len"] > 0) & (records["bias_len"] > 0))
        if some.size:
            row = int(plan.rows[some[0]])
            place = {
                "records": (row, 13),
                "page_table": (1, row, int(plans.judge.length[row])),
                "tokens": (row, int(plans.judge.length[row])),
                "stop_ids": (row, 0),
                "bias_values": (row, 0),
            }[table]
            getattr(rows, table)[place] ^= 1 << 6
            assert rows.digest(plan) != whole
            return
        tokens = plans.tokens(plan)
        rows.advance(plan, tokens)
        plans.advance(plan, tokens)
    raise AssertionError("no row with stop ids and bias in 30 steps")


def test_a_plan_that_is_unfit_touches_nothing_on_the_device(device):
    limits = SHAPES[0]
    plans, rows = Plans(limits, 1), device.DeviceRows(limits, "cpu")
    plan = plans.step()
    plan.step = 7
    with pytest.raises(WorkerFault, match="expected 1:1"):
        rows.apply(plan, 1, 0)
    assert not rows.records.any() and not rows.frames.device.any()


def test_a_third_result_in_flight_is_our_own_bug(device):
    plans = Plans(SHAPES[0], 2)
    rows = device.DeviceRows(SHAPES[0], "cpu")
    for step in range(2):
        plan = plans.step()
        rows.apply(plan, 1, step)
        rows.settle(plan, placed=False)
        rows.fetch(plan, placed=False)
        plans.advance(plan, np.zeros(plan.rows.size, np.int32))
    with pytest.raises(InvariantError, match="2 results"):
        rows.fetch(plan, placed=False)


def test_a_plan_too_large_for_a_frame_is_cut_between_deltas_and_in_their_order(device):
    from holdfast.device.frame import Frames

    limits = SHAPES[1]
    frames = Frames(limits, torch.device("cpu"), delta_words=64)
    plans = Plans(limits, 3)
    seen = 0
    for _ in range(40):
        plan = plans.step()
        parts = list(frames.upload(plan))
        for name, deltas in (("clears", plan.clears), ("admits", plan.admits)):
            covered = [i for p in parts for i in range(*getattr(p, name).indices(deltas.size))]
            assert covered == list(range(deltas.size))
        covered = [i for p in parts for i in range(p.writes.start, p.writes.stop)]
        assert covered == list(range(plan.page_writes.size))
        seen += len(parts) > 1
        plans.advance(plan, plans.tokens(plan))
    assert seen > 5
