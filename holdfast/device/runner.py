"""Runner: launches one plan after another and says what came of each.

Owns the order of a step, which is wire.plan's: check and apply deltas, digest, zeros, seals,
forward, draw, advance. Invariants: it reads nothing but its row state, its memory and the plan;
a sum in a result is of the page as it was before the step's kernels; the digest is of the rows
that the step really used; a plan that is unfit ends the epoch before a kernel of it runs; results
come in the order of their plans. Called by proc.worker, `LLM` and tests, from one thread. It must
not know links or processes.

On a GPU with graphs a plan may be launched before the result of the last one was collected, and a
step waits for the device once: for the event of its result's copy, prompts and mixed steps too.
Only a step whose draw needs the general sampler waits in `launch` as well (ops.sampler), and one
with penalties for the tokens before it.

What can fail, and what then: a plan out of order or unfit, a broken kernel -> WorkerFault or
torch's error, the epoch ends (lose the worker); a row with a NaN or infinite logit -> that row
alone, StepResult.faults; a step that no graph is admitted for -> computed eagerly, and counted.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device import warm_up
from holdfast.device.batch import Drawing, Fetch, HostRows, Rows, penalised
from holdfast.device.graphs import FAST, GENERAL, BatchStep, BucketStep, StepGraphs
from holdfast.device.memory import DeviceMemory
from holdfast.errors import WorkerFault, require
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.checksum import PendingSums
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.ops.pinned import Uploads
from holdfast.ops.sampler import Draws, Sampler, plain_rows
from holdfast.wire.plan import ROW_NOT_FINITE, StepPlan, StepResult, handle_pages

# Plans launched and not collected, where tokens feed back on the device: one step ahead
# (config.Limits.steps_ahead).
IN_FLIGHT_MAX = 2


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
    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class PlainDraws(Protocol):
    """ops.kernels.sample.KeyedDraws: draws for rows that ask for no more than a temperature
    (ops.sampler `plain_rows`), which never wait for the device."""

    def sample(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(slots=True)
class RunnerStats:
    """Sums since the runner was made; never reset.

    compiles: kernels compiled by steps after `mark_ready`, 0 in a sound engine; compiled_last: the
    last of them. graph_steps: decode steps replayed, by the sampler behind them (device.graphs);
    mixed_steps: the same of steps with prompts, from device.mixed's graphs;
    eager_steps: decided to run eagerly, by the reason (wire.envelope.Refusal). All of them stay
    empty without graphs.
    """

    steps: int = 0
    query_tokens: int = 0
    tokens_drawn: int = 0
    pages_sealed: int = 0
    rows_not_finite: int = 0
    device_ns: int = 0
    compiles: int = 0
    compiled_last: str = ""
    graph_steps: dict[str, int] = field(default_factory=dict)
    mixed_steps: dict[str, int] = field(default_factory=dict)
    eager_steps: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Flight:
    """A launched plan. `logprobs` is for who asked; `result` is there once it was fetched."""

    plan: StepPlan
    launched_ns: int
    sums: PendingSums
    fetch: Fetch
    logprobs: _Logprobs | None = None
    result: StepResult | None = None


class Runner:
    """`run` is `launch` and `collect`: then a step is over when it returns. The device is the
    memory's."""

    def __init__(
        self,
        limits: Limits,
        decoder: DecoderLike,
        memory: DeviceMemory,
        *,
        epoch: int = 1,
        threads: int | None = None,
        rows: Rows | None = None,
        graphs: StepGraphs | None = None,
        plain: PlainDraws | None = None,
        rehearsal: DecoderLike | None = None,
    ) -> None:
        """threads: of torch's operations in this process; None leaves them as they are. rows:
        HostRows where none is given. graphs: over the same rows and memory, captured by
        `warm_up`. plain: draws in eager steps none of whose rows needs the general sampler.
        rehearsal: computes `warm_up` in the decoder's place, with its scratch and its kernels in
        less time; None: the decoder itself."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.limits = limits
        self.decoder = decoder
        self._rehearsal = decoder if rehearsal is None else rehearsal
        self.memory = memory
        self.stats = RunnerStats()
        self.epoch = epoch
        self.step = 0
        self.rows: Rows = HostRows(limits, memory.pool.device) if rows is None else rows
        self._graphs = graphs
        if graphs is not None:
            self.stats.graph_steps, self.stats.eager_steps = graphs.replayed, graphs.eager
        self._flights: deque[_Flight] = deque()
        self._fetched_ns = 0
        self._sampler = Sampler(limits.vocab_size, memory.pool.device)
        self._plain = plain
        # Once a step: seeds, positions and temperatures, or two lists of rows.
        self._uploads = Uploads(memory.pool.device, 6 * limits.rows_max)
        self._compiles = CompileCount()
        self._compiles_ready: int | None = None

    def mark_ready(self) -> None:
        """What is compiled from here on is a step that stalls, and is counted."""
        self._compiles_ready = self._compiles.count

    def reset(self, epoch: int) -> None:
        """Begin a new epoch: rows are free, steps number from 1; pages are left as they are."""
        if epoch <= self.epoch:
            raise WorkerFault(f"epoch {epoch} after {self.epoch}")
        require(not self._flights, f"{len(self._flights)} results are not collected")
        self.epoch = epoch
        self.step = 0
        self.rows.reset()

    @property
    def in_flight_max(self) -> int:
        """Plans that it makes sense to have launched and not collected. With rows on the host a
        plan's result is there when `launch` returns."""
        return IN_FLIGHT_MAX if self.rows.feeds_back else 1

    @property
    def in_flight(self) -> int:
        """Plans launched and not collected."""
        return len(self._flights)

    @property
    def ready(self) -> bool:
        """Whether `collect` would not wait. Something is in flight."""
        first = self._flights[0]
        return first.result is not None or first.fetch.ready

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one plan. Raises WorkerFault when it is out of order or unfit."""
        self.launch(plan)
        return self.collect()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Begin one plan. Raises WorkerFault when it is out of order or unfit."""
        require(self.in_flight < IN_FLIGHT_MAX, f"{len(self._flights)} plans are in flight")
        launched_ns = time.perf_counter_ns()
        self.rows.apply(plan, self.epoch, self.step)
        self.step = plan.step
        self.rows.begin_digest(plan)
        if plan.zeros.size:
            self.memory.zero_pages(handle_pages(plan.zeros))
        sums = self.memory.begin_seal_sums(handle_pages(plan.seals))
        placed, logprobs = True, None
        if plan.rows.size:
            placed, logprobs = self._forward(plan)
        fetch = self.rows.fetch(plan, placed=placed)
        self._flights.append(_Flight(plan, launched_ns, sums, fetch, logprobs))

    def collect(self) -> StepResult:
        """The result of the oldest plan that was launched; waits for it."""
        flight = self._flights.popleft()
        return self._fetched(flight)

    def _fetched(self, flight: _Flight) -> StepResult:
        if flight.result is not None:
            return flight.result
        plan = flight.plan
        digest, tokens, finite = flight.fetch.take()
        result = StepResult(
            epoch=plan.epoch,
            step=plan.step,
            digest=digest,
            tokens=tokens,
            faults=np.where(finite, 0, ROW_NOT_FINITE).astype(np.uint8),
            seal_sums=flight.sums.take(),
        )
        if flight.logprobs is not None:
            flight.logprobs.put(result)
        now_ns = time.perf_counter_ns()
        # Of two plans in flight the second had the device when the first was over.
        result.device_ns = now_ns - max(flight.launched_ns, self._fetched_ns)
        self._fetched_ns = now_ns
        self._count(plan, result)
        flight.result = result
        return result

    @torch.inference_mode()
    def warm_up(
        self,
        captured: Callable[[int, int], None] | None = None,
        rest: Callable[[], None] | None = None,
    ) -> None:
        """Run every kind of kernel once, on the trash page and on no row, and capture graphs.

        Page 0 is zero again afterwards, as fresh memory is. captured(done, total) counts graphs.
        rest: called between two pieces of the work, when the device is done with the first.
        """
        if rest is None:
            self._warm_up(captured, lambda: None)
        else:
            self._warm_up(captured, functools.partial(self._idle_then, rest))

    def _idle_then(self, rest: Callable[[], None]) -> None:
        if self.memory.pool.device.type != "cpu":
            torch.cuda.synchronize(self.memory.pool.device)
        rest()

    def _warm_up(
        self, captured: Callable[[int, int], None] | None, rest: Callable[[], None]
    ) -> None:
        self.rows.warm_up()
        rest()
        on_gpu = self.memory.pool.device.type != "cpu"
        for query_lens in warm_up.step_shapes(self.limits, on_gpu=on_gpu):
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
            hidden = self._rehearsal.forward(ids, positions, attention, self.memory.pool)
            ends = torch.from_numpy(np.cumsum(query_lens, dtype=np.int64) - 1)
            last = hidden[ends.to(self.memory.pool.device)]
            self._rehearsal.logits(last)
            last.isfinite().all(dim=-1)
            rest()
        if on_gpu:
            self._warm_up_sampler()
            rest()
        self.memory.warm_up_sums()
        rest()
        if self._graphs is not None:
            self._graphs.capture(captured, rest)
        self.memory.zero_pages(np.zeros(1, np.int64))

    def _warm_up_sampler(self) -> None:
        shape = (warm_up.ROWS, self.limits.vocab_size)
        logits = torch.zeros(shape, dtype=torch.float32, device=self.memory.pool.device)
        draws = self._sampler.sample(logits, warm_up.sampler_inputs(), warm_up.TOP_COUNT)
        draws.tokens.cpu()
        logits.isfinite().all(dim=-1).cpu()

    def _forward(self, plan: StepPlan) -> tuple[bool, _Logprobs | None]:
        """Compute the plan's rows and draw for those that sample; whether the draws are placed."""
        # Rows that are alike ask for no penalties either, so nobody looks back.
        alike = self.rows.drawn_alike(plan)
        if not alike and self.rows.lags and _looks_back(self.rows, plan):
            for flight in self._flights:
                self._fetched(flight)
        step = None if self._graphs is None else self._graphs.run(plan, alike=alike)
        if step is None:
            batch = self.rows.stage(plan)
            given = batch.tokens, batch.positions, batch.attention
            hidden = self.decoder.forward(*given, self.memory.pool)
            step = BatchStep(hidden, batch, replayed=False)
        if isinstance(step, BucketStep) and step.drawn:
            self.rows.settle(plan, placed=False, moved=True)
            return False, None
        hidden = step.hidden
        if isinstance(step, BatchStep):
            drawing, last_waiting = step.ends.drawing, step.ends.last_waiting
            plainly, logits = self._plainly(drawing), None
            if drawing.rows.size:
                # Plain draws take the product's own type, as behind graphs: no other kernel.
                head = self.decoder.raw_logits if plainly else self.decoder.logits
                logits = head(hidden[step.ends.last_tokens])
            if step.replayed:
                counts, sampler = self.stats.mixed_steps, FAST if plainly else GENERAL
                counts[sampler] = counts.get(sampler, 0) + 1
        else:
            drawing = Drawing.of(self.rows.table, plan)
            # Of the whole bucket, as a tail computes them: products of another shape round anew.
            head = self.decoder.raw_logits if self._plainly(drawing) else self.decoder.logits
            logits = head(hidden)[: plan.rows.size]
            last_waiting = torch.from_numpy(drawing.waiting)
            if drawing.waiting.size:
                rows, last_waiting = self._uploads.put(drawing.rows, drawing.waiting)
                logits = logits[rows]
        logprobs = self._draw(drawing, logits, hidden, last_waiting)
        self.rows.settle(plan, placed=True)
        return True, logprobs

    def _plainly(self, drawing: Drawing) -> bool:
        """Whether no row needs the general sampler, and there is another."""
        if self._plain is None:
            return False
        return bool(plain_rows(drawing.sampling, self.limits.vocab_size).all())

    def _draw(
        self,
        drawing: Drawing,
        logits: torch.Tensor | None,
        hidden: torch.Tensor,
        last_waiting: torch.Tensor,
    ) -> _Logprobs | None:
        """Draw, by the general sampler unless no row needs it, and look at who waits, into the
        rows' results."""
        count, n = drawing.rows.size, drawing.rows.size + drawing.waiting.size
        draws = None
        if logits is not None and count:
            inputs = drawing.sampling
            if self._plain is not None and self._plainly(drawing):
                keys = inputs.seeds.view(np.int64), inputs.positions, inputs.temperature
                tokens, finite = self._plain.sample(logits, *self._uploads.put(*keys))
            else:
                draws = self._sampler.sample(logits, inputs, drawing.top_count)
                tokens, finite = draws.tokens, draws.finite
            self.rows.drawn[:count].copy_(tokens)
            self.rows.finite[:count].copy_(finite)
        if drawing.waiting.size:
            # A chunk's row fails now: its pages must not be sealed and shared before it draws.
            self.rows.finite[count:n].copy_(hidden[last_waiting].isfinite().all(dim=-1))
        return _Logprobs.of(drawing, draws, n) if drawing.logprobs_asked else None

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


def _looks_back(rows: Rows, plan: StepPlan) -> bool:
    """Whether a draw of the plan looks at tokens that were drawn before it."""
    return bool(penalised(rows.table.records[plan.rows[plan.samples != 0]]).any())


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Of n plan rows, zeros for those that did not ask or draw. drawn: float32[n]; ids, values:
    int32[n, K], float32[n, K]."""

    drawn: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, drawing: Drawing, draws: Draws | None, n: int) -> _Logprobs:
        k = drawing.top_count
        drawn, shape = np.zeros(n, np.float32), (n, k)
        ids, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        if draws is not None and draws.asked.size:
            rows = drawing.rows[draws.asked]
            drawn[rows] = draws.logprobs.cpu().numpy()
            ids[rows] = draws.top_ids.cpu().numpy()
            values[rows] = draws.top_logprobs.cpu().numpy()
        return cls(drawn, ids, values)

    def put(self, result: StepResult) -> None:
        result.top_k = self.ids.shape[1]
        result.logprobs = self.drawn
        result.top_ids, result.top_logprobs = self.ids.reshape(-1), self.values.reshape(-1)
