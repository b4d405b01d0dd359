"""Exchange: one HTTP generation from its admission to its last byte, streamed or whole.

An ASGI response. Owns the order of things: the core's answer is awaited before any header is sent,
so that every refusal, and a deadline before the first token, has its HTTP status; after the first
byte an error is an SSE event. A client that disconnects or does not read is cancelled at once. One
write a step and stream, whatever the number of choices that moved.

Made by api.app after validation; knows no JSON shapes (api.format) and no links (api.client).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from holdfast.api.client import AwaitedGeneration, CoreClient
from holdfast.api.format import (
    DONE,
    KEEPALIVE,
    Answer,
    Format,
    Usage,
    error_event,
)
from holdfast.api.generation import Token
from holdfast.api.output import TokenLogprob
from holdfast.api.schema import Resolved
from holdfast.api.text import Tokenizer
from holdfast.api.transcript import Transcript
from holdfast.errors import RequestError

# scope["extensions"] entry of proc.api's server: drops a connection whose client does not read.
ABORT_EXTENSION = "holdfast.abort"
# Prompts of one body that wait to be merged into its stream; each has a buffer of its own besides.
_MERGE_EVENTS = 64
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    resolved: Resolved


class _Choice:
    """What one choice of one prompt has told its client. `logprobs`: None when not asked for."""

    __slots__ = ("index", "logprobs", "opened", "reason", "texts")

    def __init__(self, index: int, want_logprobs: bool) -> None:
        self.index = index
        self.reason: str | None = None
        self.opened = False
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] | None = [] if want_logprobs else None


class Exchange(Response):
    """`prompts`: one admission each; choice i of prompt j has index j * n + i."""

    def __init__(
        self,
        client: CoreClient,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        form: Format,
        *,
        tenant: str,
        stream: bool,
        include_usage: bool,
        want_logprobs: bool,
    ) -> None:
        # Not Response.__init__: there is no body to be measured yet.
        self.status_code = 200
        self.background = None
        self._client = client
        self._prompts = prompts
        self._format = form
        self._tenant = tenant
        self._stream = stream
        self._include_usage = include_usage
        self._generations: list[AwaitedGeneration] = []
        self._transcripts = [
            Transcript(tokenizer, prompt.ids, prompt.resolved) for prompt in prompts
        ]
        self._choices = [
            [
                _Choice(at * prompt.resolved.choices + choice, want_logprobs)
                for choice in range(prompt.resolved.choices)
            ]
            for at, prompt in enumerate(prompts)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        stalled = self._abort(scope)
        try:
            for prompt in self._prompts:
                data = np.array(prompt.ids, "<i4").tobytes()
                generation = self._client.start(data, prompt.resolved, self._tenant)
                generation.abort = stalled
                self._generations.append(generation)
            for generation in self._generations:
                await generation.accept()
            if self._stream:
                await self._write_stream(send)
            else:
                await self._write_whole(send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not any(g.cancelled == "slow_reader" for g in self._generations):
                raise
            task.uncancel()  # Ours, to break a write on a server that cannot drop a connection.
        finally:
            watcher.cancel()
            for generation in self._generations:
                generation.close()

    @property
    def _left(self) -> int:
        """Choices that are not over."""
        return sum(transcript.left for transcript in self._transcripts)

    @property
    def _cancelled(self) -> bool:
        return any(generation.cancelled is not None for generation in self._generations)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for generation in self._generations:
            generation.cancel("disconnect")

    @staticmethod
    def _abort(scope: Scope):
        """What breaks a write that waits for the client to read."""
        abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
        if abort is not None:
            return abort
        task = asyncio.current_task()
        return task.cancel if task is not None else None

    # --- tokens to text ---

    async def _events(self) -> AsyncIterator[tuple[int, list[Token]]]:
        """(prompt, tokens that arrived), until every choice has ended or somebody cancelled.

        An empty list is a keep-alive that is due. Raises RequestError when a generation failed.
        """
        if len(self._generations) == 1:
            only = self._generations[0]
            while self._left:
                events = await only.next()
                if only.cancelled is not None:
                    return
                yield 0, events
            return
        async with aclosing(self._merged()) as merged:
            async for at, events in merged:
                yield at, events

    async def _merged(self) -> AsyncIterator[tuple[int, list[Token]]]:
        queue: asyncio.Queue[tuple[int, list[Token] | RequestError]]
        queue = asyncio.Queue(_MERGE_EVENTS)

        async def pump(at: int, generation: AwaitedGeneration) -> None:
            try:
                while generation.cancelled is None and self._transcripts[at].left:
                    await queue.put((at, await generation.next()))
            except RequestError as error:
                await queue.put((at, error))

        tasks = [
            asyncio.create_task(pump(at, generation))
            for at, generation in enumerate(self._generations)
        ]
        try:
            while self._left and not self._cancelled:
                # Bounded: the sweep wakes every generation, hence every pump, for its keep-alive.
                at, found = await queue.get()
                if isinstance(found, RequestError):
                    raise found
                yield at, found
        finally:
            for task in tasks:
                task.cancel()

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in self._prompts),
            completion_tokens=sum(transcript.tokens for transcript in self._transcripts),
            cached_tokens=sum(generation.cached_tokens for generation in self._generations),
        )

    # --- to the client ---

    async def _write_whole(self, send: Send) -> None:
        async with aclosing(self._events()) as arriving:
            async for at, events in arriving:
                for shown in self._transcripts[at].take(self._generations[at], events):
                    choice = self._choices[at][shown.choice]
                    choice.texts.append(shown.text)
                    choice.reason = shown.reason
                    if choice.logprobs is not None:
                        choice.logprobs += shown.logprobs
        if self._cancelled:
            return
        answers = [
            Answer(choice.index, "".join(choice.texts), choice.reason or "stop", choice.logprobs)
            for group in self._choices
            for choice in group
        ]
        body = self._format.whole(answers, self._usage())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, body, more=False)

    async def _write_stream(self, send: Send) -> None:
        """Chunks as they come. Errors before the first of them are raised, and get a status."""
        started = False
        try:
            async with aclosing(self._events()) as arriving:
                async for at, events in arriving:
                    if events:
                        data = self._chunks(at, events)
                    elif started and self._silent():
                        data = KEEPALIVE
                    else:
                        continue
                    if not started:
                        started = True
                        head = {"type": "http.response.start", "status": 200}
                        await send({**head, "headers": _SSE_HEADERS})
                    if data:
                        await self._send(send, data)
        except RequestError as error:
            if not started:
                raise
            await self._send(send, error_event(error) + DONE, more=False)
            return
        if self._cancelled:
            return
        usage = self._format.usage(self._usage()) if self._include_usage else b""
        await self._send(send, usage + DONE, more=False)

    def _chunks(self, at: int, events: list[Token]) -> bytes:
        form, parts = self._format, []
        for shown in self._transcripts[at].take(self._generations[at], events):
            choice = self._choices[at][shown.choice]
            if not choice.opened:
                choice.opened = True
                parts.append(form.opening(choice.index))
            if shown.text or shown.logprobs:
                parts.append(form.chunk(choice.index, shown.text, shown.logprobs))
            if shown.reason is not None:
                parts.append(form.closing(choice.index, shown.reason))
        return b"".join(parts)

    def _silent(self) -> bool:
        """Whether the client has had no byte for the keep-alive interval."""
        quiet_s = time.monotonic() - max(g.silent_s for g in self._generations)
        return quiet_s >= self._client.keepalive_s

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """One write. Should the client not read, the sweep breaks it after the write timeout."""
        before_s = time.monotonic()
        for generation in self._generations:
            generation.writing_s = before_s
        await send({"type": "http.response.body", "body": data, "more_body": more})
        after_s = time.monotonic()
        for generation in self._generations:
            generation.writing_s = None
            generation.silent_s = after_s
