"""Graphs of integers: what a captured graph would really compute, inside its envelope or not.

A replay knows nothing of the step but what lies in the static buffers it was captured with, and it
does what was baked in: so many rows, so many query tokens, so many columns, reading each window
group in one phase. Outside its envelope it raises nothing, as the real thing does: a bucket too
small forgets rows, the wrong phase reads pages that were dropped, a row left over from a larger
batch writes the page of its old owner, a graph of an older worker reads that worker's buffers. The
tokens are then wrong, and the simulator sees it. Production code decides and pads: wire.envelope,
wire.staging.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from holdfast.config import Limits
from holdfast.wire import envelope  # its functions by name of the module: mutations replace them
from holdfast.wire.envelope import ANY, BEYOND, WITHIN, Envelope, Footing, Graphs, Refusal
from holdfast.wire.plan import TRASH_PAGE, StepPlan
from holdfast.wire.rows import RowTable
from holdfast.wire.staging import Staged, Staging

# A worker that took over replays nothing for so many steps: its predecessor's graphs are all there
# is until it has captured its own, and admission has to refuse them.
CAPTURE_AFTER_STEPS = 6

# first_seen(group, length): the first position that the last of `length` tokens sees.
FirstSeen = Callable[[int, int], int]


def first_seen_of(windows: tuple[int, ...], phases: tuple[int, ...] | None = None) -> FirstSeen:
    """With `phases`, as a graph has it baked in; without, as it is."""

    def first_seen(group: int, length: int) -> int:
        window = windows[group]
        phase = ANY if phases is None else phases[group]
        if window == 0 or phase == WITHIN:
            return 0
        return length - window if phase == BEYOND else max(0, length - window)

    return first_seen


class StagedRows:
    """Static buffers in the shape of a row table: what `forward` reads instead of one.

    Row i of it is the i-th of the batch. records: ADMIT[B]; length: int32[B];
    page_table: int32[groups, B, W], of which the first `columns` are read.
    """

    def __init__(self, staged: Staged, table: RowTable, columns: int) -> None:
        self._staged = staged
        self.records = table.records[staged.rows]
        self.length = staged.lengths
        self.page_table = staged.page_table
        if columns < self.page_table.shape[2]:
            # What lies behind a narrower table is anybody's; here it is the trash page.
            self.page_table = self.page_table.copy()
            self.page_table[:, :, columns:] = TRASH_PAGE

    def inputs(self, rows: np.ndarray, query_lens: np.ndarray) -> tuple[np.ndarray, ...]:
        """As RowTable.inputs, for all rows in order and one query length for all."""
        count = int(query_lens[0])
        shape = (-1, self._staged.query_len)
        positions = self._staged.positions.reshape(shape)[:, :count].reshape(-1)
        tokens = self._staged.tokens.reshape(shape)[:, :count].reshape(-1)
        return np.repeat(rows, count), positions, tokens


# forward(plan, rows, first_seen) executes a step on a row table or what stands for one, and returns
# arrays with the same number of entries for each row of a plan of one query length.
Forward = Callable[[StepPlan, RowTable | StagedRows, FirstSeen], tuple[np.ndarray, ...]]


@dataclass(frozen=True, slots=True)
class Capture:
    """One graph: its envelope and, baked in, the buffers of the process that captured it."""

    envelope: Envelope
    staging: Staging


class FakeGraphs:
    """The graphs of one worker.

    windows: Limits.windows. query_lens: what is captured, 1 for decode and 1 + depth to verify
    drafts. inherited: captures of the worker before, all there is at first. phases: captured for
    each window group.
    """

    def __init__(
        self,
        limits: Limits,
        pool_epoch: int = 1,
        *,
        windows: tuple[int, ...] = (0,),
        query_lens: tuple[int, ...] = (1,),
        inherited: Iterable[Capture] = (),
        phases: tuple[int, ...] = (WITHIN, BEYOND),
        context_tokens: int | None = None,
    ) -> None:
        self.limits = limits
        self.windows = windows
        self.ladder = envelope.buckets(limits.rows_max)
        self.staging = {query_len: Staging(limits, query_len) for query_len in query_lens}
        # Addresses mean something in one process only: the next worker often gets the very same
        # ones. So they say which buffers of a worker, and never which worker: the pool epoch does.
        self.footing = Footing(pool_epoch, 1, "page-major", "reference", (0,))
        self.refusals: dict[str, int] = {}
        self.replays = 0
        self._phases = phases
        self._context_tokens = context_tokens or limits.table_columns * limits.page_tokens
        self._first_seen = first_seen_of(windows)
        self._steps = 0
        self.captures: dict[Envelope, Capture] = {}
        self._take(inherited)
        if not self.captures:
            self.capture()

    def capture(self) -> None:
        """Capture every bucket, query length and phase anew, on what holds now."""
        choices = [self._phases if window else (ANY,) for window in self.windows]
        self._take(
            Capture(Envelope(rows, query_len, self._context_tokens, phases, self.footing), staging)
            for rows in self.ladder
            for query_len, staging in self.staging.items()
            for phases in itertools.product(*choices)
        )

    def reallocate(self) -> None:
        """A buffer moves behind the graphs' backs."""
        self.staging = {query_len: Staging(self.limits, query_len) for query_len in self.staging}
        self.footing = self.footing._replace(addresses=(self.footing.addresses[0] + 1,))

    def _take(self, captures: Iterable[Capture]) -> None:
        self.captures = {capture.envelope: capture for capture in captures}
        self._graphs = Graphs(self.captures, self.windows)

    def run(
        self,
        plan: StepPlan,
        table: RowTable,
        forward: Forward,
        *,
        drafts: np.ndarray | None = None,
        moves_bytes: bool = False,
    ) -> tuple[np.ndarray, ...]:
        """Execute the step, by a graph where one is admitted; returns what `forward` returns.

        drafts: uint8[n] as StepPlan.drafts, or None or empty.
        """
        self._steps += 1
        if self._steps == CAPTURE_AFTER_STEPS and self._stale:
            self.capture()
        lengths = table.length[plan.rows]
        shape = envelope.shape_of(
            plan.query_lens, lengths, lengths, drafts, moves_bytes=moves_bytes
        )
        graph = envelope.admit(shape, self.footing, self._graphs)
        staging = self.staging.get(shape.query_len)
        if shape.prefill or staging is None or shape.seen_max > self._room:
            assert isinstance(graph, Refusal)
            self._count(graph)
            return forward(plan, table, self._first_seen)
        draft_count = int(drafts[0]) if drafts is not None and drafts.size else 0
        bucket = envelope.bucket_of(shape.rows, self.ladder)
        staged = staging.fill(plan, table, bucket, draft_count)
        if isinstance(graph, Refusal):
            self._count(graph)
            columns, first_seen = self.limits.table_columns, self._first_seen
        else:
            self.replays += 1
            staged = self.captures[graph].staging.view(graph.rows)
            columns = self.limits.pages_for_tokens(graph.context_tokens)
            first_seen = first_seen_of(self.windows, graph.phases)
        rows = StagedRows(staged, table, columns)
        answer = forward(_padded(plan, staged, draft_count), rows, first_seen)
        return tuple(_of_rows(array, staged.rows.size, plan.rows.size) for array in answer)

    @property
    def _stale(self) -> bool:
        return all(captured.footing != self.footing for captured in self.captures)

    @property
    def _room(self) -> int:
        """Tokens that a page table has room for."""
        return self.limits.table_columns * self.limits.page_tokens

    def _count(self, reason: Refusal) -> None:
        self.refusals[reason.value] = self.refusals.get(reason.value, 0) + 1


def _padded(plan: StepPlan, staged: Staged, drafts: int) -> StepPlan:
    """The step as the buffers have it: every row of the bucket, in order."""
    count = staged.rows.size
    changes = {
        "rows": np.arange(count, dtype=np.int32),
        "query_lens": np.full(count, staged.query_len, np.int32),
        "samples": staged.samples,
    }
    if drafts:
        changes["drafts"] = np.full(count, drafts, np.uint8)
    return replace(plan, **changes)


def _of_rows(array: np.ndarray, computed: int, wanted: int) -> np.ndarray:
    """Of an answer for `computed` rows that for the first `wanted`; what is missing reads as 0."""
    each = array.size // computed
    answer = np.zeros(wanted * each, array.dtype)
    kept = min(wanted, computed) * each
    answer[:kept] = array[:kept]
    return answer
