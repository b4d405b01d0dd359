"""DeviceRows: the row table in device memory, and the host's mirror of all of it but drawn tokens.

Owns the tables and the launches of ops.kernels.rows; the CUDA twin of wire.rows.RowTable. Tokens
feed back on the device: a step's draws are stored in its rows by a kernel, so plan N + 1 may be
applied and launched before result N is on the host. The mirror is a RowTable that is as far as the
last launch in lengths, page tables and records, which is what device.checks needs, and as far as
the last fetched result in drawn tokens, which only penalties look at (`lags`).

Invariants: everything runs on one stream, the caller's current one, so kernels need no fences among
themselves; a result lies in a slot of its own until it was taken; a token is noted only for the
request that drew it, whoever has its row by then. Called by device.runner from one thread; on a CPU
the kernels run in Triton's interpreter, for tests. Knows no decoder, no pool and no sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.batch import (
    Drawing,
    DrawnAlike,
    StepBatch,
    in_plan_order,
    penalised,
    step_shape,
)
from holdfast.device.buckets import Bucket
from holdfast.device.checks import HeldColumns, check_deltas, check_rows
from holdfast.device.frame import Frames
from holdfast.device.steady import SteadyRows
from holdfast.errors import require
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.kernels import rows as kernels
from holdfast.ops.kernels.launch import launch
from holdfast.ops.pinned import DeviceEvent, await_event
from holdfast.wire.envelope import StepShape
from holdfast.wire.plan import StepPlan
from holdfast.wire.rows import RowTable

# Results launched and not taken: one a step in flight.
FETCHES = 2
# Lanes of a program that walks lists; a row of 4,096 columns is 16 of its turns.
_BLOCK = 256
# Programs of the kernels that walk rows: two on every SM of the largest GPUs.
_PROGRAMS = 256


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Rows that draw in a launched step: whose they were, and where their tokens belong."""

    at: np.ndarray
    rows: np.ndarray
    owners: np.ndarray
    positions: np.ndarray


class DeviceFetch:
    """The copy of one step's results to the host."""

    def __init__(self, rows: DeviceRows, plan: StepPlan, placed: bool, slot: int) -> None:
        self._rows = rows
        self._plan = plan
        self._placed = placed
        self._slot = slot
        self._drawn = rows.drawn_of(plan)

    @property
    def ready(self) -> bool:
        """Whether `take` would not wait."""
        event = self._rows.fetched[self._slot]
        return event is None or event.query()

    def take(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(digest, tokens int32[n], finite bool[n]) in plan order; waits for the copy. Once.

        Raises WorkerFault when it never comes, and what the GPU has to say of the step.
        """
        event = self._rows.fetched[self._slot]
        if event is not None:
            await_event(event, f"step {self._plan.step}")
        plan, n = self._plan, self._plan.rows.size
        hashes, drawn, finite = self._rows.fetched_arrays(self._slot)
        digest = int(np.add.reduce(hashes[:n])) if n else 0
        tokens, whole = in_plan_order(plan, drawn, finite, placed=self._placed)
        self._rows.note(self._drawn, tokens)
        return digest, tokens, whole


class DeviceRows:
    """Row state of R = limits.rows_total rows; the tables are RowTable's, as int32 (`records` too,
    20 words a row; `bias_values` by their bits)."""

    feeds_back = True

    def __init__(
        self, limits: Limits, device: torch.device | str, *, delta_words: int | None = None
    ) -> None:
        self.limits = limits
        self.device = torch.device(device)
        self._alike = DrawnAlike(limits)
        self._begin_mirror()
        rows, groups, columns = limits.rows_total, limits.groups, limits.table_columns
        self.records = self._zeros(rows, kernels.RECORD_WORDS)
        self.length = self._zeros(rows)
        self.page_table = self._zeros(groups, rows, columns)
        self.pages_len = self._zeros(groups, rows)
        self.tokens = self._zeros(rows, limits.context_tokens + 1)
        self.bias_ids = self._zeros(rows, limits.bias_entries)
        self.bias_values = self._zeros(rows, limits.bias_entries)
        self.stop_ids = self._zeros(rows, limits.stop_ids) - 1
        # One copy brings all of a result: hashes of rows (two words each), draws, finite flags.
        self._results = self._zeros(4 * limits.rows_max)
        by_row = self._results.view(4, limits.rows_max)
        self._hashes = self._results[: 2 * limits.rows_max].view(torch.int64)
        self.drawn, self.finite = by_row[2], by_row[3]
        self._buckets = Bucket.allocate(limits, 1, self.device, by_row[2:])
        self._widths = self._zeros(groups, limits.rows_max)
        sizes = {} if delta_words is None else {"delta_words": delta_words}
        self.frames = Frames(limits, self.device, **sizes)
        cuda = self.device.type == "cuda"
        self._fetched = [
            torch.zeros(4 * limits.rows_max, dtype=torch.int32, pin_memory=cuda)
            for _ in range(FETCHES)
        ]
        self.fetched = [DeviceEvent(self.device) if cuda else None for _ in range(FETCHES)]
        self._fetches = 0
        self._untaken = 0
        self._programs = min(limits.rows_max, _PROGRAMS)
        self._table_shape = {
            "GROUPS": groups,
            "TABLE_ROWS": rows,
            "COLUMNS": columns,
            "BLOCK": _BLOCK,
        }

    def _begin_mirror(self) -> None:
        """The mirror of free rows, and what is known of its rows."""
        self.table = RowTable(self.limits, digests=False)
        self._held = HeldColumns(self.limits)
        self._steady = SteadyRows(self.limits)
        # Of a run's rows, once it was asked: all are alike; who draws.
        self._all_alike = False
        self._drawers: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer that a decode graph's kernels are given: a part of
        wire.envelope.Footing."""
        own = self.records, self.pages_len, self._widths
        buckets = self._buckets.addresses
        return (*self.ragged_addresses, *(buffer.data_ptr() for buffer in own), *buckets)

    @property
    def ragged_addresses(self) -> tuple[int, ...]:
        """The same of what `launch_ragged` and `launch_mixed` read."""
        own = self.frames.device, self.length, self.page_table, self.tokens
        return tuple(buffer.data_ptr() for buffer in own)

    @property
    def lags(self) -> bool:
        """Whether a draw is on its way that the mirror does not have."""
        return self._untaken > 0

    def reset(self) -> None:
        require(self._untaken == 0, f"{self._untaken} results are on their way")
        self._begin_mirror()
        for table in (self.records, self.length, self.page_table, self.pages_len, self.tokens):
            table.zero_()
        self.bias_ids.zero_()
        self.bias_values.zero_()
        self.stop_ids.fill_(-1)

    def warm_up(self) -> None:
        """Launch every kernel once, on a frame of nothing: compiled now, or never."""
        nothing = StepPlan(epoch=0, step=0)
        for _ in self.frames.upload(nothing):
            self._apply(slice(0, 1), slice(0, 1), slice(0, 1))
        self._launch_digest()
        self.launch_ragged(*(torch.zeros(1, dtype=torch.int64, device=self.device),) * 4)
        self.stage_bucket(1)
        for placed in (False, True):
            self._advance(placed=placed)
        self.fetch(nothing, placed=False).take()

    # --- the verbs of device.batch.Rows ---

    def apply(self, plan: StepPlan, epoch: int, last_step: int) -> None:
        check_deltas(plan, self.table, epoch, last_step)
        self.table.apply(plan)
        again = self._steady.follow(plan, self.table)
        if not again:
            self._held.apply(plan)
            check_rows(plan, self.table, self._held)
            self._steady.learn(plan, self.table)
            self._alike.admit(plan.admits)
            self._all_alike, self._drawers = False, None
        for deltas in self.frames.upload(plan, again=again):
            self._apply(deltas.clears, deltas.admits, deltas.writes)

    def _apply(self, clears: slice, admits: slice, writes: slice) -> None:
        """The deltas of the frame that was copied last, in their order."""
        frame, shape = self.frames.device, self._table_shape
        if (count := clears.stop - clears.start) > 0:
            launch(
                kernels.clear_rows,
                (min(count, self._programs),),
                frame,
                self.records,
                self.length,
                self.page_table,
                self.pages_len,
                **shape,
            )
        if (count := admits.stop - admits.start) > 0:
            launch(
                kernels.admit_rows,
                (min(count, self._programs),),
                frame,
                self.records,
                self.length,
                self.tokens,
                self.bias_ids,
                self.bias_values,
                self.stop_ids,
                TOKEN_COLUMNS=self.tokens.shape[1],
                BIAS=self.limits.bias_entries,
                STOPS=self.limits.stop_ids,
                BLOCK=_BLOCK,
            )
        if (count := writes.stop - writes.start) > 0:
            launch(
                kernels.write_pages,
                (min(-(-count // _BLOCK), self._programs),),
                frame,
                self.page_table,
                self.pages_len,
                TABLE_ROWS=shape["TABLE_ROWS"],
                COLUMNS=shape["COLUMNS"],
                BLOCK=_BLOCK,
            )

    def begin_digest(self, plan: StepPlan) -> None:
        """Launch the digest of the rows that the step uses; `fetch` brings it."""
        if plan.rows.size:
            self._launch_digest()

    def _launch_digest(self) -> None:
        launch(
            kernels.digest_rows,
            (self._programs,),
            self.frames.device,
            self.records,
            self.length,
            self.page_table,
            self.pages_len,
            self.tokens,
            self.bias_ids,
            self.bias_values,
            self.stop_ids,
            self._hashes,
            ROWS_MAX=self.limits.rows_max,
            TOKEN_COLUMNS=self.tokens.shape[1],
            BIAS=self.limits.bias_entries,
            STOPS=self.limits.stop_ids,
            **self._table_shape,
        )

    def digest(self, plan: StepPlan) -> int:
        """As RowTable.digest_full, from the device's tables; waits for it."""
        self.begin_digest(plan)
        hashes = self._hashes[: plan.rows.size].cpu().numpy().view(np.uint64)
        return int(np.add.reduce(hashes)) if plan.rows.size else 0

    def shape(self, plan: StepPlan) -> StepShape:
        if self._steady.steady:
            return self._steady.shape
        return step_shape(self.table, plan)

    def drawn_alike(self, plan: StepPlan) -> bool:
        # Rows that are alike stay so as they grow.
        if not self._all_alike:
            self._all_alike = self._alike.all_of(self.table, plan)
        return self._all_alike

    def stage(self, plan: StepPlan) -> StepBatch:
        """A step of any shape. Ids, positions and slots never come from the host.

        Penalties look at drawn tokens in the mirror: who stages a row with any does not lag.
        """
        self.require_past(plan)
        table, rows, query_lens = self.table, plan.rows, plan.query_lens
        starts = table.length[rows]
        ends = starts + query_lens
        total, n = int(query_lens.sum()), rows.size
        tokens, positions, slots, lasts = (
            torch.empty(size, dtype=torch.int64, device=self.device)
            for size in (total, total, total, n)
        )
        self.launch_ragged(tokens, positions, slots, lasts)
        columns = int(self.limits.pages_for_tokens(int(ends.max())))
        # Group 0 is full attention, the only kind there is yet (Limits.groups).
        attention = AttentionBatch(
            query_lens, starts, table.page_table[0, rows, :columns], self.limits.page_tokens, slots
        )
        count = int(np.count_nonzero(plan.samples))
        return StepBatch(
            tokens=tokens,
            positions=positions,
            attention=attention,
            last_tokens=lasts[:count],
            last_waiting=lasts[count:],
            drawing=Drawing.of(table, plan),
        )

    def require_past(self, plan: StepPlan) -> None:
        """Raise InvariantError where the step draws by tokens that the mirror does not have."""
        drawing = self.table.records[plan.rows[plan.samples != 0]]
        require(not (self.lags and penalised(drawing).any()), f"step {plan.step} draws by a past")

    def launch_ragged(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        lasts: torch.Tensor,
    ) -> None:
        """Stage the query tokens of the last frame's step. May be captured."""
        launch(
            kernels.stage_ragged,
            (self._programs,),
            self.frames.device,
            self.length,
            self.page_table,
            self.tokens,
            tokens,
            positions,
            slots,
            lasts,
            ROWS_MAX=self.limits.rows_max,
            COLUMNS=self.limits.table_columns,
            TOKEN_COLUMNS=self.tokens.shape[1],
            PAGE_TOKENS=self.limits.page_tokens,
            BLOCK=_BLOCK,
        )

    def launch_mixed(
        self,
        rows: torch.Tensor,
        seen: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        page_table: torch.Tensor,
    ) -> None:
        """Stage what a bucket of the last frame's step has besides: the page table of each of
        `rows`, and padding. May be captured. As ops.kernels.rows.stage_mixed has them."""
        launch(
            kernels.stage_mixed,
            (rows.numel(),),
            self.frames.device,
            self.page_table,
            rows,
            seen,
            tokens,
            positions,
            slots,
            page_table,
            tokens.numel(),
            ROWS_MAX=self.limits.rows_max,
            COLUMNS=self.limits.table_columns,
            PAGE_TOKENS=self.limits.page_tokens,
            BLOCK=_BLOCK,
        )

    def advance(self, plan: StepPlan, tokens: np.ndarray) -> None:
        """Move past the step with tokens that the host has: int32[n] in plan order."""
        self.drawn[: tokens.size].copy_(torch.from_numpy(tokens))
        self.finite.fill_(1)
        self.settle(plan, placed=False)
        self.fetch(plan, placed=False).take()

    # --- a step whose result is fetched later ---

    def bucket(self, rows: int) -> Bucket:
        """The static buffers of so many rows with one query token each."""
        return self._buckets.front(rows)

    def prepare(self, plan: StepPlan, rows: int) -> None:
        """What the host does before `stage_bucket`: nothing, the frame has it all."""

    def stage_bucket(self, rows: int) -> None:
        """Fill the bucket's buffers for the step of the last frame. May be captured."""
        static = self._buckets
        launch(
            kernels.stage_bucket,
            (rows,),
            self.frames.device,
            self.records,
            self.length,
            self.page_table,
            self.pages_len,
            self.tokens,
            static.rows,
            static.lengths,
            static.samples,
            static.seen,
            static.tokens,
            static.positions,
            static.slots,
            static.page_table,
            self._widths,
            static.seeds,
            static.temperature,
            static.draw_positions,
            ROWS_MAX=self.limits.rows_max,
            TOKEN_COLUMNS=self.tokens.shape[1],
            PAGE_TOKENS=self.limits.page_tokens,
            QUERY_LEN=1,
            **self._table_shape,
        )

    def advance_bucket(self) -> None:
        """Store the bucket's draws and move its rows, on the device alone. May be captured."""
        self._advance(placed=False)

    def settle(self, plan: StepPlan, *, placed: bool, moved: bool = False) -> None:
        """Move past the step with the tokens in `drawn`, on the device and then in the mirror."""
        if not moved:
            self._advance(placed=placed)
        if self._steady.steady:
            self.table.length[self._steady.index] += 1
        else:
            self.table.length[plan.rows] += plan.query_lens

    def _advance(self, *, placed: bool) -> None:
        block = min(_BLOCK, 1 << (self.limits.rows_max - 1).bit_length())
        launch(
            kernels.advance_rows,
            (-(-self.limits.rows_max // block),),
            self.frames.device,
            self.length,
            self.tokens,
            self.drawn,
            ROWS_MAX=self.limits.rows_max,
            TOKEN_COLUMNS=self.tokens.shape[1],
            PLACED=placed,
            BLOCK=block,
        )

    def fetch(self, plan: StepPlan, *, placed: bool) -> DeviceFetch:
        """Launch the copy of digest, tokens and flags to the host; after `settle` or `moved`."""
        require(self._untaken < FETCHES, f"{self._untaken} results are not taken")
        slot = self._fetches % FETCHES
        self._fetches += 1
        self._untaken += 1
        self._fetched[slot].copy_(self._results, non_blocking=True)
        event = self.fetched[slot]
        if event is not None:
            event.record()
        return DeviceFetch(self, plan, placed, slot)

    def drawn_of(self, plan: StepPlan) -> _Drawn:
        """Who draws in the plan, whose rows have moved past it."""
        if self._drawers is None:
            at = np.flatnonzero(plan.samples)
            rows = plan.rows[at].astype(np.int64)
            self._drawers = at, rows, self.table.records["owner"][rows]
        at, rows, owners = self._drawers
        return _Drawn(at, rows, owners, self.table.length[rows])

    def fetched_arrays(self, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hashes uint64[R], drawn int32[R], finite int32[R]) of a copy that is over."""
        rows = self.limits.rows_max
        words = self._fetched[slot].numpy()
        return words[: 2 * rows].view(np.uint64), words[2 * rows : 3 * rows], words[3 * rows :]

    def note(self, drawn: _Drawn, tokens: np.ndarray) -> None:
        """Give the mirror the tokens of a step, unless their row is another request's by now."""
        self._untaken -= 1
        mine = self.table.records["owner"][drawn.rows] == drawn.owners
        self.table.tokens[drawn.rows[mine], drawn.positions[mine]] = tokens[drawn.at[mine]]
