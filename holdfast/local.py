"""LocalEngine: the brain and a device in one process, stepped by whoever waits for a token.

The same brain, journal and plans as `serve`, with function calls for links. Any thread may submit
and cancel (a deque, never a lock, so an event loop is not blocked by a step); any thread may
`advance`, one at a time, and a step then serves everybody's requests, so callers batch together.
Knows ids only; text is the sinks' business. No torch: the device comes in from outside.

A device that computes by itself is kept one step ahead: the brain gives `limits.steps_ahead` plans,
all are launched, and only then is the oldest result waited for. What that result says is worked out
while the next step computes.

Invariants: every submitted request's sink hears exactly one end, also when the device fails; no
plan is in flight once no request lives, so who has all its answers may take the device away.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from holdfast.config import Limits
from holdfast.core.brain import Brain
from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.errors import EngineFault, HoldfastError, InvariantError
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Ended,
    Finish,
    Refused,
    Submit,
    ToApi,
    ToCore,
    TokenBatch,
)
from holdfast.wire.plan import StepPlan, StepResult

# Whoever is waited for has a plan or a result coming; so many empty rounds are a bug of ours.
EMPTY_ROUNDS_MAX = 1000
THREAD_STOP_S = 10.0

# By number: to make or read a member of an IntEnum costs a microsecond in Python 3.11.
_ENDS = {int(end): end for end in End}


class Drawn(msgspec.Struct, frozen=True):
    """One token of one request. top_ids, top_logprobs: most likely first; at least as many as
    this request asked for (a step returns the most that any of its rows asked)."""

    index: int
    token: int
    end: End
    cached_tokens: int
    logprob: float | None = None
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


class Sink(Protocol):
    """Who hears of a request. Called by the thread that steps; must not block or raise."""

    def push(self, drawn: Drawn) -> int | None:
        """Take a token; the number of tokens to keep when the request shall end here, else None."""
        ...

    def finish(self, end: End, message: str) -> None:
        """The request ended without a further token."""
        ...

    def refuse(self, refusal: Refused) -> None:
        """The request was not admitted."""
        ...


Run = Callable[[StepPlan], StepResult]


class Device(Protocol):
    """What executes plans in their order. May raise WorkerFault, and what a GPU has to say."""

    def launch(self, plan: StepPlan) -> None:
        """Begin one plan; at most `limits.steps_ahead` are not collected."""
        ...

    def collect(self) -> StepResult:
        """The result of the oldest plan that was launched; waits for it."""
        ...


class Immediate:
    """A Device of a function that executes one plan and returns its result."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._results: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        self._results.append(self._run(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()


class LocalEngine:
    """A brain with these limits over a device made for them."""

    def __init__(
        self,
        limits: Limits,
        device: Device,
        *,
        tag: bytes = b"",
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """enter: called in each thread before its first step, and again when another thread has
        stepped meanwhile: which GPU is current is known by thread."""
        self.limits = limits
        self._enter = enter
        self._entered: int | None = None  # the thread that stepped last
        # Anonymous mappings: the journal is sized for the worst case and touched as it is used.
        self._journal = mmap.mmap(-1, Journal.size(limits))
        metrics = Metrics(memoryview(mmap.mmap(-1, Metrics.size(1))), 0)
        self._brain = Brain(limits, Journal(memoryview(self._journal), limits), metrics, tag=tag)
        self._device: Device | None = device
        self._inbox: deque[tuple[ToCore, tuple[Sink, ...]]] = deque()
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._stepping = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._empty_rounds = 0
        self.failure: HoldfastError | None = None
        # Whether the failure may be the device's: a Ctrl-C between two halves of a step is not.
        self.device_failed = False

    def new_ids(self, count: int) -> tuple[int, ...]:
        return tuple(next(self._ids) for _ in range(count))

    def submit(self, submit: Submit, sinks: tuple[Sink, ...]) -> None:
        """Queue a request, one sink a choice. Raises what broke the engine, if it is broken."""
        assert len(sinks) == len(submit.ids), f"{len(sinks)} sinks for {len(submit.ids)} ids"
        if self._closed:
            raise EngineFault("this LLM is closed", code="closed")
        if self.failure is not None:
            raise self.failure
        self._inbox.append((submit, sinks))
        self._wake.set()

    def cancel(self, ids: tuple[int, ...]) -> None:
        """Nobody waits for these any more; their sinks hear nothing further."""
        self._inbox.append((Cancel(ids), ()))
        self._wake.set()

    @property
    def idle(self) -> bool:
        return not self._inbox and not self._brain.live

    def advance(self, timeout_s: float) -> None:
        """Make one step, or wait up to `timeout_s` while another thread makes one.

        Raises what broke the engine. Sinks are called from within.
        """
        if self._stepping.acquire(timeout=timeout_s):
            try:
                if self.failure is None and not self._closed:
                    self._guard(self._step)
            finally:
                self._stepping.release()
        if self.failure is not None:
            raise self.failure

    def start_thread(self) -> None:
        """From now on a thread steps whenever there is something to do (for streams)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._drive, name="holdfast llm", daemon=True)
            self._thread.start()

    @property
    def thread_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End every request, stop the thread and let go of the device. Raises InvariantError when
        the thread does not stop, and what broke the device under a plan that was in flight."""
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(THREAD_STOP_S)
            if self._thread.is_alive():
                raise InvariantError(f"the stepping thread did not end in {THREAD_STOP_S} s")
        with self._stepping:
            self._end_all(End.SHUTDOWN, "the LLM was closed")
            # What is in flight reads and writes memory that is given back next. After a failure
            # nothing more is asked of the device: it may be what has failed.
            try:
                if self.failure is None and self._device is not None:
                    self._guard(self._commit_all)
            finally:
                self._device = None
                if self.failure is not None:
                    # The error's frames hold the device, and whoever caught it has it.
                    self.failure = EngineFault(str(self.failure))

    def _drive(self) -> None:
        while not self._closed:
            if self.idle:
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            try:
                self.advance(1.0)
            except HoldfastError:
                return  # `failure` is set and every sink has heard of it.

    def _guard(self, act: Callable[[], None]) -> None:
        """Act in the thread that steps. What is raised within ends the engine."""
        try:
            thread = threading.get_ident()
            if self._entered != thread:
                self._enter()
                self._entered = thread
            act()
        except BaseException as error:
            # Whatever it is, a Ctrl-C between two halves of a step included: plans may be launched
            # and not committed, so this engine cannot go on. Everybody is told, then it goes up.
            self.device_failed = isinstance(error, Exception)
            known = isinstance(error, HoldfastError)
            self.failure = error if known else EngineFault(f"a step was broken off: {error!r}")
            self._end_all(End.ENGINE_FAULT, str(self.failure))
            raise

    def _step(self) -> None:
        brain, heard = self._brain, len(self._inbox)
        for _ in range(heard):
            message, sinks = self._inbox.popleft()
            self._receive(message, sinks)
        now_s = time.monotonic()
        brain.expire(now_s)
        device = self._device
        assert device is not None, "nobody steps a closed engine"
        while (plan := brain.plan(now_s)) is not None:
            device.launch(plan)
            now_s = time.monotonic()
        moved = self._commit() or heard
        # The last request may end while a step beyond it computes, which nobody will ask for.
        if not brain.live:
            self._commit_all()
        if moved or not (brain.live or self._sinks):
            self._empty_rounds = 0
            return
        self._empty_rounds += 1
        if self._empty_rounds > EMPTY_ROUNDS_MAX:
            raise InvariantError(
                f"{brain.live} requests are live, {len(self._sinks)} are waited for, and nothing "
                "is planned"
            )

    def _commit(self) -> bool:
        """Take the oldest result, if a plan is in flight, and say what the brain has to say:
        whether there was either."""
        brain = self._brain
        committed = brain.in_flight > 0
        if committed:
            assert self._device is not None, "a plan is in flight"
            brain.commit(self._device.collect(), time.monotonic())
        output = brain.take_output()
        for _, message in output:
            if isinstance(message, TokenBatch):
                self._tokens(message)
            else:
                self._message(message)
        return committed or bool(output)

    def _commit_all(self) -> None:
        """Wait for what is in flight."""
        while self._brain.in_flight:
            self._commit()

    def _receive(self, message: ToCore, sinks: tuple[Sink, ...]) -> None:
        if isinstance(message, Submit):
            self._sinks.update(zip(message.ids, sinks, strict=True))
        elif isinstance(message, Cancel):
            for request in message.ids:
                self._sinks.pop(request, None)
        self._brain.receive(0, message, time.monotonic())

    def _tokens(self, batch: TokenBatch) -> None:
        sinks = self._sinks
        extras = _logprobs_of(batch) if batch.logprobs.size else ()
        columns = zip(
            batch.requests.tolist(),
            batch.indexes.tolist(),
            batch.tokens.tolist(),
            batch.ends.tolist(),
            batch.cached.tolist(),
            strict=True,
        )
        for at, (request, index, token, end, cached) in enumerate(columns):
            sink = sinks.get(request)
            if sink is None:
                continue  # Cancelled, or ended by a stop string: later tokens are void.
            extra = extras[at] if extras else ()
            keep = sink.push(Drawn(index, token, _ENDS[end], cached, *extra))
            if end:
                del sinks[request]
            elif keep is not None:
                del sinks[request]
                self._brain.receive(0, Finish(request, keep), time.monotonic())

    def _message(self, message: ToApi) -> None:
        if isinstance(message, Refused):
            for request in message.ids:
                sink = self._sinks.pop(request, None)
                if sink is not None:
                    sink.refuse(message)
        elif isinstance(message, Ended):
            sink = self._sinks.pop(message.id, None)
            if sink is not None:
                sink.finish(End(message.end), message.message)
        else:
            assert isinstance(message, Accepted), f"{message} for an engine in this process"

    def _end_all(self, end: End, message: str) -> None:
        for message_in, sinks in self._inbox:
            if isinstance(message_in, Submit):
                self._sinks.update(zip(message_in.ids, sinks, strict=True))
        self._inbox.clear()
        sinks, self._sinks = list(self._sinks.values()), {}
        for sink in sinks:
            sink.finish(end, message)


def _logprobs_of(batch: TokenBatch) -> list[tuple[float, list[int], list[float]]]:
    """What Drawn has of logprobs, of each token of a step whose rows asked for any."""
    width = batch.top_k
    top_ids, top_values = batch.top_ids.tolist(), batch.top_logprobs.tolist()
    return [
        (logprob, top_ids[at * width : (at + 1) * width], top_values[at * width : (at + 1) * width])
        for at, logprob in enumerate(batch.logprobs.tolist())
    ]
