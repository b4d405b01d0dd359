"""`holdfast bench core`: what the brain's whole step costs, without a device.

The production brain runs against a fake worker that keeps a production row table, reports its
digest and draws tokens by hash. One step is timed as everything the core process does for it:
expiry, plan, encode, decode, commit (digest check, journal, ledger), output. The fake worker's own
time is taken out. Two plans are in flight, as in production.

`contexts`: the rows already hold so many tokens; the step must not cost more for it.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from holdfast.bench.report import Figure, summary
from holdfast.config import Limits
from holdfast.core.brain import Brain
from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.core.replies import framed
from holdfast.errors import require
from holdfast.sim.fake_worker import FakeWorker
from holdfast.wire.messages import Sampling, Submit
from holdfast.wire.plan import StepPlan, StepResult
from holdfast.wire.rows import mix

ROWS = (1, 16, 64, 256)
CONTEXTS = (512, 4096, 32768)
PAGE_TOKENS = 16
VOCAB_SIZE = 32_000
WARM_STEPS = 40


class QuickWorker(FakeWorker):
    """The simulator's worker, but a token is a hash of (seed, position), not of the whole history:
    reading 256 histories of 32768 tokens would make each step wait 100 ms for its fake device."""

    def _forward(
        self, plan: StepPlan, spoil: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = self.rows.length[plan.rows] + plan.query_lens
        drawn = mix(positions.astype(np.int64), self.rows.records["seed"][plan.rows])
        tokens = (drawn % np.uint64(self.limits.vocab_size)).astype(np.int32)
        tokens *= plan.samples.astype(np.int32)
        return tokens, np.zeros(0, np.uint8), np.zeros(plan.rows.size, np.uint8)


class Stopwatch:
    """Adds up the time spent inside `with`: by the clock, and of this thread on a CPU."""

    def __init__(self) -> None:
        self.wall_ns = self.cpu_ns = 0

    def __enter__(self) -> None:
        self._cpu_ns = time.thread_time_ns()
        self._wall_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self.wall_ns += time.perf_counter_ns() - self._wall_ns
        self.cpu_ns += time.thread_time_ns() - self._cpu_ns


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    context_tokens: int


class Rig:
    """A brain with `case.rows` requests that decode from about `case.context_tokens` on."""

    def __init__(self, case: Case, steps: int) -> None:
        self.case = case
        self.limits = limits = _limits(case, steps)
        journal = Journal(memoryview(bytearray(Journal.size(limits))), limits)
        metrics = Metrics(memoryview(bytearray(Metrics.size(1))), 0)
        self.brain = Brain(limits, journal, metrics)
        self.worker = QuickWorker(limits)
        self._frames: deque[bytes] = deque()
        draw = np.random.default_rng([case.rows, case.context_tokens])
        for number in range(case.rows):
            # Lengths differ by a few pages, so that rows do not all cross a page in the same step.
            size = case.context_tokens - int(draw.integers(0, 4 * PAGE_TOKENS))
            prompt = draw.integers(0, VOCAB_SIZE, size=size, dtype=np.int32)
            submit = Submit(
                ids=(number + 1,),
                prompt=prompt.tobytes(),
                seeds=(number,),
                max_tokens=limits.context_tokens - size,
                sampling=Sampling(temperature=0.0),
                deadline_s=time.monotonic() + limits.timeout_s,
            )
            self.brain.receive(0, submit, time.monotonic())
        self.brain.take_output()

    def step(self) -> tuple[float, float]:
        """One step, steady state: a plan goes out, the oldest result comes in.

        Returns (wall, CPU of this thread) microseconds that the brain took.
        """
        watch = Stopwatch()
        with watch:
            now_s = time.monotonic()
            self.brain.expire(now_s)
            plan = self.brain.plan(now_s)
            frame = None if plan is None else plan.encode()
        if frame is not None:
            self._frames.append(self.worker.run(StepPlan.decode(frame)).encode())
        if self._frames and (frame is None or self.brain.in_flight >= self.limits.steps_ahead):
            answer = self._frames.popleft()
            with watch:
                self.brain.commit(StepResult.decode(answer), time.monotonic())
                for _, message in self.brain.take_output():
                    framed(message)
        else:
            require(frame is not None, "the brain neither plans nor waits for a result")
        return watch.wall_ns / 1000, watch.cpu_ns / 1000

    def prefill(self) -> None:
        """Run until every row decodes. Bounded: the prompts' chunks and some."""
        tokens = self.case.rows * self.case.context_tokens
        bound = 100 + 4 * self.case.rows + 4 * tokens // self.limits.prefill_tokens
        for _ in range(bound):
            self.step()
            if self._all_decode():
                return
        require(False, f"{self.case} did not reach decode within {bound} steps")

    def _all_decode(self) -> bool:
        table = self.worker.rows
        held = table.records["owner"] != 0
        if int(held.sum()) < self.case.rows:
            return False
        return bool((table.length[held] > table.records["prompt_len"][held]).all())


def _limits(case: Case, steps: int) -> Limits:
    prefill_tokens = 8192  # Only to reach long contexts soon; decode rows come first anyway.
    # What all rows can have decoded by the end: the wait for the last prompt, and the steps timed.
    prefill_steps = case.rows * case.context_tokens // prefill_tokens + case.rows + 100
    context = case.context_tokens + prefill_steps + WARM_STEPS + steps + 100
    columns = -(-context // PAGE_TOKENS)
    return Limits(
        vocab_size=VOCAB_SIZE,
        context_tokens=context,
        page_tokens=PAGE_TOKENS,
        pages=case.rows * columns + 64,
        rows_max=case.rows,
        prefill_tokens=prefill_tokens,
        queue_requests=max(case.rows, 64),
        live_tokens=(case.rows + 1) * context,
    )


def measure(case: Case, steps: int, repeats: int) -> list[Figure]:
    """Brain microseconds of a decode step of `case`: `repeats` runs of `steps` steps each."""
    rig = Rig(case, steps * repeats)
    rig.prefill()
    for _ in range(WARM_STEPS):
        rig.step()
    # As the core process does once it is up: what lives for ever is not walked again.
    gc.collect()
    gc.freeze()
    try:
        runs = [[rig.step() for _ in range(steps)] for _ in range(repeats)]
    finally:
        gc.unfreeze()
    return [
        Figure(
            bench="core",
            work=f"context {case.context_tokens}",
            batch=case.rows,
            metric=f"brain step {share}{clock}",
            unit="us",
            runs=tuple(summary([spent[at] for spent in run])[share] for run in runs),
            options={"steps": steps},
        )
        # On a machine that others use too, the difference of both clocks is time that they took.
        for at, clock in enumerate(("", " of CPU"))
        for share in ("p50", "p99")
    ]


def run(
    *,
    rows: tuple[int, ...] = ROWS,
    contexts: tuple[int, ...] = CONTEXTS,
    steps: int = 1000,
    repeats: int = 3,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Figure]:
    """Every combination, smallest first."""
    cases = [Case(row, context) for row in rows for context in contexts]
    measured: list[Figure] = []
    for number, case in enumerate(cases):
        report("bench core", number, len(cases))
        measured += measure(case, steps, repeats)
    report("bench core", len(cases), len(cases))
    return measured
