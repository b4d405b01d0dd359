"""Drives a Brain against the fake worker, deterministically; shared by the core's tests."""

from __future__ import annotations

from collections import deque

import numpy as np

from holdfast.config import Limits
from holdfast.core.brain import Brain
from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.core.replies import framed
from holdfast.sim.fake_worker import FakeWorker, expected_token
from holdfast.wire.link import Kind
from holdfast.wire.messages import (
    Accepted,
    End,
    Ended,
    Memory,
    Refused,
    Sampling,
    Submit,
    TokenBatch,
    decode_to_api,
)
from holdfast.wire.plan import StepPlan, StepResult

VOCAB = 997


def limits_of(**overrides) -> Limits:
    base = {
        "vocab_size": VOCAB,
        "context_tokens": 128,
        "page_tokens": 4,
        "pages": 65,
        "rows_max": 4,
        "prefill_tokens": 16,
        "queue_requests": 64,
        "live_tokens": 1 << 14,
    }
    return Limits(**(base | overrides))


class Driver:
    """One brain, one fake worker, and what clients would have seen."""

    def __init__(self, limits: Limits, scrub_pages_s: float = 0.0) -> None:
        self.limits = limits
        self.scrub_pages_s = scrub_pages_s
        self.now_s = 100.0
        self.journal_buffer = memoryview(bytearray(Journal.size(limits)))
        self.metrics = Metrics(memoryview(bytearray(Metrics.size(1))), 0)
        self.brain = self.new_brain()
        self.worker = FakeWorker(limits)
        self.pending: deque[StepResult] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, End] = {}
        self.refused: dict[int, Refused] = {}
        self.accepted: set[int] = set()
        self.prompts: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.batches: list[TokenBatch] = []
        self.plans: list[StepPlan] = []

    def new_brain(self) -> Brain:
        journal = Journal(self.journal_buffer, self.limits)
        return Brain(self.limits, journal, self.metrics, scrub_pages_s=self.scrub_pages_s)

    def submit(self, request: int, prompt: list[int], max_tokens: int = 8, **options) -> None:
        sampling = options.pop("sampling", Sampling(temperature=0.0))
        ids = options.pop("ids", (request,))
        for one in ids:
            self.prompts[one] = list(prompt)
        message = Submit(
            ids=ids,
            prompt=np.array(prompt, np.int32).tobytes(),
            seeds=tuple(range(len(ids))),
            max_tokens=max_tokens,
            sampling=sampling,
            deadline_s=self.now_s + options.pop("timeout_s", 60.0),
            **options,
        )
        self.brain.receive(0, message, self.now_s)
        self.collect()

    def launch(self) -> bool:
        """Plan and run on the device; the result waits to be committed."""
        plan = self.brain.plan(self.now_s)
        self.collect()
        if plan is None:
            return False
        frame = plan.encode()
        self.plans.append(plan)
        result = self.worker.run(StepPlan.decode(frame))
        self.pending.append(StepResult.decode(result.encode()))
        return True

    def commit(self) -> None:
        self.brain.commit(self.pending.popleft(), self.now_s)
        self.collect()

    def tick(self) -> bool:
        """One step of an overlapped engine: fill the pipe, then commit the oldest result."""
        launched = False
        while self.launch():
            launched = True
        if self.pending:
            self.commit()
            return True
        return launched

    def run(self, ticks: int = 10_000) -> None:
        """Until idle; fails when that takes more than `ticks`."""
        for _ in range(ticks):
            if not self.tick() and not self.pending:
                return
        raise AssertionError(f"not idle after {ticks} ticks; {self.brain.live} live")

    def replace_worker(
        self, epoch: int, *, implicates: bool = False, memory: Memory = Memory.LOST
    ) -> None:
        self.brain.suspend()
        self.pending.clear()
        pages = None if memory is Memory.LOST else self.worker.pages
        self.worker = FakeWorker(self.limits, epoch, pages)
        self.brain.new_epoch(epoch, self.now_s, implicates=implicates, memory=memory)
        self.collect()

    def collect(self) -> None:
        for _, said in self.brain.take_output():
            kind, payload = framed(said)
            if kind == Kind.TOKENS:
                self._take_batch(TokenBatch.decode(payload))
                continue
            message = decode_to_api(payload)
            if isinstance(message, Accepted):
                self.accepted.update(message.ids)
            elif isinstance(message, Refused):
                self.refused.update(dict.fromkeys(message.ids, message))
            elif isinstance(message, Ended):
                assert message.id not in self.ends, f"{message.id} ended twice"
                self.ends[message.id] = End(message.end)

    def _take_batch(self, batch: TokenBatch) -> None:
        self.batches.append(batch)
        for request, index, token, end, cached in zip(
            batch.requests.tolist(),
            batch.indexes.tolist(),
            batch.tokens.tolist(),
            batch.ends.tolist(),
            batch.cached.tolist(),
            strict=True,
        ):
            assert request not in self.ends, f"token after the end of {request}"
            got = self.tokens.setdefault(request, [])
            assert index == len(got), f"request {request}: index {index} after {len(got)} tokens"
            got.append(token)
            self.cached[request] = cached
            if end:
                self.ends[request] = End(end)

    def expected(self, request: int, count: int) -> list[int]:
        """What an undisturbed device would have said."""
        history = list(self.prompts[request])
        for _ in range(count):
            history.append(self.next_token(history))
        return history[len(self.prompts[request]) :]

    def next_token(self, history: list[int]) -> int:
        limits = self.limits
        return expected_token(np.array(history, np.int32), limits.vocab_size, 0, limits.windows)

    def check(self, request: int) -> None:
        got = self.tokens.get(request, [])
        assert got == self.expected(request, len(got)), f"request {request} has foreign text"

    def check_home(self) -> None:
        """Everything is home: no page held, nothing live, all counts add up."""
        self.brain.verify()
        assert self.brain.live == 0
        for group in range(self.limits.groups):
            assert self.brain.ledger.held(group) == 0
        assert self.brain.ledger.retiring == 0
