"""A device of integers: its next token is a hash of the history it can see through its own rows
and pages, so a wrong page table, a stale row or a page of somebody else gives a wrong token.

A page's "KV" of one token is one uint64: a hash of (token, position). A token is drawn by reading
the cells of all earlier positions through the page table, folding them with the row's own query
tokens and, unless it is greedy, its seed, and reducing to the vocabulary. `expected_token` computes
the same from a request's true history; the two agree if and only if the device saw what the brain
meant it to see.

Runs wire.rows and wire.checksum as they are. Used by tests, the simulator and `bench core`.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.errors import WorkerFault
from holdfast.wire.checksum import page_sums, weights
from holdfast.wire.plan import StepPlan, StepResult, handle_pages
from holdfast.wire.rows import RowTable, mix


def cells_of(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64[k]: what a page holds for these tokens at these positions."""
    return mix(positions.astype(np.int64) + 1, tokens.astype(np.int64) + 1)


def fold(cells: np.ndarray, vocab_size: int, seed: int = 0) -> int:
    """The token that follows a history of cells uint64[k], in order; greedy with seed 0."""
    order = np.arange(cells.size, dtype=np.int64)
    return (int(mix(order, cells).sum(dtype=np.uint64) >> np.uint64(7)) + seed) % vocab_size


def expected_token(history: np.ndarray, vocab_size: int, seed: int = 0) -> int:
    """The oracle: the token after a true history int32[k]; `seed` unless it is drawn greedily."""
    return fold(cells_of(history, np.arange(history.size)), vocab_size, seed)


def expected_logprob(token: int) -> float:
    """The oracle: the logprob that the device says of a drawn token; exact in float32."""
    return -(token + 1) / 256


def expected_alternatives(token: int, count: int, vocab_size: int) -> list[tuple[int, float]]:
    """The oracle: (id, logprob) of the `count` likeliest tokens beside a drawn one."""
    return [((token + 1 + at) % vocab_size, -(token + 1) / 256 - 1 - at) for at in range(count)]


def memory_of(limits: Limits) -> np.ndarray:
    """uint64[pages, page_tokens]: a pool of empty pages."""
    return np.zeros((limits.pages, limits.page_tokens), np.uint64)


class FakeWorker:
    """Executes plans in the order that wire.plan states. One instance is one epoch's device.

    `pages`: memory that outlives it (memory_of), or None for memory of its own.
    """

    def __init__(self, limits: Limits, epoch: int = 1, pages: np.ndarray | None = None) -> None:
        self.limits = limits
        self.epoch = epoch
        self.step = 0
        self.rows = RowTable(limits)
        # The keeper's memory: it outlives this worker, with whatever a zombie still writes to it.
        self.pages = memory_of(limits) if pages is None else pages
        self._weights = weights(limits.page_tokens * 2)

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
        result = StepResult(
            epoch=plan.epoch,
            step=plan.step,
            digest=digest,
            tokens=tokens,
            faults=np.zeros(plan.rows.size, np.uint8),
            seal_sums=sums,
        )
        wanted = rows.records["top_logprobs"][plan.rows]
        if np.count_nonzero(wanted >= 0):
            self._put_logprobs(result, int(wanted.max()))
        return result

    def _put_logprobs(self, result: StepResult, top_k: int) -> None:
        """What `expected_logprob` and `expected_alternatives` say, for all rows of the step."""
        tokens, others = result.tokens[:, None], np.arange(top_k)
        logprobs = -(tokens + 1) / 256
        result.logprobs = logprobs[:, 0].astype(np.float32)
        result.top_k = top_k
        result.top_ids = ((tokens + 1 + others) % self.limits.vocab_size).astype(np.int32).ravel()
        result.top_logprobs = (logprobs - 1 - others).astype(np.float32).ravel()

    def _forward(self, plan: StepPlan) -> np.ndarray:
        size = self.limits.page_tokens
        row, position, token = self.rows.inputs(plan.rows, plan.query_lens)
        page = self.rows.page_table[0, row, position // size]
        if not page.all():
            raise WorkerFault(f"step {plan.step} writes through the trash page")
        self.pages[page, position % size] = cells_of(token, position)
        tokens = np.zeros(plan.rows.size, np.int32)
        for at in np.flatnonzero(plan.samples).tolist():
            row_id = int(plan.rows[at])
            length = int(self.rows.length[row_id]) + int(plan.query_lens[at])
            table = self.rows.page_table[0, row_id, : -(-length // size)]
            cells = self.pages[table].reshape(-1)[:length]
            record = self.rows.records[row_id]
            seed = int(record["seed"]) if record["temperature"] > 0 else 0
            tokens[at] = fold(cells, self.limits.vocab_size, seed)
        return tokens
