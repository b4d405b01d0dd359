"""LLM over the simulator's device: its tokens tell at once whether histories got mixed up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest

from holdfast.api.schema import SamplingParams
from holdfast.config import Limits
from holdfast.errors import EngineFault, InvalidField, WorkerFault
from holdfast.llm import LLM, NO_DEADLINE_S
from holdfast.local import Drawn, Immediate, LocalEngine
from holdfast.model.spec import ModelSpec, resolve_model
from holdfast.sim.fake_worker import (
    FakeWorker,
    expected_alternatives,
    expected_logprob,
    expected_token,
)
from holdfast.wire.messages import End, Refused, Submit
from holdfast.wire.plan import StepPlan, StepResult

SPEC = ModelSpec.load(resolve_model(None))


def limits(**changes: int) -> Limits:
    chosen = {"context_tokens": 256, "page_tokens": 8, "pages": 400, "rows_max": 8}
    chosen |= {"prefill_tokens": 64, "queue_requests": 16, "steps_ahead": 1}
    return Limits(vocab_size=SPEC.vocab_size, timeout_s=NO_DEADLINE_S, **(chosen | changes))


def make(**changes: int) -> LLM:
    bounds = limits(**changes)
    return LLM.over(SPEC, bounds, Immediate(FakeWorker(bounds).run))


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make() as llm:
        yield llm


def oracle(prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(expected_token(np.array(history, np.int32), SPEC.vocab_size))
    return history[len(prompt) :]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 5000, size=draw.integers(1, 60)).tolist() for _ in range(count)]


def exactly(count: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, **more)


def test_every_prompt_gets_its_own_continuation_in_the_order_of_the_prompts(llm: LLM) -> None:
    asked = prompts(30)
    lengths = [1 + at % 17 for at in range(30)]
    counts: list[int] = []
    results = llm.generate(asked, [exactly(n) for n in lengths], progress=counts.append)
    for prompt, length, result in zip(asked, lengths, results, strict=True):
        assert result.prompt_token_ids == prompt
        assert result.token_ids == oracle(prompt, length)
        assert result.finish_reason == "length"
        assert result.text == llm.tokenizer.decode(result.token_ids)
    assert sum(counts) == sum(lengths)


def test_more_prompts_than_the_queue_and_its_tokens_hold_are_all_answered() -> None:
    with make(queue_requests=12, rows_max=2, live_tokens=256) as llm:
        asked = prompts(40, seed=1)
        results = llm.generate(asked, exactly(5))
    assert [r.token_ids for r in results] == [oracle(p, 5) for p in asked]


def test_one_prompt_alone_is_a_list_of_one(llm: LLM) -> None:
    assert llm.generate([7, 8, 9], exactly(3))[0].token_ids == oracle([7, 8, 9], 3)
    assert len(llm.generate("A list is", exactly(2))) == 1
    assert llm.generate([], exactly(2)) == []


def test_choices_share_the_prompt_and_are_counted_apart(llm: LLM) -> None:
    prompt = list(range(100, 140))
    result = llm.generate([prompt], exactly(6, n=3))[0]
    assert [c.token_ids for c in result.choices] == [oracle(prompt, 6)] * 3
    assert result.cached_tokens in (0, 32)


def test_a_prompt_seen_before_is_served_from_the_cache_of_its_tenant_only(llm: LLM) -> None:
    prompt = list(range(200, 240))
    assert llm.generate([prompt], exactly(4))[0].cached_tokens == 0
    assert llm.generate([prompt], exactly(4))[0].cached_tokens == 32
    assert llm.generate([prompt], exactly(4), tenant="other")[0].cached_tokens == 0


def test_a_stop_string_ends_the_answer_and_is_not_in_it(llm: LLM) -> None:
    prompt = list(range(300, 320))
    whole = llm.generate([prompt], exactly(40))[0]
    # A string from the middle of the answer that does not occur before.
    at = len(whole.text) // 2
    stop = whole.text[at : at + 4]
    result = llm.generate([prompt], exactly(40, stop=[stop]))[0]
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_a_stop_id_ends_the_answer_and_its_text_is_not_shown(llm: LLM) -> None:
    prompt = list(range(300, 320))
    tokens = oracle(prompt, 20)
    result = llm.generate([prompt], exactly(20, stop_token_ids=[tokens[9]]))[0]
    end = tokens.index(tokens[9])
    assert (result.finish_reason, result.token_ids) == ("stop", tokens[: end + 1])
    assert result.text == llm.tokenizer.decode(tokens[:end])


def test_logprobs_are_of_their_own_token_and_as_many_as_its_request_asked(llm: LLM) -> None:
    """One step returns the most that any of its rows asked; beside them are rows that asked none,
    and rows in the middle of their prompts, which have no token."""
    asked = [[1, 2, 3], list(range(100, 150)), [4], list(range(200, 250)), [5, 6]]
    wanted = [None, 3, 0, 1, None]
    lengths = [4, 9, 12, 6, 15]
    params = [exactly(n, logprobs=some) for n, some in zip(lengths, wanted, strict=True)]
    for result, some, length in zip(llm.generate(asked, params), wanted, lengths, strict=True):
        assert len(result.token_ids) == length
        if some is None:
            assert result.logprobs is None
            continue
        assert [entry.token for entry in result.logprobs] == result.token_ids
        for entry in result.logprobs:
            assert entry.logprob == expected_logprob(entry.token)
            pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
            assert list(pairs) == expected_alternatives(entry.token, some, SPEC.vocab_size)


def test_progress_hears_of_every_token_also_beside_another_generation(llm: LLM) -> None:
    """Whoever steps pushes everybody's tokens; each call counts its own."""
    other: list[int] = []
    asked = prompts(6, seed=8)
    thread = threading.Thread(
        target=lambda: llm.generate(asked, exactly(40), progress=other.append)
    )
    thread.start()
    mine: list[int] = []
    llm.generate(asked, exactly(25, n=2), progress=mine.append)
    thread.join(30)
    assert not thread.is_alive()
    assert (sum(mine), sum(other)) == (6 * 2 * 25, 6 * 40)


def test_a_refusal_of_ids_that_a_job_no_longer_has_is_not_its_own(llm: LLM) -> None:
    job = llm._job([1, 2, 3], exactly(5, n=2), "")
    first = job.start(llm._engine)
    refusal = Refused(first.ids, 429, "full", retry_after_s=1.0)
    job.sinks[0].refuse(refusal)
    assert list(job.news.closed) == [job]
    job.news.closed.clear()
    job.start(llm._engine)
    job.sinks[1].refuse(refusal)
    assert not job.news.closed and job.open


@pytest.mark.parametrize(
    ("asked", "params", "field"),
    [
        ([[1], []], None, "prompt"),
        ([[1], [10**9]], None, "prompts.1"),
        ([[1], [-1]], None, "prompts.1"),
        ([[1] * 300], None, "prompt"),
        ([[1] * 250], SamplingParams(max_tokens=7), "max_tokens"),
        ([[1], [2]], [SamplingParams()], "params"),
        (["\ud800"], None, "prompts.0"),
    ],
    ids=["empty", "id too large", "negative id", "too long", "no room", "params", "surrogate"],
)
def test_a_wrong_prompt_is_named_before_anything_runs(
    llm: LLM, asked: list, params: SamplingParams | None, field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        llm.generate(asked, params)
    assert caught.value.field == field
    assert llm._engine.idle


def test_streams_run_together_and_each_is_its_own_text(llm: LLM) -> None:
    asked = prompts(12, seed=3)

    async def one(prompt: list[int]) -> tuple[list[int], str, list[str | None]]:
        tokens, text, reasons = [], "", []
        async for delta in llm.stream(prompt, exactly(15)):
            tokens += delta.token_ids
            text += delta.text
            reasons.append(delta.finish_reason)
        return tokens, text, reasons

    async def everybody() -> list[tuple[list[int], str, list[str | None]]]:
        return await asyncio.wait_for(asyncio.gather(*map(one, asked)), 30)

    for prompt, (tokens, text, reasons) in zip(asked, asyncio.run(everybody()), strict=True):
        assert tokens == oracle(prompt, 15)
        assert text == llm.tokenizer.decode(tokens)
        assert reasons == [None] * 14 + ["length"]


def test_generate_and_streams_go_on_side_by_side(llm: LLM) -> None:
    asked = prompts(10, seed=4)
    answers: list = []
    thread = threading.Thread(target=lambda: answers.extend(llm.generate(asked, exactly(20))))

    async def stream() -> list[int]:
        thread.start()
        return [t async for d in llm.stream(asked[0], exactly(50)) for t in d.token_ids]

    tokens = asyncio.run(asyncio.wait_for(stream(), 30))
    thread.join(30)
    assert not thread.is_alive()
    assert tokens == oracle(asked[0], 50)
    assert [r.token_ids for r in answers] == [oracle(p, 20) for p in asked]


def test_every_thread_enters_the_device_before_it_steps_and_again_after_another_has() -> None:
    """Which GPU is current is known by thread: a stream's thread would compute on cuda:0."""
    entered: list[int] = []
    stepped: list[int] = []
    bounds = limits()
    worker = FakeWorker(bounds)

    def run(plan: StepPlan) -> StepResult:
        assert entered and entered[-1] == threading.get_ident(), "a step in a thread that is not in"
        stepped.append(threading.get_ident())
        return worker.run(plan)

    engine = LocalEngine(
        bounds, Immediate(run), enter=lambda: entered.append(threading.get_ident())
    )
    with make() as llm:
        llm._engine = engine
        llm.generate(prompts(3), exactly(5))
        assert entered == [threading.get_ident()], "once, not in every step"

        async def stream() -> list[int]:
            return [t async for d in llm.stream([5, 6, 7], exactly(5)) for t in d.token_ids]

        assert asyncio.run(asyncio.wait_for(stream(), 30)) == oracle([5, 6, 7], 5)
        # By whichever thread comes first to the step; the closing one waits for what is in flight.
        assert len(set(stepped)) == 2 and set(entered) == set(stepped)


def test_a_stream_that_is_left_early_is_cancelled_and_its_pages_come_home(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.stream(list(range(50)), exactly(200))
        await anext(stream)
        await stream.aclose()

    asyncio.run(asyncio.wait_for(leave(), 30))
    # A later request is served, and then nothing is live: the first did not run on.
    assert llm.generate([[1, 2]], exactly(3))[0].token_ids == oracle([1, 2], 3)
    assert llm._engine.idle
    assert llm._engine._brain.ledger.held() == 0


def test_a_fault_of_the_device_reaches_every_caller_and_later_ones() -> None:
    bounds = limits()
    worker = FakeWorker(bounds)

    def run(plan):
        if plan.step == 5:
            raise WorkerFault("the device broke")
        return worker.run(plan)

    with LLM.over(SPEC, bounds, Immediate(run)) as llm:
        with pytest.raises(WorkerFault, match="broke"):
            llm.generate(prompts(4), exactly(30))
        with pytest.raises(WorkerFault, match="broke"):
            llm.generate(prompts(1), exactly(3))


def test_a_fault_ends_streams_with_an_engine_fault() -> None:
    bounds = limits()
    worker = FakeWorker(bounds)

    def run(plan):
        if plan.step == 9:
            raise WorkerFault("the device broke")
        return worker.run(plan)

    async def read(llm: LLM) -> None:
        async for _ in llm.stream([1, 2, 3], exactly(30)):
            pass

    with LLM.over(SPEC, bounds, Immediate(run)) as llm, pytest.raises(EngineFault, match="broke"):
        asyncio.run(asyncio.wait_for(read(llm), 30))


def test_close_ends_streams_and_refuses_what_comes_after() -> None:
    llm = make()

    async def read() -> None:
        stream = llm.stream([1, 2, 3], exactly(250))
        await anext(stream)
        await asyncio.to_thread(llm.close)
        async for _ in stream:
            pass

    with pytest.raises(Exception, match="closed"):
        asyncio.run(asyncio.wait_for(read(), 30))
    with pytest.raises(EngineFault, match="closed"):
        llm.generate([[1]], exactly(1))
    llm.close()


# --- a device that is kept one step ahead ---


class Later:
    """Computes when it is asked for the result, as a GPU is not done when a launch returns. Breaks
    where it is told to, and counts the most plans that were launched and not collected."""

    def __init__(self, bounds: Limits, *, breaks_launch: int = 0, breaks_collect: int = 0) -> None:
        self._worker = FakeWorker(bounds)
        self._breaks = breaks_launch, breaks_collect
        self.plans: deque[StepPlan] = deque()
        self.most = 0

    def launch(self, plan: StepPlan) -> None:
        self._break(plan, self._breaks[0])
        self.plans.append(plan)
        self.most = max(self.most, len(self.plans))

    def collect(self) -> StepResult:
        plan = self.plans.popleft()
        self._break(plan, self._breaks[1])
        return self._worker.run(plan)

    def _break(self, plan: StepPlan, step: int) -> None:
        if plan.step == step:
            raise WorkerFault(f"step {step} broke")


def ahead(**breaks: int) -> tuple[LLM, Later]:
    bounds = limits(steps_ahead=2)
    device = Later(bounds, **breaks)
    return LLM.over(SPEC, bounds, device), device


def test_a_plan_is_launched_before_the_result_of_the_last_and_answers_are_the_same() -> None:
    llm, device = ahead()
    with llm:
        for seed in range(2):
            asked = prompts(20, seed=seed)
            results = llm.generate(asked, [exactly(1 + at % 9) for at in range(20)])
            for at, (prompt, result) in enumerate(zip(asked, results, strict=True)):
                assert result.token_ids == oracle(prompt, 1 + at % 9)
            assert not device.plans, "who has all answers left a step behind"
        assert device.most == 2 and llm._engine.idle
        # What the last steps owe is sealed by the next one, with steps ahead or without.
        llm.engine.advance(1.0)
        assert llm._engine._brain.ledger.held() == 0


@pytest.mark.parametrize("where", ["breaks_launch", "breaks_collect"])
def test_a_fault_with_another_plan_in_flight_is_told_once_and_nothing_more_is_asked(
    where: str,
) -> None:
    llm, device = ahead(**{where: 6})
    with llm:
        for _ in range(2):
            with pytest.raises(WorkerFault, match="step 6 broke"):
                llm.generate(prompts(4), exactly(30))
    # One other plan was in flight, and none was launched behind the fault.
    assert [plan.step for plan in device.plans] == [5 if where == "breaks_launch" else 7]


def test_leaving_a_stream_with_a_plan_in_flight_leaves_no_plan_and_no_page_behind() -> None:
    llm, device = ahead()

    async def leave() -> None:
        async for _ in llm.stream([4, 5, 6], exactly(200)):
            return

    with llm:
        asyncio.run(asyncio.wait_for(leave(), 30))
        assert llm.generate([[1, 2]], exactly(3))[0].token_ids == oracle([1, 2], 3)
        assert llm._engine.idle and llm._engine._brain.ledger.held() == 0
    assert device.most == 2 and not device.plans


def test_close_waits_for_what_is_in_flight_before_memory_is_given_back() -> None:
    llm, device = ahead()
    llm.engine.submit(job := submitted(llm), (Deaf(),))
    for _ in range(3):
        llm.engine.advance(1.0)
    assert job.ids and device.plans
    llm.close()
    assert not device.plans
    llm.close()


def test_a_fault_under_the_last_plan_in_flight_is_raised_by_close_once() -> None:
    llm, _ = ahead(breaks_collect=4)
    llm.engine.submit(submitted(llm), (Deaf(),))
    for _ in range(3):
        llm.engine.advance(1.0)
    with pytest.raises(WorkerFault, match="step 4 broke"):
        llm.close()
    llm.close()


class Deaf:
    """A sink that hears everything and says nothing."""

    def push(self, drawn: Drawn) -> int | None:
        return None

    def finish(self, end: End, message: str) -> None:
        assert end is End.SHUTDOWN, message

    def refuse(self, refusal: Refused) -> None:
        raise AssertionError(refusal)


def submitted(llm: LLM) -> Submit:
    """A request of one token that would run for a hundred steps."""
    params = exactly(100).resolve(llm.limits, prompt_tokens=1, end_ids=SPEC.end_ids)
    return Submit(
        ids=llm.engine.new_ids(1),
        prompt=np.array([7], np.int32).tobytes(),
        seeds=params.seeds,
        max_tokens=params.max_tokens,
        sampling=params.sampling,
        deadline_s=time.monotonic() + 60,
        tenant="",
        priority=params.priority,
    )
