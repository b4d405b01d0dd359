"""The row table: what a device knows of each request, as a sum of deltas, and its proof.

One `RowTable` lives on each device; the brain keeps another, its *mirror*, which lags behind: it
applies plan N's deltas only when result N is committed, so it holds what the device must have held
when it ran step N. Both compute a digest of the rows the step used; core.commit compares them. A
lost, repeated or misapplied delta is thus found before a token of that step is journalled.

All of it is numpy, so that the simulator and a CPU device run the very same code; a CUDA device has
twins of `apply`, `inputs`, `digest` and `advance` that are tested against these.

Row 0 is the trash row: padding reads and writes it, and its page table holds only the trash page.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.wire.plan import ADMIT, TRASH_ROW, StepPlan

# Domains of the digest's fields: mix(domain + index, value). Far enough apart never to overlap.
_RECORD = 0
_STOPS = 1 << 10
_BIAS = 1 << 16
_TOKENS = 1 << 32
_PAGES = 1 << 40
_GROUP_STRIDE = 1 << 32

_C_FIELD = np.uint64(0x9E37_79B9_7F4A_7C15)
_C_VALUE = np.uint64(0xD1B5_4A32_D192_ED03)
_C_FINAL = np.uint64(0xBF58_476D_1CE4_E5B9)
_SHIFT = np.uint64(32)
_TOKENS_OFFSET = np.uint64((_TOKENS * 0x9E37_79B9_7F4A_7C15) % (1 << 64))

RECORD_WORDS = ADMIT.itemsize // 8


def mix(fields: np.ndarray | int, values: np.ndarray) -> np.ndarray:
    """uint64 hash of (field, value), elementwise, modulo 2**64.

    x = field * C1 + value * C2; x ^= x >> 32; x *= C3. Every step is a bijection of 64 bits for a
    given field, so one changed value always changes a sum of hashes. `values` are reinterpreted as
    uint64; signed ones must be cast before they come here.
    """
    if isinstance(fields, int):
        offset = np.uint64((fields * 0x9E37_79B9_7F4A_7C15) % (1 << 64))
    else:
        offset = fields.astype(np.uint64)
        offset *= _C_FIELD
    return _mix(offset, values)


def _mix(offset: np.ndarray | np.uint64, values: np.ndarray) -> np.ndarray:
    """`mix` with field * C1 given."""
    x = values.astype(np.uint64)
    x *= _C_VALUE
    x = x + offset
    x ^= x >> _SHIFT
    x *= _C_FINAL
    return x


class RowTable:
    """Row state of one device, R = limits.rows_total rows, W = limits.table_columns.

    records: ADMIT[R], the admission of the row's request, zero for a free row.
    length: int32[R], tokens whose KV is in the row's pages.
    page_table: int32[groups, R, W]; columns not held are the trash page 0.
    pages_len: int32[groups, R], one past the highest column ever written for the request.
    tokens: int32[R, context_tokens + 1]; valid below records["tokens_len"], then below length + 1.
    bias_ids, bias_values: int32/float32[R, bias_entries]; stop_ids: int32[R, stop_ids],
    -1 behind the last.
    """

    def __init__(self, limits: Limits, *, digests: bool = True) -> None:
        """digests: False where they are computed elsewhere: `digest` may not be asked, and `apply`
        has half as much to do."""
        rows = limits.rows_total
        self.limits = limits
        self.records = np.zeros(rows, ADMIT)
        self.length = np.zeros(rows, np.int32)
        self.page_table = np.zeros((limits.groups, rows, limits.table_columns), np.int32)
        self.pages_len = np.zeros((limits.groups, rows), np.int32)
        self.tokens = np.zeros((rows, limits.context_tokens + 1), np.int32)
        self.bias_ids = np.zeros((rows, limits.bias_entries), np.int32)
        self.bias_values = np.zeros((rows, limits.bias_entries), np.float32)
        # -1 matches no token, so a comparison with all columns needs no mask.
        self.stop_ids = np.full((rows, limits.stop_ids), -1, np.int32)
        self._order = np.arange(rows, dtype=np.int64) << 32  # the place of a row in a plan
        # Digest of everything of a row that only deltas change, kept up to date by `apply`; of no
        # row where nobody asks.
        self._empty = self._record_digest(np.array([TRASH_ROW]))[0]
        self._settled = np.full(rows if digests else 0, self._empty, np.uint64)

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's deltas: clears, then admits, then page writes.

        Raises InvariantError when a delta names the trash row or a place outside the table.
        """
        if plan.clears.size:
            rows = plan.clears
            require(int(rows.min()) > TRASH_ROW, f"step {plan.step} clears row {rows.min()}")
            self.records[rows] = np.zeros((), ADMIT)
            self.length[rows] = 0
            self.page_table[:, rows] = 0
            self.pages_len[:, rows] = 0
            if self._settled.size:
                self._settled[rows] = self._empty
        if plan.admits.size:
            self._admit(plan)
        if plan.page_writes.size:
            self._write_pages(plan)

    def _admit(self, plan: StepPlan) -> None:
        token_at = bias_at = stop_at = 0
        for record in plan.admits:
            row = int(record["row"])
            require(row > TRASH_ROW, f"step {plan.step} admits row {row}")
            require(self.records["owner"][row] == 0, f"step {plan.step} admits held row {row}")
            tokens_len, bias_len, stop_len = (
                int(record["tokens_len"]),
                int(record["bias_len"]),
                int(record["stop_len"]),
            )
            self.records[row] = record
            self.length[row] = record["length"]
            self.tokens[row, :tokens_len] = plan.admit_tokens[token_at : token_at + tokens_len]
            self.bias_ids[row, :bias_len] = plan.bias_ids[bias_at : bias_at + bias_len]
            self.bias_values[row, :bias_len] = plan.bias_values[bias_at : bias_at + bias_len]
            self.stop_ids[row] = -1
            self.stop_ids[row, :stop_len] = plan.stop_ids[stop_at : stop_at + stop_len]
            token_at += tokens_len
            bias_at += bias_len
            stop_at += stop_len
            if self._settled.size:
                self._settled[row] = self._record_digest(np.array([row]))[0]

    def _write_pages(self, plan: StepPlan) -> None:
        writes = plan.page_writes
        group, row, column, page = (writes[name] for name in ("group", "row", "column", "page"))
        require(
            int(row.min()) > TRASH_ROW
            and int(column.min()) >= 0
            and int(column.max()) < self.page_table.shape[2],
            f"step {plan.step} writes a page outside the table",
        )
        if self._settled.size:
            fields = _page_fields(group, column)
            old = self.page_table[group, row, column]
            change = _page_digest(fields, page)
            if np.count_nonzero(old):
                change -= _page_digest(fields, old)
            np.add.at(self._settled, row, change)
        self.page_table[group, row, column] = page
        np.maximum.at(self.pages_len, (group, row), column + 1)

    def inputs(self, rows: np.ndarray, query_lens: np.ndarray) -> tuple[np.ndarray, ...]:
        """Query tokens of a step, ragged over its rows.

        Returns (row int32[t], position int32[t], token int32[t]) with t = query_lens.sum(), plan
        row after plan row, positions rising from each row's length.
        """
        starts = self.length[rows]
        if np.count_nonzero(query_lens == 1) == query_lens.size:
            return rows, starts, self.tokens[rows, starts.astype(np.int64)]
        ends = np.cumsum(query_lens)
        within = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - query_lens, query_lens)
        row = np.repeat(rows, query_lens)
        position = np.repeat(starts, query_lens) + within.astype(np.int32)
        return row, position, self.tokens[row, position]

    def advance(
        self, plan: StepPlan, tokens: np.ndarray, accepted: np.ndarray | None = None
    ) -> None:
        """Move the plan's rows past the step: `tokens` and `accepted` as in StepResult."""
        rows, samples = plan.rows.astype(np.int64), plan.samples
        if plan.drafts.size:
            require(
                accepted is not None, f"step {plan.step} has drafts, and nobody says how many held"
            )
            self._advance_drafted(plan, tokens, accepted)
            return
        length = self.length[rows] + plan.query_lens
        self.length[rows] = length
        length = length.astype(np.int64)
        if np.count_nonzero(samples) == samples.size:
            self.tokens[rows, length] = tokens
        else:
            drawn = samples != 0
            self.tokens[rows[drawn], length[drawn]] = tokens[drawn]

    def _advance_drafted(self, plan: StepPlan, tokens: np.ndarray, accepted: np.ndarray) -> None:
        length = self.length[plan.rows] + plan.known_lens
        drawn = plan.samples != 0
        at = drawn_slots(plan.drafts, drawn, accepted)
        counts = (accepted.astype(np.int64) + 1)[drawn]
        row = np.repeat(plan.rows[drawn], counts)
        within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        self.tokens[row, np.repeat(length[drawn], counts) + within] = tokens[at]
        self.length[plan.rows] = length + accepted

    def digest(self, plan: StepPlan) -> int:
        """Digest of the rows the step uses, after `apply` and before `advance`; incremental."""
        require(self._settled.size > 0, "this table keeps no digests")
        rows = plan.rows.astype(np.int64)
        return self._combine(plan, rows, self._settled[rows])

    def digest_full(self, plan: StepPlan) -> int:
        """The same digest, recomputed from the table's contents: what a device must report."""
        rows = plan.rows
        settled = self._record_digest(rows)
        for group in range(self.page_table.shape[0]):
            width = int(self.pages_len[group, rows].max(initial=0))
            columns = np.arange(width)
            fields = _page_fields(np.full(width, group), columns)
            pages = self.page_table[group, rows, :width]
            settled += _page_digest(fields[None, :], pages).sum(axis=1, dtype=np.uint64)
        return self._combine(plan, rows, settled)

    def _combine(self, plan: StepPlan, rows: np.ndarray, settled: np.ndarray) -> int:
        # Drafts are the device's own: the brain learns of them by the tokens that they became.
        query_lens = plan.known_lens
        if rows.size == 0:
            return 0
        # The first query token's position is the row's length, so the length needs no term.
        _, position, token = self.inputs(rows, query_lens)
        offset = position.astype(np.uint64)
        offset *= _C_FIELD
        offset += _TOKENS_OFFSET
        per_token = _mix(offset, token.view(np.uint32))
        if per_token.size != rows.size:
            ends = np.cumsum(query_lens)
            per_token = np.add.reduceat(per_token, ends - query_lens)
        per_token += settled
        per_row = mix(self._order[: rows.size] + rows, per_token)
        return int(np.add.reduce(per_row))

    def _record_digest(self, rows: np.ndarray) -> np.ndarray:
        """uint64[k]: the part of the digest that comes from the admission record and its lists."""
        records = self.records[rows]
        words = records.view(np.uint64).reshape(rows.size, RECORD_WORDS)
        total = mix(_RECORD + np.arange(RECORD_WORDS), words).sum(axis=1, dtype=np.uint64)
        if records["bias_len"].any():
            width = int(records["bias_len"].max())
            columns = np.arange(width)
            value = (_bits(self.bias_ids[rows, :width]) << np.uint64(32)) | _bits(
                self.bias_values[rows, :width].view(np.int32)
            )
            held = columns[None, :] < records["bias_len"][:, None]
            total += np.where(held, mix(_BIAS + columns, value), np.uint64(0)).sum(
                axis=1, dtype=np.uint64
            )
        if records["stop_len"].any():
            width = int(records["stop_len"].max())
            columns = np.arange(width)
            held = columns[None, :] < records["stop_len"][:, None]
            value = mix(_STOPS + columns, _bits(self.stop_ids[rows, :width]))
            total += np.where(held, value, np.uint64(0)).sum(axis=1, dtype=np.uint64)
        return total


def first_column(tokens: int | np.ndarray, window: int, page_tokens: int) -> int | np.ndarray:
    """The first page that position `tokens` and those behind it can see: the position sees itself
    and the window - 1 before it. An int, or int[k] for int[k]."""
    return np.maximum(0, tokens - window + 1) // page_tokens


def drawn_slots(drafts: np.ndarray, drawn: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """int64[t]: which slots of StepResult.tokens hold tokens of the `drawn` rows, in order.

    drafts, accepted: uint8[n]; drawn: bool[n].
    """
    slots = drafts.astype(np.int64) + 1
    first = (np.cumsum(slots) - slots)[drawn]
    counts = accepted[drawn].astype(np.int64) + 1
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within


def _bits(values: np.ndarray) -> np.ndarray:
    """int32 values as uint64 of their 32 bits, so that -1 does not smear into the upper half."""
    return values.view(np.uint32).astype(np.uint64)


def _page_fields(group: np.ndarray, column: np.ndarray) -> np.ndarray:
    return _PAGES + group.astype(np.int64) * _GROUP_STRIDE + column.astype(np.int64)


def _page_digest(fields: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Digest of table entries; a trash entry counts nothing, so unheld columns need no walk."""
    return np.where(pages != 0, mix(fields, pages), np.uint64(0))
