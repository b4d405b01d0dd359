"""Graphs of integers: right inside their envelope, wrong without a word outside it."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.config import Limits
from holdfast.sim.fake_graphs import CAPTURE_AFTER_STEPS, FakeGraphs
from holdfast.sim.mutations import applied
from holdfast.sim.planted import MUTATIONS
from holdfast.wire import envelope
from holdfast.wire.envelope import ANY, BEYOND, WITHIN
from holdfast.wire.plan import PAGE_WRITE, StepPlan
from holdfast.wire.rows import RowTable

LIMITS = Limits(
    vocab_size=500, context_tokens=16, page_tokens=2, pages=60, rows_max=5, prefill_tokens=64
)
WINDOW = 5


class Device:
    """A row table and one pool, whose token is a sum of what a row can see; one layer group.

    `windows` (5,) drops pages as the brain does: those no later token can see go to the trash.
    """

    def __init__(self, lengths: list[int], windows: tuple[int, ...] = (0,), **options) -> None:
        self.windows = windows
        self.memory = np.zeros((LIMITS.pages, LIMITS.page_tokens), np.int64)
        self.memory[0] = 10_000  # nobody may see it
        self.table = RowTable(LIMITS)
        for row, length in enumerate(lengths, start=1):
            self._enter(row, length)
        self.graphs = FakeGraphs(LIMITS, windows=windows, **options)

    def _enter(self, row: int, length: int) -> None:
        columns = LIMITS.table_columns
        dropped = (
            max(0, length + 1 - self.windows[0]) // LIMITS.page_tokens if self.windows[0] else 0
        )
        writes = np.zeros(columns, PAGE_WRITE)
        writes["row"], writes["column"] = row, np.arange(columns)
        writes["page"] = 1 + (row - 1) * columns + np.arange(columns)
        writes["page"][:dropped] = 0
        self.table.apply(StepPlan(epoch=1, step=1, page_writes=writes))
        self.table.length[row] = length
        self.table.tokens[row] = 100 * row + np.arange(LIMITS.context_tokens + 1)
        for position in range(dropped * LIMITS.page_tokens, length):
            page = self.table.page_table[0, row, position // LIMITS.page_tokens]
            self.memory[page, position % LIMITS.page_tokens] = 100 * row + position

    def forward(self, plan, rows, first_seen) -> tuple[np.ndarray]:
        row, position, token = rows.inputs(plan.rows, plan.query_lens)
        size = LIMITS.page_tokens
        self.memory[rows.page_table[0, row, position // size], position % size] = token
        sums = np.zeros(plan.rows.size, np.int64)
        for at in np.flatnonzero(plan.samples).tolist():
            one = int(plan.rows[at])
            length = int(rows.length[one] + plan.query_lens[at])
            cells = self.memory[rows.page_table[0, one]].reshape(-1)
            sums[at] = cells[first_seen(0, length) : length].sum()
        return (sums,)

    def step(self, rows: list[int], query_lens: list[int] | None = None) -> list[int]:
        lens = [1] * len(rows) if query_lens is None else query_lens
        plan = StepPlan(
            epoch=1,
            step=2,
            rows=np.array(rows, np.int32),
            query_lens=np.array(lens, np.int32),
            samples=np.ones(len(rows), np.uint8),
        )
        (sums,) = self.graphs.run(plan, self.table, self.forward)
        return sums.tolist()

    def truth(self, rows: list[int], query_lens: list[int] | None = None) -> list[int]:
        said = []
        for at, row in enumerate(rows):
            length = int(self.table.length[row]) + (1 if query_lens is None else query_lens[at])
            first = max(0, length - self.windows[0]) if self.windows[0] else 0
            said.append(sum(100 * row + position for position in range(first, length)))
        return said


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_replay_says_what_an_eager_step_says_in_every_bucket(count):
    device, rows = Device([3, 9, 14, 0, 6]), list(range(count, 0, -1))
    assert device.step(rows) == device.truth(rows)
    assert (device.graphs.replays, device.graphs.refusals) == (1, {})


def test_what_is_not_admitted_runs_eagerly_and_is_counted_by_reason():
    device = Device([3, 9, 6])
    assert device.step([1, 2, 3], [1, 2, 1]) == device.truth([1, 2, 3], [1, 2, 1])
    assert device.step([1], [3]) == device.truth([1], [3])
    assert device.graphs.refusals == {"prefill": 2}
    assert device.graphs.replays == 0


def test_a_graph_too_small_for_the_batch_forgets_rows(monkeypatch):
    device = Device([3, 9, 6])
    smallest = next(iter(device.graphs.captures))
    monkeypatch.setattr(envelope, "admit", lambda *_: smallest)
    assert device.step([1, 2, 3]) == [*device.truth([1]), 0, 0]


@pytest.mark.parametrize("length", range(WINDOW + 4))
def test_each_phase_is_right_on_its_side_of_the_window(length):
    device = Device([length], (WINDOW,))
    assert device.step([1]) == device.truth([1])
    assert device.graphs.refusals == {}


def test_a_batch_on_both_sides_of_a_window_is_refused():
    device = Device([2, 9], (WINDOW,))
    assert device.step([1, 2]) == device.truth([1, 2])
    assert device.graphs.refusals == {"window_phase": 1}
    masking = Device([2, 9], (WINDOW,), phases=(ANY,))
    assert masking.step([1, 2]) == masking.truth([1, 2])
    assert masking.graphs.replays == 1


@pytest.mark.parametrize(("phase", "length"), [(WITHIN, WINDOW), (BEYOND, WINDOW - 2)])
def test_the_wrong_phase_gives_wrong_tokens_and_no_error(monkeypatch, phase, length):
    device = Device([length], (WINDOW,))
    wrong = next(e for e in device.graphs.captures if e.phases == (phase,))
    monkeypatch.setattr(envelope, "admit", lambda *_: wrong)
    assert device.step([1]) != device.truth([1])


@pytest.mark.parametrize("name", ["window-boundary-within", "window-boundary-beyond"])
def test_a_window_boundary_off_by_one_gives_wrong_tokens(name):
    def wrong(lengths: list[int]) -> bool:
        device = Device(lengths, (WINDOW,))
        return device.step([1, 2]) != device.truth([1, 2])

    pairs = [[one, other] for one in range(WINDOW + 4) for other in range(WINDOW + 4)]
    assert not any(wrong(pair) for pair in pairs)
    with applied(next(one for one in MUTATIONS if one.name == name)):
        assert any(wrong(pair) for pair in pairs)


def test_a_context_longer_than_the_captured_tables_is_refused_and_would_be_cut():
    device = Device([7, 8], context_tokens=8)
    assert device.step([1]) == device.truth([1])
    assert device.step([2]) == device.truth([2])
    assert device.graphs.refusals == {"context_too_long": 1}


def test_graphs_of_an_older_worker_are_refused_until_this_one_has_its_own():
    old = Device([3, 9])
    old.step([1, 2])
    device = Device([5, 6], pool_epoch=2, inherited=old.graphs.captures.values())
    for _ in range(CAPTURE_AFTER_STEPS + 2):
        assert device.step([1, 2]) == device.truth([1, 2])
    assert device.graphs.refusals == {"pool_epoch": CAPTURE_AFTER_STEPS - 1}
    assert device.graphs.replays == 3


def test_a_graph_of_an_older_worker_would_read_that_worker_s_buffers(monkeypatch):
    old = Device([3, 9])
    old.step([1, 2])
    device = Device([5, 6], pool_epoch=2, inherited=old.graphs.captures.values())
    stale = next(e for e in device.graphs.captures if e.rows == 2)
    monkeypatch.setattr(envelope, "admit", lambda *_: stale)
    assert device.step([1, 2]) != device.truth([1, 2])


def test_a_buffer_that_moved_behind_the_graphs_backs_is_noticed():
    device = Device([3, 9])
    device.graphs.reallocate()
    assert device.step([1, 2]) == device.truth([1, 2])
    assert device.graphs.refusals == {"address_moved": 1}
    device.graphs.capture()
    assert device.step([1, 2]) == device.truth([1, 2])
    assert device.graphs.replays == 1


def test_a_batch_that_shrinks_writes_nothing_for_rows_that_left():
    device = Device([3, 9, 6, 2])
    device.step([1, 2, 3, 4])
    kept = device.memory.copy()
    device.step([1, 2, 3])  # the bucket still has four rows
    assert np.array_equal(device.memory[1:], kept[1:])
    device.table.page_table[0, 4] = (
        1 + 3 * LIMITS.table_columns
    )  # row 4's pages are somebody else's
    device.memory[1 + 3 * LIMITS.table_columns :] = 7
    device.step([1, 2, 3])
    assert (device.memory[1 + 3 * LIMITS.table_columns :] == 7).all()
