"""A plan on its way: its parts while it is put together, and what its result is matched with.

Written by core.scheduler, read by core.commit and core.brain. Knows no queue and no ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from holdfast.core.request import Request
from holdfast.core.running import Chain
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan, handle_pages


@dataclass(slots=True)
class SealBatch:
    """Full pages whose checksums the device is asked for; each holds a lease of its own.

    handles: uint64[k], columns: int[k] of their rows; tokens: the pages' ids, one page after the
    other (group 0 only); chains: k rows' chains. heads: where in them the pages of each row begin
    (group 0 only).
    """

    group: int
    handles: np.ndarray
    columns: np.ndarray
    tokens: bytes
    chains: list[Chain | None]
    heads: list[int] = field(default_factory=list)

    def begins(self, parent: int, column: int, tokens: bytes) -> bool:
        """Whether a page of `tokens` in `column` behind the page or root `parent` is among these,
        and next of its row to be booked."""
        for at in self.heads:
            chain, size = self.chains[at], len(tokens)
            assert chain is not None
            next_one = chain.parent == parent and chain.pages == column == self.columns[at]
            if next_one and self.tokens[at * size : at * size + size] == tokens:
                return True
        return False


@dataclass(slots=True)
class Flight:
    """A launched plan and what its result will be matched with.

    rows: int64[n], plan.rows as numpy wants indexes: int32 are converted at each access, at six
    times its price. life: int64[n], ids: uint64[n], of these rows. zeros: how many of plan.zeros
    hold a lease until then. reach: int32[n], tokens of each row that have their KV once the plan is
    over, all of its drafts counted. prompts: query tokens of rows that do not decode. checks:
    uint64[k] handles at the end of plan.seals whose sums are known already; verifies: that it is
    the first look at them after a worker's end.
    """

    plan: StepPlan
    rows: np.ndarray
    life: np.ndarray
    ids: np.ndarray
    seals: list[SealBatch]
    zeros: int
    launched_s: float
    reach: np.ndarray
    prompts: int
    checks: np.ndarray
    verifies: bool

    @property
    def sealed(self) -> np.ndarray:
        """uint64[k] handles of the pages that the plan seals."""
        seals = self.plan.seals
        return seals[: seals.size - self.checks.size] if self.checks.size else seals


@dataclass(slots=True)
class PlanParts:
    """A plan while it is put together.

    rows: int64, query_lens: int32 arrays, one after the other; drafts: uint8 of the first of them,
    the decode rows, or None. prompts: query tokens of all others. fresh: page sets
    uint64[groups, k] that the plan is the first to write.
    """

    rows: list[np.ndarray] = field(default_factory=list)
    query_lens: list[np.ndarray] = field(default_factory=list)
    drafts: np.ndarray | None = None
    prompts: int = 0
    writes: list[np.ndarray] = field(default_factory=list)
    fresh: list[np.ndarray] = field(default_factory=list)
    admits: list[tuple] = field(default_factory=list)
    admit_tokens: int = 0
    _tokens: list[np.ndarray] = field(default_factory=list)
    _bias: list[tuple[int, float]] = field(default_factory=list)
    _stop_ids: list[int] = field(default_factory=list)

    def compute(self, rows: np.ndarray, query_lens: np.ndarray) -> None:
        """These rows are in the step, with so many query tokens each."""
        if rows.size:
            self.rows.append(rows)
            self.query_lens.append(query_lens)

    def own(self, row: int | np.ndarray, column: np.ndarray, handles: np.ndarray) -> None:
        """Newly reserved page sets uint64[groups, k] for `column` int[k] of one row, or of k."""
        for group, mine in enumerate(handles):
            self.write(group, row, column, mine)
        self.fresh.append(handles)

    def write(
        self, group: int, row: int | np.ndarray, column: np.ndarray, handles: np.ndarray
    ) -> None:
        """The device's page table gets these pages, uint64[k] handles, at `column` int[k]."""
        writes = np.zeros(handles.size, PAGE_WRITE)
        writes["group"] = group
        writes["row"] = row
        writes["column"] = column
        writes["page"] = handle_pages(handles)
        self.writes.append(writes)

    def admit(self, life: int, request: Request, hits: list[np.ndarray], page_tokens: int) -> None:
        """`request` gets its row, whose first pages are `hits` (Ledger.find)."""
        admission, sampling, row = request.admission, request.admission.sampling, request.row
        pages = hits[0].size
        self.admits.append(
            (
                life,
                admission.seed,
                row,
                pages * page_tokens,
                request.tokens.size,
                request.prompt_len,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.top_k,
                request.prompt_len + sampling.min_tokens,
                sampling.top_logprobs,
                len(sampling.bias),
                len(sampling.stop_ids),
                0,
            )
        )
        self._tokens.append(request.tokens)
        self.admit_tokens += request.tokens.size
        self._bias.extend(sampling.bias)
        self._stop_ids.extend(sampling.stop_ids)
        for group, handles in enumerate(hits):
            if handles.size:
                self.write(group, row, np.arange(pages - handles.size, pages), handles)

    def put_into(self, plan: StepPlan) -> None:
        """Everything but the rows."""
        if self.writes:
            plan.page_writes = concat(self.writes, PAGE_WRITE)
        if self.admits:
            plan.admits = np.array(self.admits, ADMIT)
            plan.admit_tokens = concat(self._tokens, np.int32)
            plan.bias_ids = np.array([entry[0] for entry in self._bias], np.int32)
            plan.bias_values = np.array([entry[1] for entry in self._bias], np.float32)
            plan.stop_ids = np.array(self._stop_ids, np.int32)


def concat(parts: list[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    """The parts one after the other, as `dtype`; a single one is not copied."""
    if len(parts) == 1:
        return parts[0].astype(dtype, copy=False)
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def spread(rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the columns first .. last of each row, one row after the other."""
    counts = last - first
    if np.count_nonzero(counts == 1) == counts.size:
        return rows, first
    row = np.repeat(rows, counts)
    within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, np.repeat(first, counts) + within
