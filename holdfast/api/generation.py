"""Generation: one Submit's choices on their way from the core to one client.

Owned by api.session, which feeds it; read by exactly one reader, which calls `take` whenever `wake`
says that something changed, until every choice has ended. Invariants: each choice's tokens are
delivered in order, each index once; the buffer is bounded, and what is over it ends the generation;
after `cancel` nothing more is buffered. Knows token ids, not text; no clock, and nobody who waits
(api.client has the generation whose reader awaits it).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from holdfast.api.schema import Resolved
from holdfast.errors import RequestError
from holdfast.wire.messages import Submit


class Token(NamedTuple):
    """One token of one choice; `end` is End.NONE (0) unless the choice ended with it.

    token is None for an end that came by itself: the core had counted the last token as the last
    only after it was sent (after a recovery).
    """

    choice: int
    token: int | None
    end: int
    logprob: float | None
    top_ids: list[int]
    top_logprobs: list[float]


class Choice:
    """What the client process knows of one request id.

    base: tokens that were seen before the core forgot the request and it was submitted anew, with
    those tokens as part of its prompt; the core's index 0 is then our index `base`.
    """

    __slots__ = ("base", "ended", "generation", "id", "index", "last_s", "resuming", "seen")

    def __init__(self, generation: Generation, index: int, request_id: int) -> None:
        self.generation = generation
        self.index = index
        self.id = request_id
        self.base = 0
        self.seen = array("i")
        self.ended = False
        self.resuming = False
        self.last_s = 0.0

    def submission(self) -> Submit:
        """What asks for the rest of this choice alone: the tokens seen so far are prompt now."""
        generation, seen = self.generation, len(self.seen)
        resolved, sampling = generation.resolved, generation.resolved.sampling
        return Submit(
            ids=(self.id,),
            prompt=generation.prompt + self.seen.tobytes(),
            seeds=(resolved.seeds[self.index],),
            max_tokens=resolved.max_tokens - seen,
            sampling=msgspec.structs.replace(
                sampling, min_tokens=max(0, sampling.min_tokens - seen)
            ),
            deadline_s=generation.deadline_s,
            tenant=generation.tenant,
            priority=resolved.priority,
        )


class Generation:
    """`prompt`: int32 little-endian ids. Times are monotonic seconds."""

    def __init__(
        self,
        prompt: bytes,
        resolved: Resolved,
        tenant: str,
        ids: list[int],
        *,
        now_s: float,
        release: Callable[[Generation, str | None], None],
        finish: Callable[[Choice], None],
        buffer_tokens: int,
    ) -> None:
        self.prompt = prompt
        self.resolved = resolved
        self.tenant = tenant
        self.choices = [Choice(self, index, request_id) for index, request_id in enumerate(ids)]
        self.started_s = now_s
        self.deadline_s = now_s + resolved.timeout_s
        self.accepted = False
        self.sent_s = now_s
        """When Submit was last sent: the core must answer within a while of it."""
        self.live = len(ids)
        """Choices that the core may still send tokens of."""
        self.first_s: float | None = None
        self.cached_tokens = 0
        """Prompt tokens of choice 0 from the prefix cache; the other choices share its prompt."""
        self.error: RequestError | None = None
        self.cancelled: str | None = None
        self.released = False
        self.left = False
        """Whether the reader has gone, and writes nothing any more."""
        self.done_s = 0.0
        """When its reader left after a complete answer."""
        self.silent_s = now_s
        """When the client last got a byte: keep-alives count from here."""
        self.writing_s: float | None = None
        """Since when a write to the client has been waiting for it to read."""
        self.abort: Callable[[], None] | None = None
        """Breaks a write that waits: set by the writer, called once the write timeout passed."""
        self._release = release
        self._finish = finish
        self.buffer_tokens = buffer_tokens * len(ids)
        self._events: list[Token] = []
        self._room = self.buffer_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.seen) for choice in self.choices)

    def submission(self) -> Submit:
        """What asks the core for all of it."""
        resolved = self.resolved
        return Submit(
            ids=tuple(choice.id for choice in self.choices),
            prompt=self.prompt,
            seeds=resolved.seeds,
            max_tokens=resolved.max_tokens,
            sampling=resolved.sampling,
            deadline_s=self.deadline_s,
            tenant=self.tenant,
            priority=resolved.priority,
        )

    @property
    def unread(self) -> int:
        """Tokens that have arrived and were not taken."""
        return len(self._events)

    def take(self) -> list[Token]:
        """What has arrived since the last call; empty when nothing has.

        Raises RequestError when the generation failed, once what came before it was delivered.
        """
        if not self._events:
            self.check()
        events, self._events = self._events, []
        self._room = self.buffer_tokens
        return events

    def check(self) -> None:
        """Raises the RequestError that the generation failed with."""
        if self.error is not None:
            raise self.error

    def stop(self, choice: int, tokens: int) -> None:
        """A stop string was found: the choice has ended after its first `tokens` tokens."""
        found = self.choices[choice]
        # Later ones may have arrived already; they are void.
        del found.seen[tokens:]
        if not found.ended:
            self._finish(found)
            self.ended(found)

    def cancel(self, reason: str) -> None:
        """Nobody wants it any more: the core frees its pages. Harmless after the end."""
        if self.released:
            return
        self.cancelled = reason
        self._release(self, reason)
        self.wake()

    def leave(self, now_s: float) -> None:
        """The reader is done, for whatever reason; what still runs is cancelled."""
        self.left = True
        if self.live:
            self.cancel("disconnect")
        elif not self.released:
            self.done_s = now_s
            self._release(self, None)

    def wake(self) -> None:
        """Something changed for the reader. Overridden by those whose reader waits."""

    # --- for api.session ---

    def feed(self, event: Token, *, again: bool = False) -> bool:
        """Deliver a token; False when the buffer is full: the reader is too slow.

        again: it was made earlier and comes now, with all the others that were missed; they are no
        more than the request asked for, and say nothing of its reader.
        """
        if again:
            self._room += 1
        if len(self._events) >= self._room:
            return False
        self._events.append(event)
        self.wake()
        return True

    def ended(self, choice: Choice) -> None:
        choice.ended = True
        self.live -= 1

    def fail(self, error: RequestError, reason: str) -> None:
        """The whole generation ends with `error`; `reason` is for the counter."""
        if self.error is None and not self.released:
            self.error = error
            self._release(self, reason)
            self.wake()
