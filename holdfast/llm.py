"""LLM: a model in this process, without a server.

    from holdfast import LLM, SamplingParams

    with LLM() as llm:
        results = llm.generate(["A list is"], SamplingParams(max_tokens=40))
        answer = llm.chat([{"role": "user", "content": "What is a tuple?"}])

    async for delta in llm.stream("A list is", SamplingParams(max_tokens=40)):
        print(delta.text, end="")

`generate` and `chat` step the engine in the caller's thread; `stream` starts a thread that steps
for all streams, and calls from any threads batch together. Same brain, device code and validation
as `serve`: the same request with the same seed gives the same tokens there and here, and alone and
in company. Faults end the process that has them; streams that survive are what `serve` is for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from holdfast.api.chat import render
from holdfast.api.ids import load_tokenizer
from holdfast.api.output import ChoiceOutput, TokenLogprob
from holdfast.api.refusal import error_of
from holdfast.api.schema import Resolved, SamplingParams, check_id
from holdfast.api.text import Tokenizer
from holdfast.config import AUTO, Computation, Limits
from holdfast.cuda_driver import parse_device
from holdfast.errors import EngineFault, InvalidField, OptionError, RequestError
from holdfast.local import Device, Drawn, LocalEngine
from holdfast.model.spec import ModelSpec, resolve_model
from holdfast.proc.cuda_probe import probe
from holdfast.sizing import GpuRoom, Sizing, Wishes, memory_available_bytes, size
from holdfast.wire.messages import End, Refused, Submit

if TYPE_CHECKING:
    from holdfast.device.runner import Runner

log = logging.getLogger("holdfast.llm")

# A job in one's own process has no deadline unless it names one; a year is none.
NO_DEADLINE_S = 365 * 86400.0
# How often a wait looks whether the engine is still there.
WATCH_S = 1.0
# Reading a member of an IntEnum costs a microsecond in Python 3.11.
_STOP, _LENGTH = End.STOP, End.LENGTH

Prompt = str | Sequence[int]
LoadReport = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to choice `choice`. The last one of a choice has a finish_reason."""

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Choice:
    """finish_reason: stop, length, or what went wrong (then `error` says it)."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(slots=True)
class Result:
    """The answer to one prompt: `n` choices, of which the plain attributes are the first."""

    prompt_token_ids: list[int]
    choices: list[Choice]
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs


# Fields of Wishes that say how processes work together.
SERVER_ONLY = ("api_processes", "timeout_s")


class LLM:
    """`model`: a folder, a hub id, or None for the bundled one. device: cpu, cuda or cuda:N; dtype:
    float32 or bfloat16, None for float32 on a CPU and bfloat16 on a GPU. kernels: how layers are
    computed, of holdfast.config.KERNELS. graphs: steps are replayed from captured graphs where
    they can be. "auto" and None: triton's kernels and graphs on a GPU, the reference without
    graphs on a CPU. `options`: the fields of holdfast.sizing.Wishes (rows_max, pages,
    kv_memory_bytes, context_tokens, ...); steps_ahead is 2 at most, and 1 wherever a device answers
    before the next plan.

    Raises ModelError or OptionError, in one line each, before anything large is loaded.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        kernels: str = AUTO,
        load: str = "hf",
        graphs: bool | None = None,
        threads: int | None = None,
        seed: int = 0,
        progress: LoadReport | None = None,
        **options: Any,
    ) -> None:
        for name in SERVER_ONLY:
            if options.get(name) is not None:
                raise OptionError(name, "is for `holdfast serve`; one process has no use for it")
        spec = ModelSpec.load(resolve_model(None if model is None else os.fspath(model)))
        gpu = None
        kind, ordinal = parse_device(device)
        computation = Computation.choose(kind, kernels, graphs)
        if computation.fallback:
            log.warning("%s: %s", device, computation.fallback)
        if kind == "cuda":
            found = probe(ordinal)
            room = {"total_bytes": found.total_bytes, "free_bytes": found.free_bytes}
            gpu = GpuRoom(**room, processes=1)
        sizing = size(
            spec,
            Wishes(**options),
            dtype=dtype or ("float32" if gpu is None else "bfloat16"),
            available_bytes=memory_available_bytes(),
            gpu=gpu,
            kernels=computation.kernels,
            graphs=computation.graphs,
            streams=False,
        )
        self._open(spec, sizing, device, computation, load, threads, seed, progress)

    @classmethod
    def prepared(
        cls,
        spec: ModelSpec,
        sizing: Sizing,
        *,
        device: str = "cpu",
        computation: Computation | None = None,
        load: str = "hf",
        threads: int | None = None,
        seed: int = 0,
        progress: LoadReport | None = None,
    ) -> LLM:
        """An LLM of a sizing that was decided before (the command line does)."""
        llm = cls.__new__(cls)
        chosen = computation or Computation.choose(device)
        llm._open(spec, sizing, device, chosen, load, threads, seed, progress)
        return llm

    @classmethod
    def over(cls, spec: ModelSpec, limits: Limits, device: Device) -> LLM:
        """An LLM over a device that the caller opened."""
        llm = cls.__new__(cls)
        llm._attach(spec, limits, device, ids_will_do=False)
        return llm

    def _open(
        self,
        spec: ModelSpec,
        sizing: Sizing,
        device: str,
        computation: Computation,
        load: str,
        threads: int | None,
        seed: int,
        progress: LoadReport | None,
    ) -> None:
        limits = dataclasses.replace(sizing.limits, timeout_s=NO_DEADLINE_S, api_processes=1)
        report = progress or (lambda what, done, total: None)
        cores = threads or os.cpu_count() or 1
        runner, enter, release = _open_device(
            spec, limits, device, sizing.dtype, computation, load, seed, cores, report
        )
        # Where the device answers before `launch` returns, a second plan ahead would only compute
        # tokens past the end of requests that the first one ends.
        ahead = min(limits.steps_ahead, runner.in_flight_max)
        limits = dataclasses.replace(limits, steps_ahead=ahead)
        self._attach(spec, limits, runner, ids_will_do=load == "dummy", enter=enter)
        self._release = release

    def _attach(
        self,
        spec: ModelSpec,
        limits: Limits,
        device: Device,
        *,
        ids_will_do: bool,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.tokenizer = load_tokenizer(
            spec.path, vocab_size=spec.vocab_size, ids_will_do=ids_will_do
        )
        self._engine = LocalEngine(limits, device, enter=enter)
        self._release: Callable[[bool], None] = lambda failed: None

    # --- life ---

    @property
    def engine(self) -> LocalEngine:
        """What is below texts and parameters: requests as ids, for `holdfast replay`."""
        return self._engine

    def close(self) -> None:
        """End what is running and give the memory back. Harmless when closed already."""
        self._engine.close()
        self._release(self._engine.device_failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.template is not None

    # --- many prompts ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Callable[[int], None] = False,
        tenant: str = "",
    ) -> list[Result]:
        """Answer every prompt (text or token ids; one alone counts as a list of one), in order.

        progress: True draws a bar on a terminal; a function is told how many tokens came.
        tenant: prompts of one tenant share cached prefixes, those of others do not.
        Raises InvalidField for the first wrong prompt or parameter, before anything runs.
        """
        listed = _listed(prompts)
        each = _params_of(params, len(listed))
        jobs = [
            self._job(self._encode(prompt, at), one, tenant)
            for at, (prompt, one) in enumerate(zip(listed, each, strict=True))
        ]
        most = sum(job.resolved.max_tokens * job.resolved.choices for job in jobs)
        with _counter(progress, most) as count:
            self._finish(jobs, count)
        return [job.result() for job in jobs]

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        tenant: str = "",
    ) -> Result:
        """Answer one conversation by the model's chat template. Raises InvalidField."""
        job = self._job(self._encode_chat(messages), params or SamplingParams(), tenant)
        self._finish([job], lambda count: None)
        return job.result()

    def _finish(self, jobs: list[_Job], count: Callable[[int], None]) -> None:
        """Run jobs to their ends. Admits no more than the queue holds; the rest waits here."""
        news, counted = _News(), 0
        for job in jobs:
            job.news = news
        waiting, live = deque(jobs), dict[_Job, None]()
        room = self.limits.queue_requests
        try:
            while waiting or live:
                while waiting and (waiting[0].resolved.choices <= room or not live):
                    job = waiting.popleft()
                    room -= job.resolved.choices
                    self._engine.submit(job.start(self._engine), job.sinks)
                    live[job] = None
                self._engine.advance(WATCH_S)
                tokens = news.tokens
                count(tokens - counted)
                counted = tokens
                if not news.closed:
                    continue
                back = []
                while news.closed:
                    job = news.closed.popleft()
                    del live[job]
                    room += job.resolved.choices
                    if job.refused_for_now:
                        back.append(job)
                # Full of promised tokens: it comes again once something has ended.
                if back and not live:
                    raise back[0].refusal()
                waiting.extendleft(reversed(back))
        except BaseException:
            self._engine.cancel(tuple(i for job in live for i in job.ids))
            raise
        for job in jobs:
            if job.refused is not None:
                raise job.refusal()

    # --- streams ---

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, tenant: str = ""
    ) -> AsyncIterator[Delta]:
        """Answer one prompt as it comes. Leaving the loop early cancels the request.

        Raises InvalidField before the first delta, EngineFault when it cannot be finished.
        """
        ids = self._encode(prompt, None)
        async for delta in self._stream(self._job(ids, params or SamplingParams(), tenant)):
            yield delta

    async def stream_chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        tenant: str = "",
    ) -> AsyncIterator[Delta]:
        """`stream` of the next message of a conversation."""
        ids = self._encode_chat(messages)
        async for delta in self._stream(self._job(ids, params or SamplingParams(), tenant)):
            yield delta

    async def _stream(self, job: _Job) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        # Bounded by the request's own output allowance.
        heard: asyncio.Queue[Delta | None] = asyncio.Queue()

        def hear(delta: Delta | None) -> None:
            # The loop may have been closed under a stream that nobody reads any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(heard.put_nowait, delta)

        job.listen(hear)
        self._engine.submit(job.start(self._engine), job.sinks)
        self._engine.start_thread()
        try:
            left = job.resolved.choices
            while left:
                try:
                    delta = await asyncio.wait_for(heard.get(), WATCH_S)
                except TimeoutError:
                    if not self._engine.thread_alive:
                        raise EngineFault("the stepping thread is gone") from None
                    continue
                if delta is None:
                    raise job.refusal()
                yield delta
                if delta.finish_reason is not None:
                    left -= 1
                    job.raise_error(delta.choice)
        finally:
            if job.open:
                self._engine.cancel(job.ids)

    # --- requests ---

    def _job(self, ids: list[int], params: SamplingParams, tenant: str) -> _Job:
        resolved = params.resolve(self.limits, prompt_tokens=len(ids), end_ids=self.spec.end_ids)
        return _Job(ids, resolved, self.tokenizer, tenant)

    def _encode(self, prompt: Prompt, at: int | None) -> list[int]:
        where = "prompt" if at is None else f"prompts.{at}"
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, field=where)
        ids = [int(token) for token in prompt]
        for token in ids:
            check_id(token, self.limits.vocab_size, where)
        return ids

    def _encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        text = render(self.tokenizer.template, messages)
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text, special=False, field="messages")


class _News:
    """What the thread that steps has to say to the one that runs jobs, so that this one need not
    ask each of them after each step. tokens: that came so far. closed: jobs that wait for nothing
    more, ended or refused."""

    __slots__ = ("closed", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.closed: deque[_Job] = deque()


class _Job:
    """One prompt on its way: its sinks, one a choice, and what they have heard. `news`: who is told
    of it."""

    def __init__(
        self, prompt: list[int], resolved: Resolved, tokenizer: Tokenizer, tenant: str
    ) -> None:
        self.prompt = prompt
        self.resolved = resolved
        self.tenant = tenant
        self.ids: tuple[int, ...] = ()
        self.refused: Refused | None = None
        self.news = _News()
        self.hear: Callable[[Delta | None], None] | None = None
        self._left = resolved.choices  # that have not ended
        self.sinks = tuple(_Sink(self, number, tokenizer) for number in range(resolved.choices))

    def start(self, engine: LocalEngine) -> Submit:
        """The message that asks for it, with fresh ids. May be called again after a refusal."""
        resolved = self.resolved
        self.refused = None
        self.ids = engine.new_ids(resolved.choices)
        return Submit(
            ids=self.ids,
            prompt=np.array(self.prompt, np.int32).tobytes(),
            seeds=resolved.seeds,
            max_tokens=resolved.max_tokens,
            sampling=resolved.sampling,
            deadline_s=time.monotonic() + resolved.timeout_s,
            tenant=self.tenant,
            priority=resolved.priority,
        )

    def listen(self, hear: Callable[[Delta | None], None]) -> None:
        """Tell each delta to `hear`, which is called by the stepping thread; None: refused."""
        self.hear = hear

    def choice_ended(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.news.closed.append(self)

    def refuse(self, refusal: Refused) -> None:
        """Said once for each choice, to the last of them perhaps when the job has been started
        again already: of ids that it does not have any more."""
        if self.refused is not None or refusal.ids != self.ids:
            return
        self.refused = refusal
        self.news.closed.append(self)
        if self.hear is not None:
            self.hear(None)

    @property
    def open(self) -> bool:
        return self.refused is None and self._left > 0

    @property
    def refused_for_now(self) -> bool:
        return self.refused is not None and self.refused.status == 429

    def refusal(self) -> RequestError:
        refused = self.refused
        assert refused is not None, "nothing was refused"
        if refused.field is not None:
            return InvalidField(refused.field, refused.message, code=refused.code)
        return EngineFault(refused.message, code=refused.code or "refused")

    def raise_error(self, choice: int) -> None:
        error = self.sinks[choice].error
        if error is not None:
            raise error

    def result(self) -> Result:
        cached = max(sink.cached_tokens for sink in self.sinks)
        return Result(self.prompt, [sink.answer for sink in self.sinks], cached)


class _Sink:
    """One choice: from tokens to text and the answer (local.Sink)."""

    __slots__ = (
        "_alternatives",
        "_job",
        "_number",
        "_output",
        "_pieces",
        "answer",
        "cached_tokens",
        "error",
    )

    def __init__(self, job: _Job, number: int, tokenizer: Tokenizer) -> None:
        self._job = job
        self._number = number
        self._output = ChoiceOutput(tokenizer, job.prompt, job.resolved)
        self._pieces: list[str] = []
        self.cached_tokens = 0
        self.error: RequestError | None = None
        wanted = job.resolved.sampling.top_logprobs
        self._alternatives = max(0, wanted)
        self.answer = Choice(logprobs=[] if wanted >= 0 else None)

    def push(self, drawn: Drawn) -> int | None:
        answer, end = self.answer, drawn.end
        self.cached_tokens = drawn.cached_tokens
        answer.token_ids.append(drawn.token)
        self._job.news.tokens += 1
        text = self._output.push(
            drawn.token,
            ends_by_id=end is _STOP,
            logprob=drawn.logprob,
            top_ids=drawn.top_ids[: self._alternatives],
            top_logprobs=drawn.top_logprobs[: self._alternatives],
        )
        keep: int | None = None
        if self._output.stopped:
            answer.finish_reason = "stop"
            keep = len(answer.token_ids)
        elif end:
            text += self._output.finish()
            answer.finish_reason = "length" if end is _LENGTH else "stop"
        self._emit(text, (drawn.token,))
        return keep

    def finish(self, end: End, message: str) -> None:
        self.error = error_of(end, message)
        self.answer.error = None if self.error is None else self.error.message
        self.answer.finish_reason = end.name.lower()
        self._emit(self._output.finish(), ())

    def refuse(self, refusal: Refused) -> None:
        self._job.refuse(refusal)

    def _emit(self, text: str, tokens: tuple[int, ...]) -> None:
        answer, job = self.answer, self._job
        logprobs: tuple[TokenLogprob, ...] = ()
        if answer.logprobs is not None:
            logprobs = tuple(self._output.logprobs())
            answer.logprobs.extend(logprobs)
        self._pieces.append(text)
        reason = answer.finish_reason
        if reason is not None:
            answer.text = "".join(self._pieces)
            job.choice_ended()
        if job.hear is not None:
            job.hear(Delta(self._number, text, tokens, reason, logprobs))


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(token, int | np.integer) for token in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _params_of(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = list(params)
    if len(each) != count:
        raise InvalidField("params", f"{len(each)} parameters for {count} prompts")
    return each


@contextmanager
def _counter(progress: bool | Callable[[int], None], total: int) -> Iterator[Callable[[int], None]]:
    """What counts tokens: the caller's function, a bar on a terminal, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda count: None
        return
    from holdfast.cli.show import bars

    done = [0]
    with bars(unit="tokens") as report:

        def count(new: int) -> None:
            done[0] += new
            report("generating", done[0], total)

        yield count


def _open_device(
    spec: ModelSpec,
    limits: Limits,
    device: str,
    dtype: str,
    computation: Computation,
    load: str,
    seed: int,
    threads: int,
    report: LoadReport,
) -> tuple[Runner, Callable[[], None], Callable[[bool], None]]:
    """A device with its weights loaded, in memory of this process; what each thread calls before it
    steps it; and what gives its memory back once nobody holds it, told whether the device has
    failed. Imports torch."""
    from holdfast.device.build import build_engine
    from holdfast.device.cuda import give_back, make_current, open_device
    from holdfast.device.memory import DeviceMemory
    from holdfast.model.weights import WeightsLayout, dummy_weights, load_weights

    where = open_device(device)
    memory = DeviceMemory.allocate(spec, limits, dtype=dtype, pool_dtype=dtype, device=where)
    layout = WeightsLayout.of(spec, dtype)
    if load == "dummy":
        dummy_weights(spec, memory.weights, layout, seed)
    else:
        load_weights(
            spec, memory.weights, layout, lambda done, total: report("weights", done, total)
        )
    views = layout.views(memory.weights)
    chosen = {"kernels": computation.kernels, "graphs": computation.graphs}
    runner = build_engine(spec, limits, views, memory, **chosen, threads=threads)
    if computation.graphs:
        runner.warm_up(lambda done, total: report("graphs", done, total))
    return runner, functools.partial(make_current, where), functools.partial(give_back, where)
