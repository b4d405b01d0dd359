"""Row state as a runner uses it, and what decoder and sampler take of a step.

Owns the seam between row state and tensors: `Rows` is what a runner needs of a device's row state,
`HostRows` is the one whose rows lie in host memory (wire.rows.RowTable itself);
device.device_rows.DeviceRows stands behind the same verbs. Invariants: everything is built in
numpy, whole arrays at a time, and copied once; plan order is kept; a row's entries depend on that
row alone. Called by device.runner and device.graphs after the plan was checked; it must not know
the decoder, the pool or the results.

A step's verbs, in order:

    apply -> begin_digest -> stage                      -> [drawn, finite] -> settle -> fetch
                          -> prepare, stage_bucket (*), .. advance_bucket (*) -> settle -> fetch

where (*) may be a captured graph's, and [drawn, finite] is what the sampler leaves in those two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.buckets import Bucket
from holdfast.device.checks import HeldColumns, check_deltas, check_rows
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.pinned import Uploads
from holdfast.ops.sampler import Pairs, SamplerInputs, seen_pairs
from holdfast.wire.envelope import StepShape, shape_of
from holdfast.wire.plan import StepPlan
from holdfast.wire.rows import RowTable
from holdfast.wire.staging import Staging


@dataclass(frozen=True, slots=True)
class Drawing:
    """Who draws in a step of n rows, and how.

    rows: int64[k], host, indices into the plan's rows, rising. waiting: int64[n - k], the others.
    sampling: parameters of the k rows. top_count: the largest top_logprobs of the n rows, 0 when
    none asks for alternatives; logprobs_asked: whether any of the n rows asks for logprobs.
    """

    rows: np.ndarray
    waiting: np.ndarray
    sampling: SamplerInputs
    top_count: int
    logprobs_asked: bool

    @classmethod
    def of(cls, table: RowTable, plan: StepPlan) -> Drawing:
        """`table` has had the plan's deltas and was not advanced. n >= 1."""
        rows = np.flatnonzero(plan.samples)
        ends = table.length[plan.rows] + plan.query_lens
        most = int(table.records["top_logprobs"][plan.rows].max())
        return cls(
            rows=rows,
            waiting=np.flatnonzero(plan.samples == 0),
            sampling=sampler_inputs(table, plan.rows[rows], ends[rows]),
            top_count=max(most, 0),
            logprobs_asked=most >= 0,
        )


@dataclass(frozen=True, slots=True)
class StepEnds:
    """Where the rows of a step of t query tokens end, n plan rows of which k draw a token.

    last_tokens: int64[k], device, index into t of each drawing row's last query token.
    last_waiting: int64[n - k], device, the same of the waiting rows. Whatever is not finite in a
    chunk is so in its last token too: full attention sees it all.
    """

    last_tokens: torch.Tensor
    last_waiting: torch.Tensor
    drawing: Drawing


@dataclass(frozen=True, slots=True)
class StepBatch(StepEnds):
    """One step of any shape.

    tokens, positions: int64[t], device. attention: see ops.attention.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch


class Fetch(Protocol):
    """What a step leaves, on its way to the host."""

    @property
    def ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(digest, tokens int32[n], finite bool[n]), in plan order; once, and in order of steps."""


class Rows(Protocol):
    """A device's row state. placed: draws lie in the order of Drawing, rows and then waiting; not
    placed: in plan order, as a bucket's do."""

    table: RowTable
    """In host memory: as far as the last `settle`, but for tokens whose fetch was not taken."""
    drawn: torch.Tensor
    """int32[rows_max], device: the tokens drawn in this step."""
    finite: torch.Tensor
    """int32[rows_max], device: 0 where a row was not finite."""

    feeds_back: bool
    """Whether drawn tokens reach the next step on the device, so that a plan may be launched before
    the result of the last one is on the host."""

    @property
    def lags(self) -> bool:
        """Whether tokens are on their way that `table` does not have."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer that a captured graph is given."""

    def reset(self) -> None:
        """All rows are free; buffers stay where they are. No result may be on its way."""

    def warm_up(self) -> None:
        """Launch every kernel once, on no row."""

    def apply(self, plan: StepPlan, epoch: int, last_step: int) -> None:
        """Check the plan, and apply its deltas. Raises WorkerFault when it is unfit."""

    def begin_digest(self, plan: StepPlan) -> None:
        """Of the rows the step uses, computed from what the device really holds."""

    def shape(self, plan: StepPlan) -> StepShape:
        """What graph admission needs to know of the step."""

    def drawn_alike(self, plan: StepPlan) -> bool:
        """Whether every row of the step asks for no more than a temperature."""

    def stage(self, plan: StepPlan) -> StepBatch:
        """What a step of any shape computes; the plan has at least one row."""

    def bucket(self, rows: int) -> Bucket:
        """The static buffers of so many rows with one query token each."""

    def prepare(self, plan: StepPlan, rows: int) -> None:
        """What the host does before `stage_bucket` of that many rows."""

    def stage_bucket(self, rows: int) -> None:
        """Fill the bucket on the device."""

    def advance_bucket(self) -> None:
        """Store the bucket's draws and move its rows, where that is done on the device."""

    def settle(self, plan: StepPlan, *, placed: bool, moved: bool = False) -> None:
        """Move past the step; moved: `advance_bucket` has done the device's part."""

    def fetch(self, plan: StepPlan, *, placed: bool) -> Fetch:
        """Launch the copy of the results; after `settle`, or of a plan without rows."""


@dataclass(frozen=True, slots=True)
class HostFetch:
    """Results that are here."""

    digest: int
    tokens: np.ndarray
    finite: np.ndarray
    ready: bool = True

    def take(self) -> tuple[int, np.ndarray, np.ndarray]:
        return self.digest, self.tokens, self.finite


# No position is as far as this.
_NEVER = np.iinfo(np.int32).max


class DrawnAlike:
    """Which rows ask for no more than a temperature: no filter, edit of logits or logprobs.

    Worked out when a row is admitted, so that a step asks one array. A row with stop ids is such a
    row from `stop_from` on.
    """

    def __init__(self, limits: Limits) -> None:
        self._vocab_size = limits.vocab_size
        self._from = np.full(limits.rows_total, _NEVER, np.int32)

    def admit(self, admits: np.ndarray) -> None:
        """admits: ADMIT[a] of a plan."""
        if admits.size == 0:
            return
        filters = (admits["top_k"] > 0) & (admits["top_k"] < self._vocab_size)
        filters |= (admits["top_p"] < 1) | (admits["min_p"] > 0)
        asks = filters & (admits["temperature"] > 0)
        asks |= (admits["bias_len"] != 0) | (admits["top_logprobs"] >= 0) | penalised(admits)
        stops = np.where(admits["stop_len"] != 0, admits["stop_from"], 0)
        self._from[admits["row"]] = np.where(asks, _NEVER, stops)

    def all_of(self, table: RowTable, plan: StepPlan) -> bool:
        """Whether every row of the plan is one; `table` was not advanced."""
        ends = table.length[plan.rows] + plan.query_lens
        return np.count_nonzero(ends < self._from[plan.rows]) == 0


class HostRows:
    """Row state in host memory: nothing of it is ever on its way."""

    feeds_back = False
    lags = False

    def __init__(self, limits: Limits, device: torch.device | str = "cpu") -> None:
        self.limits = limits
        self.device = torch.device(device)
        self.table = RowTable(limits)
        self._held = HeldColumns(limits)
        self._alike = DrawnAlike(limits)
        self._results = torch.zeros((2, limits.rows_max), dtype=torch.int32, device=self.device)
        self.drawn, self.finite = self._results[0], self._results[1]
        self._staging: Staging | None = None
        self._buckets: Bucket | None = None
        self._digest = 0
        self._found = (np.empty(0, np.int32), np.empty(0, bool))
        # Tokens, positions and slots of int64 each, and last tokens of every row.
        self._uploads = Uploads(self.device, 6 * limits.prefill_tokens + 8 * limits.rows_max)

    @property
    def addresses(self) -> tuple[int, ...]:
        return self._static()[1].addresses

    def reset(self) -> None:
        self.table = RowTable(self.limits)
        self._held = HeldColumns(self.limits)

    def warm_up(self) -> None:
        """There are no kernels."""

    def apply(self, plan: StepPlan, epoch: int, last_step: int) -> None:
        check_deltas(plan, self.table, epoch, last_step)
        self.table.apply(plan)
        self._held.apply(plan)
        check_rows(plan, self.table, self._held)
        self._alike.admit(plan.admits)

    def begin_digest(self, plan: StepPlan) -> None:
        self._digest = self.table.digest_full(plan)

    def shape(self, plan: StepPlan) -> StepShape:
        return step_shape(self.table, plan)

    def drawn_alike(self, plan: StepPlan) -> bool:
        return self._alike.all_of(self.table, plan)

    def stage(self, plan: StepPlan) -> StepBatch:
        table = self.table
        rows, query_lens = plan.rows, plan.query_lens
        starts = table.length[rows]
        ends = starts + query_lens
        _, positions, tokens = table.inputs(rows, query_lens)
        columns = int(self.limits.pages_for_tokens(int(ends.max())))
        # Group 0 is full attention, the only kind there is yet (Limits.groups).
        page_table, page_tokens = table.page_table[0, rows, :columns], self.limits.page_tokens
        drawing = Drawing.of(table, plan)
        last = np.cumsum(query_lens, dtype=np.int64) - 1
        tokens, positions, slots, last_tokens, last_waiting = self._uploads.put(
            tokens.astype(np.int64),
            positions.astype(np.int64),
            AttentionBatch.slots_of(query_lens, starts, page_table, page_tokens),
            last[drawing.rows],
            last[drawing.waiting],
        )
        return StepBatch(
            tokens=tokens,
            positions=positions,
            attention=AttentionBatch(query_lens, starts, page_table, page_tokens, slots),
            last_tokens=last_tokens,
            last_waiting=last_waiting,
            drawing=drawing,
        )

    # Without graphs nobody asks for buckets, and they are as large as all page tables.
    def _static(self) -> tuple[Staging, Bucket]:
        if self._staging is None or self._buckets is None:
            self._staging = Staging(self.limits, 1)
            self._buckets = Bucket.allocate(self.limits, 1, self.device, self._results)
        return self._staging, self._buckets

    def bucket(self, rows: int) -> Bucket:
        return self._static()[1].front(rows)

    def prepare(self, plan: StepPlan, rows: int) -> None:
        """Stage by wire.staging, and copy all of the bucket."""
        staging, buckets = self._static()
        staged, n = staging.fill(plan, self.table, rows), plan.rows.size
        size = self.limits.page_tokens
        column = (staged.positions // size)[None, :, None]
        slots = np.take_along_axis(staged.page_table, column, 2)[:, :, 0].astype(np.int64) * size
        slots += staged.positions % size
        slots[:, n:] = -1
        # The trash row's record is all zero, as padding has it.
        records = self.table.records[staged.rows]
        front = buckets.front(rows)
        for target, values in (
            (front.rows, staged.rows),
            (front.lengths, staged.lengths),
            (front.samples, staged.samples),
            (front.seen, np.where(np.arange(rows) < n, staged.lengths + 1, 0)),
            (front.tokens, staged.tokens),
            (front.positions, staged.positions),
            (front.slots, slots),
            (front.page_table, staged.page_table),
            (front.seeds, records["seed"].view(np.int64)),
            (front.temperature, records["temperature"].copy()),
            (front.draw_positions, staged.lengths + 1),
        ):
            target.copy_(torch.from_numpy(values))

    def stage_bucket(self, rows: int) -> None:
        """`prepare` has done it."""

    def advance_bucket(self) -> None:
        """`settle` does it."""

    def settle(self, plan: StepPlan, *, placed: bool, moved: bool = False) -> None:
        self._found = in_plan_order(plan, *self._results.cpu().numpy(), placed=placed)
        self.table.advance(plan, self._found[0])

    def fetch(self, plan: StepPlan, *, placed: bool) -> HostFetch:
        if plan.rows.size == 0:
            self._found = (np.empty(0, np.int32), np.empty(0, bool))
        return HostFetch(self._digest, *self._found)


def step_shape(table: RowTable, plan: StepPlan) -> StepShape:
    """`table` has had the plan's deltas and was not advanced, so lengths are known."""
    lengths = table.length[plan.rows]
    return shape_of(plan.query_lens, lengths, lengths, plan.drafts)


def in_plan_order(
    plan: StepPlan, drawn: np.ndarray, finite: np.ndarray, *, placed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[n], finite bool[n]) of results int32[rows_max]; 0 where a row draws nothing."""
    n = plan.rows.size
    tokens, whole = np.empty(n, np.int32), np.empty(n, bool)
    order = np.argsort(plan.samples == 0, kind="stable") if placed else slice(None)
    tokens[order], whole[order] = drawn[:n], finite[:n] != 0
    tokens[(plan.samples == 0) | ~whole] = 0
    return tokens, whole


def penalised(records: np.ndarray) -> np.ndarray:
    """bool[k]: rows whose draw looks at their history."""
    repeats = records["repetition_penalty"] != 1
    return repeats | (records["presence_penalty"] != 0) | (records["frequency_penalty"] != 0)


def sampler_inputs(table: RowTable, rows: np.ndarray, positions: np.ndarray) -> SamplerInputs:
    """Sampling parameters of `rows` int32[k], of which each draws the token at its position.

    positions: int32[k]; tokens[row, :position] are known and count for the penalties.
    """
    records = table.records[rows]
    bias, bias_at = _ragged(records["bias_len"])
    stop_len = np.where(positions < records["stop_from"], records["stop_len"], 0)
    stops, stops_at = _ragged(stop_len)
    seen, output_counts = _seen(table, records, rows, positions)
    return SamplerInputs(
        seeds=records["seed"],
        positions=positions.astype(np.int64),
        temperature=records["temperature"],
        top_p=records["top_p"],
        min_p=records["min_p"],
        top_k=records["top_k"],
        repetition=records["repetition_penalty"],
        presence=records["presence_penalty"],
        frequency=records["frequency_penalty"],
        top_logprobs=records["top_logprobs"],
        bias=Pairs(bias, table.bias_ids[rows[bias], bias_at].astype(np.int64)),
        bias_values=table.bias_values[rows[bias], bias_at],
        stops=Pairs(stops, table.stop_ids[rows[stops], stops_at].astype(np.int64)),
        seen=seen,
        output_counts=output_counts,
    )


def _seen(
    table: RowTable, records: np.ndarray, rows: np.ndarray, positions: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """The history that penalties look at: the output's, and for repetition also the prompt's."""
    first = np.where(records["repetition_penalty"] != 1, 0, records["prompt_len"])
    counts = np.where(penalised(records), np.maximum(positions - first, 0), 0)
    owner, at = _ragged(counts)
    at += first[owner]
    ids = table.tokens[rows[owner], at].astype(np.int64)
    in_output = at >= records["prompt_len"][owner]
    return seen_pairs(owner, ids, in_output, table.limits.vocab_size)


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of counts int[k]: (owner int64[p], index within its owner int64[p]), owners rising."""
    total = int(counts.sum())
    if total == 0:
        empty = np.empty(0, np.int64)
        return empty, empty.copy()
    owner = np.repeat(np.arange(counts.size), counts)
    ends = np.cumsum(counts)
    return owner, np.arange(total) - np.repeat(ends - counts, counts)
