"""Session without a loop: what it says to the core, and what it gives up, at times told to it."""

from __future__ import annotations

import numpy as np

from holdfast.api.generation import Generation
from holdfast.api.schema import Resolved, SamplingParams
from holdfast.api.session import Session
from holdfast.config import Limits
from holdfast.core.metrics import Metrics
from holdfast.wire.link import Kind
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Ended,
    Resume,
    Submit,
    ToCore,
    TokenBatch,
    decode_to_core,
    encode,
)

LIMITS = Limits(vocab_size=600, context_tokens=256)
PROMPT = np.array([5, 6, 7], "<i4").tobytes()


def resolved(**fields: object) -> Resolved:
    return SamplingParams(**fields).resolve(LIMITS, prompt_tokens=3, end_ids=())


def batch(request: int, indexes: range, *, step: int) -> bytes:
    count = len(indexes)
    return TokenBatch(
        step=step,
        requests=np.full(count, request, np.uint64),
        indexes=np.array(indexes, np.int32),
        tokens=np.array(indexes, np.int32) + 100,
        ends=np.zeros(count, np.uint8),
        cached=np.zeros(count, np.int32),
    ).encode()


class Bench:
    """A session, and what it said to the core of the moment."""

    def __init__(self, **options: object) -> None:
        self.session = Session(LIMITS, Metrics.private(), first_id=1, **options)
        self.new_core()

    def new_core(self) -> None:
        self.said: list[ToCore] = []
        self.session.link_up(lambda payload: self.said.append(decode_to_core(payload)), 0.0)

    def started(self) -> Generation:
        generation = self.session.start(PROMPT, resolved(), "", 0.0)
        ids = tuple(choice.id for choice in generation.choices)
        self.session.receive(Kind.MESSAGE, encode(Accepted(ids)), 0.0)
        return generation


def test_what_was_given_up_while_there_was_no_core_is_cancelled_at_the_next():
    b = Bench()
    before, during, kept = b.started(), b.started(), b.started()
    before.cancel("disconnect")
    b.session.link_lost("it died", 1.0)
    during.cancel("disconnect")
    b.new_core()
    assert b.said == [
        Cancel((before.choices[0].id, during.choices[0].id)),
        Resume(((kept.choices[0].id, 0),)),
    ]


def test_ids_count_up_from_the_first_and_are_not_given_out_twice():
    b = Bench()
    for _ in range(3):
        b.session.start(PROMPT, resolved(n=2), "", 0.0)
    ids = [submit.ids for submit in b.said if isinstance(submit, Submit)]
    assert ids == [(1, 2), (3, 4), (5, 6)]


def test_tokens_that_answer_a_resume_do_not_make_a_reader_slow_and_live_ones_do():
    b = Bench(buffer_tokens=4)
    generation = b.started()
    request = generation.choices[0].id
    b.new_core()
    b.session.receive(Kind.TOKENS, batch(request, range(10), step=0), 0.0)
    b.session.receive(Kind.TOKENS, batch(request, range(10, 14), step=3), 0.0)
    assert (generation.unread, generation.cancelled) == (14, None)
    b.session.receive(Kind.TOKENS, batch(request, range(14, 15), step=4), 0.0)
    assert (generation.unread, generation.cancelled) == (14, "slow_reader")


def test_a_write_that_waits_is_broken_though_its_generation_has_failed():
    b = Bench(write_timeout_s=2.0)
    stuck, left = b.started(), b.started()
    broken = []
    for generation in (stuck, left):
        generation.abort = lambda generation=generation: broken.append(generation)
        generation.writing_s = 1.0
        request = generation.choices[0].id
        ended = Ended(request, int(End.NOT_FINITE), "not finite", 0, 0)
        b.session.receive(Kind.MESSAGE, encode(ended), 1.5)
    left.leave(2.0)
    b.session.sweep(2.9)
    assert broken == []
    b.session.sweep(3.1)
    assert broken == [stuck]
    assert stuck.cancelled == "slow_reader"
