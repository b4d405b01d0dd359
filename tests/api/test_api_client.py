"""CoreClient: tokens once and in order, also when the core dies and another takes its place."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from apikit import END_ID, Kit, kit, run, until

from holdfast.api.client import AwaitedGeneration
from holdfast.api.schema import Resolved, SamplingParams
from holdfast.errors import EngineFault, NotReady, QueueFull, RequestError
from holdfast.wire.messages import Accepted, End, Ended, Refused

PROMPT = np.array([5, 6, 7], "<i4").tobytes()


def resolved(k: Kit, **fields: object) -> Resolved:
    return SamplingParams(**fields).resolve(k.limits, prompt_tokens=3, end_ids=(END_ID,))


async def collect(generation: AwaitedGeneration, count: int) -> list[int | None]:
    """The next `count` tokens of choice 0."""
    found: list[int | None] = []
    while len(found) < count:
        found += [event.token for event in await generation.next()]
    return found


async def started(k: Kit, tokens: int, **fields: object) -> tuple[AwaitedGeneration, int]:
    """A generation that has had `tokens` tokens, 100, 101, ...; and its id at the core."""
    k.core.held = True
    k.core.answer = lambda s, c: ([], int(End.NONE))
    generation = await k.client.submit(PROMPT, resolved(k, **fields))
    request_id = generation.choices[0].id
    k.core.batch([(request_id, index, 100 + index, 0) for index in range(tokens)])
    assert await collect(generation, tokens) == [100 + index for index in range(tokens)]
    return generation, request_id


@run
async def test_a_repeated_index_is_dropped_and_a_gap_fails_the_request() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 2)
        k.core.batch([(request_id, 1, 101, 0), (request_id, 2, 102, 0), (request_id, 2, 102, 0)])
        assert await collect(generation, 1) == [102]
        k.core.batch([(request_id, 4, 104, 0)])
        with pytest.raises(EngineFault, match="token 4 where 3 was due"):
            await generation.next()
        await until(lambda: k.core.cancels == [request_id])
        assert k.board.total("token_gaps_total") == 1


@run
async def test_a_stream_continues_over_a_new_core_with_each_token_once() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 3)
        k.core.close()
        await until(lambda: not k.client.ready)
        with pytest.raises(NotReady):
            await k.client.submit(PROMPT, resolved(k))
        core = k.new_core()
        # A step that the core ran before it read our Resume: it is sent again with the answer.
        core.batch([(request_id, 4, 104, 0)])
        await until(lambda: core.resumes == [(request_id, 3)])
        core.batch([(request_id, 3, 103, 0), (request_id, 4, 104, 0)])
        core.batch([(request_id, 5, 105, int(End.STOP))])
        assert await collect(generation, 3) == [103, 104, 105]
        assert generation.live == 0
        generation.close()
        assert core.cancels == []


@run
async def test_what_the_new_core_forgot_is_submitted_with_its_tokens_as_prompt() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 3, max_tokens=10, min_tokens=4)
        k.core.close()
        core = k.new_core()
        core.held = True
        await until(lambda: bool(core.resumes))
        core.send(Refused((request_id,), 0, "not known"))
        await until(lambda: bool(core.submits))
        submit = core.submits[0]
        assert submit.ids == (request_id,)
        assert list(memoryview(submit.prompt).cast("i")) == [5, 6, 7, 100, 101, 102]
        assert (submit.max_tokens, submit.sampling.min_tokens) == (7, 1)
        assert submit.seeds == generation.resolved.seeds
        core.batch([(request_id, 0, 103, 0), (request_id, 1, 104, int(End.LENGTH))])
        assert await collect(generation, 2) == [103, 104]


@run
async def test_a_forgotten_request_with_output_penalties_fails_instead_of_drifting() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 2, presence_penalty=1.0)
        k.core.close()
        core = k.new_core()
        await until(lambda: bool(core.resumes))
        core.send(Refused((request_id,), 0, "not known"))
        with pytest.raises(EngineFault, match="penalties"):
            await generation.next()


@run
async def test_a_forgotten_request_that_had_all_its_tokens_ends_with_length() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 2, max_tokens=2)
        k.core.close()
        core = k.new_core()
        await until(lambda: bool(core.resumes))
        core.send(Refused((request_id,), 0, "not known"))
        (event,) = await generation.next()
        assert (event.token, event.end) == (None, End.LENGTH)
        assert core.submits == []


@run
async def test_a_late_end_completes_an_answer_and_one_with_missing_tokens_fails_it() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 2)
        k.core.send(Ended(request_id, int(End.LENGTH), "", 2, 0))
        (event,) = await generation.next()
        assert (event.token, event.end) == (None, End.LENGTH)
        generation, request_id = await started(k, 2)
        k.core.send(Ended(request_id, int(End.LENGTH), "", 3, 0))
        with pytest.raises(EngineFault, match="after 3 tokens, 2 arrived"):
            await generation.next()


@run
async def test_an_unanswered_submit_is_sent_again_under_the_same_ids() -> None:
    async with kit() as k:
        k.core.accepting = False
        task = asyncio.create_task(k.client.submit(PROMPT, resolved(k, n=2)))
        await until(lambda: bool(k.core.submits))
        ids = k.core.submits[0].ids
        k.core.close()
        core = k.new_core()
        await until(lambda: bool(core.submits))
        assert core.submits[0].ids == ids
        assert core.resumes == []
        await task


@run
async def test_refused_after_it_was_accepted_is_our_fault_not_the_clients() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 1)
        k.core.send(Refused((request_id,), 429, "full", None, "queue_full", 5.0))
        with pytest.raises(EngineFault):
            await generation.next()


@run
async def test_a_core_that_does_not_answer_or_come_back_is_given_up() -> None:
    async with kit(client_options={"accept_timeout_s": 0.1, "resume_timeout_s": 0.1}) as k:
        k.core.accepting = False
        with pytest.raises(NotReady, match="did not answer"):
            await k.client.submit(PROMPT, resolved(k))
        k.core.accepting = True
        generation, _ = await started(k, 1)
        k.core.close()
        with pytest.raises(NotReady):
            await generation.next()
        assert k.client.open == 0


@run
async def test_tokens_of_a_request_that_the_core_should_have_dropped_are_cancelled_again() -> None:
    async with kit() as k:
        generation, request_id = await started(k, 1)
        generation.cancel("disconnect")
        await until(lambda: k.core.cancels == [request_id])
        k.core.batch([(request_id, 1, 101, 0)])  # Late, and expected.
        core = k.new_core()
        core.batch([(request_id, 2, 102, 0)])  # A core that never saw the Cancel.
        core.batch([(request_id, 3, 103, 0)])
        await until(lambda: core.cancels == [request_id])
        k.core.send(Accepted((1,)))  # Of nobody: ignored.
        fresh, _ = await started(k, 1)
        fresh.close()
        assert core.cancels == [request_id] or core.cancels[0] == request_id


@run
async def test_a_core_that_talks_nonsense_loses_its_link() -> None:
    async with kit() as k:
        generation, _ = await started(k, 1)
        k.core.link.send(4, b"nonsense")
        await until(lambda: not k.client.ready)
        core = k.new_core()
        await until(lambda: bool(core.resumes))
        generation.close()


@run
async def test_open_requests_are_bounded_by_the_cores_own_bound() -> None:
    from apikit import VOCAB

    from holdfast.config import Limits

    limits = Limits(vocab_size=VOCAB, context_tokens=256, queue_requests=1, rows_max=1)
    async with kit(limits=limits) as k:
        await started(k, 1)
        await started(k, 1)
        with pytest.raises(QueueFull):
            k.client.start(PROMPT, resolved(k))


@run
async def test_closing_the_client_fails_what_is_open() -> None:
    async with kit() as k:
        generation, _ = await started(k, 1)
        k.client.close()
        with pytest.raises(RequestError, match="shutting down"):
            await generation.next()
