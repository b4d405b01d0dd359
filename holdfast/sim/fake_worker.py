"""A device of integers: its next token is a hash of the history it can see through its own rows
and pages, so a wrong page table, a stale row or a page of somebody else gives a wrong token.

A page's "KV" of one token is one uint64: a hash of (token, position). A token is drawn by reading
the cells of all earlier positions through the page table, folding them with the row's own query
tokens, and reducing to the vocabulary. `expected_token` computes the same from a request's true
history; the two agree if and only if the device saw what the brain meant it to see.

Runs wire.rows and wire.checksum as they are. Used by tests, the simulator and `bench core`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from holdfast.config import Limits
from holdfast.errors import WorkerFault
from holdfast.sim.fake_graphs import Capture, FakeGraphs, FirstSeen, StagedRows
from holdfast.wire.checksum import page_sums, weights
from holdfast.wire.plan import StepPlan, StepResult, handle_pages
from holdfast.wire.rows import RowTable, mix


def cells_of(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64[k]: what a page holds for these tokens at these positions."""
    return mix(positions.astype(np.int64) + 1, tokens.astype(np.int64) + 1)


def fold(cells: np.ndarray, vocab_size: int) -> int:
    """The token that follows a history of cells uint64[k], in order."""
    order = np.arange(cells.size, dtype=np.int64)
    return int(mix(order, cells).sum(dtype=np.uint64) >> np.uint64(7)) % vocab_size


def expected_token(history: np.ndarray, vocab_size: int) -> int:
    """The oracle: the token after a true history int32[k]."""
    return fold(cells_of(history, np.arange(history.size)), vocab_size)


def memory_of(limits: Limits) -> np.ndarray:
    """uint64[pages, page_tokens]: a pool of empty pages."""
    return np.zeros((limits.pages, limits.page_tokens), np.uint64)


class FakeWorker:
    """Executes plans in the order that wire.plan states. One instance is one epoch's device.

    `pages`: memory that outlives it (memory_of), or None for memory of its own. `inherited`: graphs
    of the worker before (sim.fake_graphs).
    """

    def __init__(
        self,
        limits: Limits,
        epoch: int = 1,
        pages: np.ndarray | None = None,
        inherited: Iterable[Capture] = (),
    ) -> None:
        self.limits = limits
        self.epoch = epoch
        self.step = 0
        self.rows = RowTable(limits)
        # The keeper's memory: it outlives this worker, with whatever a zombie still writes to it.
        self.pages = memory_of(limits) if pages is None else pages
        self._weights = weights(limits.page_tokens * 2)
        # Captured for a little less than the longest context, so that its end is a boundary too.
        captured = limits.page_tokens * max(1, limits.table_columns - 1)
        self.graphs = FakeGraphs(
            limits, pool_epoch=epoch, inherited=inherited, context_tokens=captured
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Raises WorkerFault on a plan that is out of order or reaches outside the rows' pages."""
        if (plan.epoch, plan.step) != (self.epoch, self.step + 1):
            raise WorkerFault(f"plan {plan.epoch}:{plan.step} after {self.epoch}:{self.step}")
        self.step = plan.step
        rows = self.rows
        rows.apply(plan)
        digest = rows.digest_full(plan)
        self.pages[handle_pages(plan.zeros)] = 0
        sealed = self.pages[handle_pages(plan.seals)].view(np.uint32)
        sums = page_sums(sealed, self._weights)
        tokens = self._forward(plan)
        rows.advance(plan, tokens)
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            digest=digest,
            tokens=tokens,
            faults=np.zeros(plan.rows.size, np.uint8),
            seal_sums=sums,
        )

    def _forward(self, plan: StepPlan) -> np.ndarray:
        """Tokens int32[n], by a graph where one is admitted."""
        moves_bytes = plan.zeros.size > 0
        (tokens,) = self.graphs.run(plan, self.rows, self._compute, moves_bytes=moves_bytes)
        return tokens

    def _compute(
        self, plan: StepPlan, rows: RowTable | StagedRows, first_seen: FirstSeen
    ) -> tuple[np.ndarray]:
        """Tokens int32[n]. Like a real device it reads and writes the trash page without a word."""
        size = self.limits.page_tokens
        row, position, token = rows.inputs(plan.rows, plan.query_lens)
        page = rows.page_table[0, row, position // size]
        self.pages[page, position % size] = cells_of(token, position)
        tokens = np.zeros(plan.rows.size, np.int32)
        for at in np.flatnonzero(plan.samples).tolist():
            row_id = int(plan.rows[at])
            length = int(rows.length[row_id]) + int(plan.query_lens[at])
            table = rows.page_table[0, row_id, : -(-length // size)]
            cells = self.pages[table].reshape(-1)[first_seen(0, length) : length]
            tokens[at] = fold(cells, self.limits.vocab_size)
        return (tokens,)
