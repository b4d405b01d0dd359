"""CoreClient: the asyncio end of an api process's link to the core.

Owns the link, its registration with the event loop, and the timer of the sweep; api.session decides
everything else. Used by api.stream and proc.api on one event loop; knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from holdfast.api.generation import Generation, Token
from holdfast.api.schema import Resolved
from holdfast.api.session import Session
from holdfast.config import Limits
from holdfast.core.metrics import Metrics
from holdfast.errors import LinkError
from holdfast.wire.link import Kind, Link


class AwaitedGeneration(Generation):
    """A Generation whose one reader is a coroutine. To be made on the reader's event loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    async def accept(self) -> None:
        """Wait until the core has taken the request, or until it is cancelled.

        Raises the RequestError that refused it.
        """
        while not self.accepted and self.cancelled is None:
            self.check()
            await self._wait()
        self.check()

    async def next(self) -> list[Token]:
        """What has arrived, at least one token; empty when a keep-alive is due, or when cancelled.

        Raises RequestError when the generation failed, once what came before it was delivered.
        """
        if not self.unread and self.error is None and self.cancelled is None:
            await self._wait()
        return self.take()

    def close(self) -> None:
        """The reader is done, for whatever reason; what still runs is cancelled."""
        self.leave(time.monotonic())

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        assert self._waiter is None, "two readers of one generation"
        self._waiter = self._loop.create_future()
        try:
            # Bounded: the session looks at every generation's deadlines several times a second.
            await self._waiter
        finally:
            self._waiter = None


class CoreClient:
    """`options`: those of Session. To be made on the event loop that it will serve."""

    def __init__(self, limits: Limits, metrics: Metrics, **options: Any) -> None:
        self.limits = limits
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._writing = False
        self.session = Session(limits, metrics, make=AwaitedGeneration, **options)
        self.keepalive_s = self.session.keepalive_s
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep()

    @property
    def ready(self) -> bool:
        """Whether the core can step."""
        return self.session.ready

    @property
    def detail(self) -> str:
        """Why it is not ready, in one line for people."""
        return self.session.detail

    @property
    def open(self) -> int:
        """Generations not released."""
        return len(self.session.generations)

    # --- for requests ---

    async def submit(
        self, prompt: bytes, resolved: Resolved, tenant: str = ""
    ) -> AwaitedGeneration:
        """Admit one prompt (int32 ids as bytes) with all its choices.

        Returns once the core has accepted it; its reader must `close` it. Raises RequestError:
        what the core refused it with, NotReady when there is no core or it does not answer.
        """
        generation = self.start(prompt, resolved, tenant)
        try:
            await generation.accept()
        except BaseException:
            generation.close()
            raise
        return generation

    def start(self, prompt: bytes, resolved: Resolved, tenant: str = "") -> AwaitedGeneration:
        """As `submit`, but returns before the core has answered: its `accept` waits."""
        generation = self.session.start(prompt, resolved, tenant, time.monotonic())
        assert isinstance(generation, AwaitedGeneration)
        return generation

    def drain(self) -> None:
        """Refuse new requests; what is open goes on."""
        self.session.drain()

    def close(self) -> None:
        """The process ends: every generation fails, the link closes, no timer is left."""
        self.session.shut()
        self._unlink()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _sweep(self) -> None:
        self.session.sweep(time.monotonic())
        self._sweeper = self._loop.call_later(self.session.sweep_s, self._sweep)

    # --- the link ---

    def set_link(self, link: Link) -> None:
        """A link to a core, the first one or a new core's: resume over it what is open."""
        self._unlink()
        self._link = link
        self._loop.add_reader(link.fileno(), self._readable)
        self.session.link_up(self._send, time.monotonic())

    def lose_link(self, detail: str) -> None:
        """The core is gone: hold what is open until `set_link`, refuse what comes."""
        if self._link is None:
            return
        self._unlink()
        self.session.link_lost(detail, time.monotonic())

    def _unlink(self) -> None:
        if self._link is None:
            return
        fd = self._link.fileno()
        self._loop.remove_reader(fd)
        if self._writing:
            self._loop.remove_writer(fd)
            self._writing = False
        self._link.close()
        self._link = None

    def _send(self, payload: bytes) -> None:
        link = self._link
        assert link is not None, "the session sends without a link"
        try:
            link.send(Kind.MESSAGE, payload)
        except LinkError as error:
            self.lose_link(str(error))
            return
        if link.unsent_bytes and not self._writing:
            self._writing = True
            self._loop.add_writer(link.fileno(), self._writable)

    def _writable(self) -> None:
        assert self._link is not None, "writable without a link"
        try:
            if self._link.flush():
                self._loop.remove_writer(self._link.fileno())
                self._writing = False
        except LinkError as error:
            self.lose_link(str(error))

    def _readable(self) -> None:
        assert self._link is not None, "readable without a link"
        link = self._link
        try:
            for kind, payload in link.drain():
                self.session.receive(kind, payload, time.monotonic())
                if self._link is not link:
                    return  # Answering one of them broke the link.
        except (LinkError, msgspec.DecodeError) as error:
            self.lose_link(str(error))
