"""Runner: executes one plan after another and says what came of each.

Owns the order of a step, which is wire.plan's: check and apply deltas, digest, zeros, seals,
forward, draw, advance. Invariants: it reads nothing but its row state, its memory and the plan;
a sum in a result is of the page as it was before the step's kernels; the digest is of the rows
that the step really used; a plan that is unfit ends the epoch before a kernel of it runs.
Called by proc.worker, `LLM` and tests, from one thread. It must not know links or processes.

What can fail, and what then: a plan out of order or unfit, a broken kernel -> WorkerFault or
torch's error, the epoch ends (lose the worker); a row with a NaN or infinite logit -> that row
alone, StepResult.faults.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device import warm_up
from holdfast.device.batch import HostRows, Rows, StepBatch
from holdfast.device.memory import DeviceMemory
from holdfast.errors import WorkerFault
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.ops.sampler import Draws, Sampler
from holdfast.wire.plan import ROW_NOT_FINITE, StepPlan, StepResult, handle_pages


class DecoderLike(Protocol):
    """What a runner needs of model.decoder.Decoder."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        pool: torch.Tensor,
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True)
class RunnerStats:
    """Sums since the runner was made; never reset.

    compiles: kernels compiled by steps after `mark_ready`, 0 in a sound engine; compiled_last: the
    last of them.
    """

    steps: int = 0
    query_tokens: int = 0
    tokens_drawn: int = 0
    pages_sealed: int = 0
    rows_not_finite: int = 0
    device_ns: int = 0
    compiles: int = 0
    compiled_last: str = ""


class Runner:
    """Synchronous: a step is over when `run` returns. The device is the memory's."""

    def __init__(
        self,
        limits: Limits,
        decoder: DecoderLike,
        memory: DeviceMemory,
        *,
        epoch: int = 1,
        threads: int | None = None,
    ) -> None:
        """threads: of torch's operations in this process; None leaves them as they are."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.limits = limits
        self.decoder = decoder
        self.memory = memory
        self.stats = RunnerStats()
        self.epoch = epoch
        self.step = 0
        self.rows: Rows = HostRows(limits, memory.pool.device)
        self._sampler = Sampler(limits.vocab_size, memory.pool.device)
        self._compiles = CompileCount()
        self._compiles_ready: int | None = None

    def mark_ready(self) -> None:
        """What is compiled from here on is a step that stalls, and is counted."""
        self._compiles_ready = self._compiles.count

    def reset(self, epoch: int) -> None:
        """Begin a new epoch: rows are free, steps number from 1; pages are left as they are."""
        if epoch <= self.epoch:
            raise WorkerFault(f"epoch {epoch} after {self.epoch}")
        self.epoch = epoch
        self.step = 0
        self.rows = HostRows(self.limits, self.memory.pool.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Execute one plan. Raises WorkerFault when it is out of order or unfit."""
        started_ns = time.perf_counter_ns()
        self.rows.apply(plan, self.epoch, self.step)
        self.step = plan.step
        result = StepResult(
            epoch=plan.epoch,
            step=plan.step,
            digest=self.rows.digest(plan),
            tokens=np.zeros(plan.rows.size, np.int32),
            faults=np.zeros(plan.rows.size, np.uint8),
        )
        self.memory.zero_pages(handle_pages(plan.zeros))
        result.seal_sums = self.memory.seal_sums(handle_pages(plan.seals))
        if plan.rows.size:
            self._forward(plan, result)
            self.rows.advance(plan, result.tokens)
        result.device_ns = time.perf_counter_ns() - started_ns
        self._count(plan, result)
        return result

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kind of kernel once, on the trash page and on no row.

        Page 0 is zero again afterwards, as fresh memory is.
        """
        for query_lens in self._warm_up_shapes():
            tokens = int(query_lens.sum())
            columns = self.limits.pages_for_tokens(int(query_lens.max()))
            attention = AttentionBatch.build(
                query_lens=query_lens,
                starts=np.zeros(query_lens.size, np.int32),
                page_table=np.zeros((query_lens.size, columns), np.int32),
                page_tokens=self.limits.page_tokens,
                device=self.memory.pool.device,
            )
            ids = torch.zeros(tokens, dtype=torch.int64, device=self.memory.pool.device)
            positions = torch.arange(tokens, device=self.memory.pool.device)
            hidden = self.decoder.forward(ids, positions, attention, self.memory.pool)
            self.decoder.logits(hidden[-query_lens.size :])
        if self.memory.pool.device.type != "cpu":
            self._warm_up_sampler()
        self.memory.warm_up_sums()
        self.memory.zero_pages(np.zeros(1, np.int64))

    def _warm_up_sampler(self) -> None:
        shape = (warm_up.ROWS, self.limits.vocab_size)
        logits = torch.zeros(shape, dtype=torch.float32, device=self.memory.pool.device)
        draws = self._sampler.sample(logits, warm_up.sampler_inputs(), warm_up.TOP_COUNT)
        draws.tokens.cpu()
        logits.isfinite().all(dim=-1).cpu()

    def _warm_up_shapes(self) -> list[np.ndarray]:
        """int32[n] query lengths each. A GPU loads a kernel when it first sees its shape, which a
        resumed stream would wait for: there also a full prompt chunk and full batches."""
        limits = self.limits
        shapes = {(1,), (min(limits.page_tokens, limits.context_tokens),)}
        if self.memory.pool.device.type != "cpu":
            shapes.add((min(limits.prefill_tokens, limits.context_tokens),))
            rows = [2**power for power in range(1, limits.rows_max.bit_length())]
            shapes.update((1,) * count for count in rows)
        return [np.array(shape, np.int32) for shape in sorted(shapes)]

    def _forward(self, plan: StepPlan, result: StepResult) -> None:
        """Compute the plan's rows, and draw for those that sample."""
        batch = self.rows.stage(plan)
        hidden = self.decoder.forward(
            batch.tokens, batch.positions, batch.attention, self.memory.pool
        )
        draws = None
        if batch.drawing.size:
            logits = self.decoder.logits(hidden[batch.last_tokens])
            draws = self._sampler.sample(logits, batch.sampling, batch.top_count)
            tokens = draws.tokens.cpu().numpy()
            faulty = ~draws.finite.cpu().numpy()
            result.tokens[batch.drawing] = tokens
            result.faults[batch.drawing[faulty]] = ROW_NOT_FINITE
        if batch.waiting.size:
            # A chunk's row fails now: its pages must not be sealed and shared before it draws.
            finite = hidden[batch.last_waiting].isfinite().all(dim=-1).cpu().numpy()
            result.faults[batch.waiting[~finite]] = ROW_NOT_FINITE
        if batch.logprobs_asked:
            _put_logprobs(batch, draws, result)

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        stats = self.stats
        stats.steps += 1
        stats.query_tokens += int(plan.query_lens.sum())
        stats.tokens_drawn += int(plan.samples.sum())
        stats.pages_sealed += plan.seals.size
        stats.rows_not_finite += int(np.count_nonzero(result.faults))
        stats.device_ns += result.device_ns
        if self._compiles_ready is not None:
            stats.compiles = self._compiles.count - self._compiles_ready
            stats.compiled_last = self._compiles.last if stats.compiles else ""


def _put_logprobs(batch: StepBatch, draws: Draws | None, result: StepResult) -> None:
    """Spread the asking rows' logprobs over the plan's rows; zeros for the others."""
    n, k = result.tokens.size, batch.top_count
    result.top_k = k
    result.logprobs = np.zeros(n, np.float32)
    top_ids = np.zeros((n, k), np.int32)
    top_logprobs = np.zeros((n, k), np.float32)
    if draws is not None and draws.asked.size:
        rows = batch.drawing[draws.asked]
        result.logprobs[rows] = draws.logprobs.cpu().numpy()
        top_ids[rows] = draws.top_ids.cpu().numpy()
        top_logprobs[rows] = draws.top_logprobs.cpu().numpy()
    result.top_ids, result.top_logprobs = top_ids.reshape(-1), top_logprobs.reshape(-1)
