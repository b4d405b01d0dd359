"""Stream: one streaming completion over a plain socket, and what its client saw of it.

Every token is kept with the moment it arrived, and the end with its reason, since a drill judges
both. One connection a request, so that the kernel spreads requests over api processes. It knows
HTTP as far as this needs it: a status, headers, a chunked body of server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from holdfast.drill.job import Job

# Of a whole stream; far above any answer of a drill, so that a hang is a failure and not a wait.
STREAM_S_MAX = 240.0
_LINE_BYTES = 1 << 20
_BROKEN = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)


@dataclass(slots=True)
class Stream:
    """`tokens` and `times` (monotonic seconds) as they came. ended: None while it runs, then
    `length`, `stop`, an error's code, `status <code>` or `reset` (the connection broke)."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: str | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    cached_tokens: int | None = None
    cancelled: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        """It ended as it should, with every token."""
        return self.ended == "length" and len(self.tokens) == self.job.max_tokens

    def start(self, address: tuple[str, int], model: str) -> None:
        """Ask, in a task of the running loop."""
        self.task = asyncio.get_running_loop().create_task(self._run(address, model))

    async def finish(self) -> None:
        if self.task is not None:
            await self.task

    async def cancel(self) -> None:
        """Hang up, as a client that has lost interest."""
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task

    async def _run(self, address: tuple[str, int], model: str) -> None:
        try:
            async with asyncio.timeout(STREAM_S_MAX):
                reader, writer = await asyncio.open_connection(*address, limit=_LINE_BYTES)
                try:
                    writer.write(request_bytes(self.job, model))
                    await writer.drain()
                    await self._read(reader)
                finally:
                    writer.close()
                    with contextlib.suppress(*_BROKEN):
                        await writer.wait_closed()
        except TimeoutError:
            self.ended = self.ended or f"silent for {STREAM_S_MAX:g} s"
        except _BROKEN:
            self.ended = self.ended or "reset"

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(head[0].split()[1])
        pairs = (line.partition(":") for line in head[1:] if line)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        if self.status != 200:
            size = int(self.headers.get("content-length", "0"))
            body = await reader.readexactly(size)
            self.error = json.loads(body)["error"]
            self.ended = f"status {self.status}"
            return
        waiting = b""
        while size := int(await reader.readline(), 16):
            waiting += (await reader.readexactly(size + 2))[:-2]
            *events, waiting = waiting.split(b"\n\n")
            now_s = time.monotonic()
            for event in events:
                if event.startswith(b"data: {"):
                    self._heard(json.loads(event[6:]), now_s)
        if self.ended is None:
            self.ended = "cut off"

    def _heard(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            self.error = event["error"]
            self.ended = str(self.error.get("code") or self.error.get("type"))
            return
        if usage := event.get("usage"):
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        for choice in event["choices"]:
            for name in (choice.get("logprobs") or {}).get("tokens", ()):
                self.tokens.append(int(name.removeprefix("token_id:")))
                self.times.append(now_s)
            self.ended = choice.get("finish_reason") or self.ended


def request_bytes(job: Job, model: str) -> bytes:
    """The whole HTTP request."""
    body = json.dumps(job.body(model)).encode()
    key = f"Authorization: Bearer {job.key}\r\n" if job.key else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: drill\r\nConnection: close\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
