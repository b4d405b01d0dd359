"""What makes a plan unfit to run: every reason, checked before anything is touched by it.

Pure functions of (plan, limits, row table), numpy only. Invariants: a plan that passes cannot make
a later stage index outside the row table, the vocabulary or the pool, cannot write a page that it
seals or that two rows share, and cannot read KV that was zeroed. Raises WorkerFault with the
values; the caller ends the epoch, nothing is repaired here. Called by whoever keeps row state
(device.batch, device.device_rows).

    check_deltas    before they are applied: numbering, places in the table, ids, ragged lengths
    check_rows      after they are applied: lengths against known tokens and held pages
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.errors import WorkerFault
from holdfast.wire.plan import PAGE_WRITE, StepPlan, handle_groups, handle_pages
from holdfast.wire.rows import RowTable, first_column

_WRITE_FIELDS = PAGE_WRITE.names


def check_deltas(plan: StepPlan, table: RowTable, epoch: int, last_step: int) -> None:
    """Refuse a plan out of order, or whose deltas reach outside the table."""
    if (plan.epoch, plan.step) != (epoch, last_step + 1):
        raise WorkerFault(
            f"plan {plan.epoch}:{plan.step} (epoch:step) after {epoch}:{last_step}; "
            f"expected {epoch}:{last_step + 1}"
        )
    if plan.copies.size:
        raise WorkerFault(f"step {plan.step} copies pages, and this device has no other tier")
    limits = table.limits
    rows = limits.rows_total
    _within(plan, "clears", plan.clears, 1, rows)
    for name, handles in (("seals", plan.seals), ("zeros", plan.zeros)):
        if handles.size:
            _within(plan, f"the group of {name}", handle_groups(handles), 0, limits.groups)
            _within(plan, f"the page of {name}", handle_pages(handles), 1, limits.pages)
    if plan.page_writes.size:
        _check_page_writes(plan, limits)
    if plan.admits.size:
        _check_admits(plan, table)


class HeldColumns:
    """Of each row, how many of its table's first columns are known to hold a page, so that a step
    looks at new ones only: 128 rows of 4,096 tokens have 32,768 columns, and a step adds eight.

    One table's companion: `apply` follows each plan that is applied to it, but for those that
    device.steady follows, which change no column that a row has come to. In a layer group with a
    window columns are given back, and nothing is remembered.
    """

    def __init__(self, limits: Limits) -> None:
        self._known = np.zeros((limits.groups, limits.rows_total), np.int32)

    def apply(self, plan: StepPlan) -> None:
        """The plan's deltas were applied to the table."""
        if plan.clears.size:
            self._known[:, plan.clears] = 0
        pages = plan.page_writes["page"]
        if np.count_nonzero(pages) != pages.size:
            given = plan.page_writes[pages == 0]
            np.minimum.at(self._known, (given["group"], given["row"]), given["column"])

    def missing(
        self, table: RowTable, group: int, rows: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        """bool[n]: whether some of the first `columns` int[n] of the rows int[n] hold no page."""
        known = self._known[group, rows]
        missing = columns > known
        if np.count_nonzero(missing):
            at = np.flatnonzero(missing)
            new = _pages_between(table, group, rows[at], known[at], columns[at])
            held = at[(new != 0).all(axis=1)]
            self._known[group, rows[held]] = columns[held]
            missing[held] = False
        return missing


def check_rows(plan: StepPlan, table: RowTable, held: HeldColumns) -> None:
    """Refuse rows that cannot be computed; `table` is the state after the plan's deltas, and `held`
    its companion."""
    rows, query_lens = plan.rows, plan.query_lens
    if not rows.size == query_lens.size == plan.samples.size:
        raise _refusal(
            plan, f"{rows.size} rows, {query_lens.size} lengths, {plan.samples.size} samples"
        )
    if plan.drafts.size:
        raise _refusal(plan, "has draft tokens; this device proposes none")
    if rows.size == 0:
        return
    limits = table.limits
    _within(plan, "rows", rows, 1, limits.rows_total)
    _distinct(plan, "rows", rows)
    _within(plan, "query lengths", query_lens, 1, limits.context_tokens + 1)
    # numpy converts indexes of another type at each access, at six times its price.
    rows = rows.astype(np.int64)
    # A column at a time: whole records of 256 rows are 24 KiB to copy.
    owner, tokens_len = table.records["owner"][rows], table.records["tokens_len"][rows]
    starts = table.length[rows]
    ends = starts + query_lens
    if np.count_nonzero(owner) != rows.size:
        _no_row(plan, owner == 0, "is free")
    _no_row(plan, ends > limits.context_tokens, "grows past the context")
    # The token at a row's length is known, or drawn by the step before; of those behind it, the
    # prompt's.
    wide = query_lens > 1
    if np.count_nonzero(wide):
        _no_row(plan, wide & (ends > tokens_len), "computes tokens that nobody knows yet")
    early = ends < tokens_len
    if np.count_nonzero(early):
        _no_row(plan, early & (plan.samples != 0), "samples before the end of its known tokens")
    _check_pages(plan, table, held, rows, starts, ends)


def _check_page_writes(plan: StepPlan, limits: Limits) -> None:
    # The four numbers of a write at once, as they lie; one after another only to name the wrong.
    four = plan.page_writes.view(np.int32).reshape(-1, len(_WRITE_FIELDS))
    bounds = (
        (0, limits.groups),
        (1, limits.rows_total),
        (0, limits.table_columns),
        (0, limits.pages),
    )
    least, most = np.minimum.reduce(four).tolist(), np.maximum.reduce(four).tolist()
    for name, a, b, (low, high) in zip(_WRITE_FIELDS, least, most, bounds, strict=True):
        if a < low or b >= high:
            _within(plan, f"the {name} of page writes", plan.page_writes[name], low, high)


def _check_admits(plan: StepPlan, table: RowTable) -> None:
    limits, admits = table.limits, plan.admits
    _within(plan, "admitted rows", admits["row"], 1, limits.rows_total)
    _distinct(plan, "admitted rows", admits["row"])
    held = table.records["owner"][admits["row"]] != 0
    held &= ~np.isin(admits["row"], plan.clears)
    if held.any():
        raise _refusal(plan, f"admits row {admits['row'][held][0]}, which is held")
    if (admits["owner"] == 0).any():
        raise _refusal(plan, "admits a row for owner 0, which means free")
    for name, longest in (
        ("tokens_len", limits.context_tokens),
        ("bias_len", limits.bias_entries),
        ("stop_len", limits.stop_ids),
    ):
        least = 1 if name == "tokens_len" else 0
        _within(plan, f"{name} of admitted rows", admits[name], least, longest + 1)
    _within(plan, "length of admitted rows", admits["length"], 0, admits["tokens_len"])
    _within(plan, "prompt_len of admitted rows", admits["prompt_len"], 0, admits["tokens_len"] + 1)
    top = limits.top_logprobs + 1
    _within(plan, "top_logprobs of admitted rows", admits["top_logprobs"], -1, top)
    for name, ids, total in (
        ("tokens", plan.admit_tokens, admits["tokens_len"].sum()),
        ("bias ids", plan.bias_ids, admits["bias_len"].sum()),
        ("stop ids", plan.stop_ids, admits["stop_len"].sum()),
    ):
        if ids.size != total:
            raise _refusal(plan, f"brings {ids.size} {name}, its admits name {total}")
        _within(plan, name, ids, 0, limits.vocab_size)
    if plan.bias_values.size != plan.bias_ids.size:
        raise _refusal(plan, f"{plan.bias_values.size} bias values, {plan.bias_ids.size} ids")
    for name, fit in (
        ("temperature", np.isfinite(admits["temperature"]) & (admits["temperature"] >= 0)),
        ("top_p", admits["top_p"] > 0),
        ("min_p", (admits["min_p"] >= 0) & (admits["min_p"] <= 1)),
        ("top_k", admits["top_k"] >= 0),
        ("repetition_penalty", admits["repetition_penalty"] > 0),
        ("presence_penalty", np.isfinite(admits["presence_penalty"])),
        ("frequency_penalty", np.isfinite(admits["frequency_penalty"])),
    ):
        if not fit.all():
            raise _refusal(plan, f"admits {name} {admits[name][~fit][0]}")


def _check_pages(
    plan: StepPlan,
    table: RowTable,
    held: HeldColumns,
    rows: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> None:
    """Every page that the step reads or writes is held, and what it writes is its row's own."""
    size = table.limits.page_tokens
    first, behind = starts // size, (ends - 1) // size + 1
    for group, window in enumerate(table.limits.windows):
        if window:
            low = first_column(starts, window, size)
            missing = (_pages_between(table, group, rows, low, behind) == 0).any(axis=1)
        else:
            low = np.zeros_like(first)
            missing = held.missing(table, group, rows, behind)
        _no_row(plan, missing, "needs a page that it does not hold")
        targets = _pages_between(table, group, rows, first, behind)
        if targets.size > 1:
            targets = np.sort(targets[targets > 0])
            same = targets[1:] == targets[:-1]
            if np.count_nonzero(same):
                raise _refusal(plan, f"writes page {targets[1:][same][0]} for two rows")
        for name, handles in (("seals", plan.seals), ("zeros", plan.zeros)):
            if not handles.size:
                continue
            mine = handle_pages(handles[handle_groups(handles) == group])
            touched = targets
            if name == "zeros":
                touched = _pages_between(table, group, rows, low, (starts + size - 1) // size)
            clash = mine[np.isin(mine, touched)]
            if clash.size:
                verb = "writes" if name == "seals" else "reads"
                raise _refusal(plan, f"{name} page {clash[0]} and {verb} it")


def _pages_between(
    table: RowTable, group: int, rows: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """int32[n, w]: table entries of columns low .. high - 1 of each row, then -1."""
    wide = high - low
    if np.count_nonzero(wide == 1) == wide.size:
        return table.page_table[group, rows, low][:, None]  # As in nearly every step.
    within = np.arange(max(0, int(wide.max())))
    columns = low[:, None] + within
    inside = columns < high[:, None]
    pages = table.page_table[group, rows[:, None], np.where(inside, columns, 0)]
    return np.where(inside, pages, np.int32(-1))


def _within(
    plan: StepPlan, name: str, values: np.ndarray, low: int, high: int | np.ndarray
) -> None:
    """Refuse unless low <= values < high."""
    if values.size == 0:
        return
    if (
        isinstance(high, int)
        and np.minimum.reduce(values) >= low
        and np.maximum.reduce(values) < high
    ):
        return
    outside = (values < low) | (values >= high)
    if outside.any():
        bound = high if isinstance(high, int) else np.asarray(high)[outside][0]
        raise _refusal(plan, f"{name}: {values[outside][0]} is not in {low} .. {bound - 1}")


def _distinct(plan: StepPlan, name: str, values: np.ndarray) -> None:
    # All of them are places in the table by now; sorting takes five times as long.
    if values.size > 1 and np.maximum.reduce(np.bincount(values)) > 1:
        raise _refusal(plan, f"{name} are not distinct")


def _no_row(plan: StepPlan, bad: np.ndarray, what: str) -> None:
    if np.count_nonzero(bad):
        at = int(np.flatnonzero(bad)[0])
        raise _refusal(plan, f"row {plan.rows[at]} (query length {plan.query_lens[at]}) {what}")


def _refusal(plan: StepPlan, what: str) -> WorkerFault:
    return WorkerFault(f"plan {plan.epoch}:{plan.step} refused: {what}")
