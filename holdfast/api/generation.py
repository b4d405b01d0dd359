"""Generation: one Submit's choices on their way from the core to one client.

Owned by api.client, which feeds it; read by exactly one coroutine, which calls `next` until every
choice has ended. Invariants: each choice's tokens are delivered in order, each index once; the
buffer is bounded, and what is over it ends the generation; after `cancel` nothing is delivered.
Knows token ids, not text.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import NamedTuple

from holdfast.api.schema import Resolved
from holdfast.errors import DeadlineExceeded, EngineFault, NotReady, RequestError
from holdfast.wire.messages import End


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
        loop: asyncio.AbstractEventLoop,
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
        self.silent_s = now_s
        """When the client last got a byte: keep-alives count from here."""
        self.writing_s: float | None = None
        """Since when a write to the client has been waiting for it to read."""
        self.abort: Callable[[], None] | None = None
        """Breaks a write that waits: set by the writer, called once the write timeout passed."""
        self._release = release
        self._finish = finish
        self._buffer_tokens = buffer_tokens * len(ids)
        self._events: list[Token] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop = loop

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.seen) for choice in self.choices)

    async def accept(self) -> None:
        """Wait until the core has taken the request, or until it is cancelled.

        Raises the RequestError that refused it.
        """
        while not self.accepted and self.cancelled is None:
            self._raise()
            await self._wait()
        self._raise()

    async def next(self) -> list[Token]:
        """What has arrived, at least one token; empty when a keep-alive is due, or when cancelled.

        Raises RequestError when the generation failed, once what came before it was delivered.
        """
        if not self._events:
            self._raise()
            if self.cancelled is None:
                await self._wait()
                if not self._events:
                    self._raise()
        events, self._events = self._events, []
        return events

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

    def close(self) -> None:
        """The reader is done, for whatever reason; what still runs is cancelled."""
        if self.live:
            self.cancel("disconnect")
        elif not self.released:
            self._release(self, None)

    # --- for api.client ---

    def feed(self, event: Token) -> bool:
        """Deliver a token; False when the buffer is full: the reader is too slow."""
        if len(self._events) >= self._buffer_tokens:
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

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        assert self._waiter is None, "two readers of one generation"
        self._waiter = self._loop.create_future()
        try:
            # Bounded: api.client looks at every generation's deadlines several times a second.
            await self._waiter
        finally:
            self._waiter = None

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def error_of(end: int, message: str) -> RequestError | None:
    """The error that an end is for its client; None for the ends that are answers."""
    if end in (End.STOP, End.LENGTH):
        return None
    if end == End.DEADLINE:
        return DeadlineExceeded(message or "the request's deadline passed")
    if end == End.NOT_FINITE:
        return EngineFault(message, code="not_finite")
    if end == End.SHUTDOWN:
        error = NotReady(message or "the server is shutting down", code="shutdown")
        error.retry_after_s = 5.0
        return error
    return EngineFault(message or "the engine could not finish this request")
