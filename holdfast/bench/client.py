"""The load client of `bench serve`, in a process of its own: closed loop, token ids, streamed.

    python -m holdfast.bench.client JOB.json          prints one JSON object

JOB: {"host", "port", "path", "model", "prompts": [[id, ...], ...], "output_tokens", "concurrency",
"timeout_s"}. Points at any server with OpenAI's /v1/completions, so that a peer meets the same
client.

What it measures is what `vllm bench serve` measures: `concurrency` requests are open at any time
until all prompts were sent once; a request's clock starts when it is written; TTFT ends at its
first event with text; ITL are the gaps between its events with text, of all requests together; the
output rate is all output tokens, by the server's own count, through the time from the first request
to the last byte. Percentiles are numpy's. One request goes ahead and counts for nothing.

Speed: uvloop, httptools' parser in C, one regular expression an event, JSON of the last event
alone; requests are serialised before the clock starts.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import uvloop

# An event with text, however the server spaces its JSON; an empty text is no token (our own last
# event, which says the reason only).
_TEXT = re.compile(rb'"text":\s*"(?!")')
_USAGE = re.compile(rb'"usage":\s*\{')
_ERROR = re.compile(rb'^data: \{"error"')
_EVENT_END = b"\n\n"


@dataclass(slots=True)
class Timing:
    """One request. Seconds of the performance counter; `gaps_s`: between its events."""

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    events: int = 0
    output_tokens: int | None = None
    gaps_s: array = field(default_factory=lambda: array("d"))


class Connection(asyncio.Protocol):
    """One connection, one request at a time, kept alive between them."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._timing: Timing | None = None
        self._done: asyncio.Future[Timing] | None = None
        self._tail = b""
        self._now_s = 0.0
        self._parser = httptools.HttpResponseParser(self)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> asyncio.Future[Timing]:
        """Send it; the future has its timing, or the ConnectionError it failed with."""
        assert self._done is None, "one request at a time"
        assert self._transport is not None, "not connected"
        self._done = asyncio.get_running_loop().create_future()
        self._tail = b""
        self._timing = Timing(time.perf_counter())
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is an asyncio.Transport in all but its class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(f"the server closed the connection: {error or 'end of file'}")

    # --- httptools' side ---

    def on_message_begin(self) -> None:
        self._tail = b""

    def on_body(self, body: bytes) -> None:
        timing = self._timing
        if timing is None:
            return
        *events, self._tail = (self._tail + body).split(_EVENT_END)
        for event in events:
            if _TEXT.search(event):
                now_s = self._now_s
                if timing.events:
                    timing.gaps_s.append(now_s - timing.last_s)
                else:
                    timing.first_s = now_s
                timing.last_s = now_s
                timing.events += 1
            elif _USAGE.search(event):
                timing.output_tokens = json.loads(event[6:])["usage"]["completion_tokens"]
            elif _ERROR.search(event):
                self._fail(f"a stream failed: {event[:300]!r}")

    def on_message_complete(self) -> None:
        status, done, timing = self._parser.get_status_code(), self._done, self._timing
        body = self._tail
        if status != 200:
            self._fail(f"the server says {status}: {body[:300]!r}")
            return
        self._timing = self._done = None
        if done is not None and not done.done():
            done.set_result(timing)

    def _fail(self, message: str) -> None:
        done, self._done, self._timing = self._done, None, None
        if done is not None and not done.done():
            done.set_exception(ConnectionError(message))


def request_bytes(job: dict[str, Any], prompt: list[int]) -> bytes:
    """One POST of a streaming completion, as bytes for a socket."""
    body = json.dumps(
        {
            "model": job["model"],
            "prompt": prompt,
            "max_tokens": job["output_tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Send everything; the figures. Raises ConnectionError or TimeoutError."""
    requests = [request_bytes(job, prompt) for prompt in job["prompts"]]
    width = min(job["concurrency"], len(requests))
    async with asyncio.timeout(job["timeout_s"]):
        connections = [await _connect(job) for _ in range(width)]
        try:
            await connections[0].ask(requests[0])
            gc.collect()
            gc.disable()
            cpu_s, started_s = time.process_time(), time.perf_counter()
            waiting = iter(requests)
            timings: list[Timing] = []
            async with asyncio.TaskGroup() as group:
                for connection in connections:
                    group.create_task(_send(job, connection, waiting, timings))
            spent_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        except ExceptionGroup as error:
            raise error.exceptions[0] from None
        finally:
            for connection in connections:
                connection.close()
    return figures(timings, spent_s, job["output_tokens"]) | {"client_cpu_s": cpu_s}


async def _connect(job: dict[str, Any]) -> Connection:
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(Connection, job["host"], job["port"])
    return made


async def _send(
    job: dict[str, Any], connection: Connection, waiting: Iterator[bytes], timings: list[Timing]
) -> None:
    for request in waiting:
        if not connection.usable:
            connection = await _connect(job)
        timings.append(await connection.ask(request))


def figures(timings: list[Timing], seconds: float, output_tokens: int) -> dict[str, Any]:
    """All requests together; times in ms. Raises ConnectionError for one that was cut short."""
    for timing in timings:
        if timing.output_tokens != output_tokens or not timing.events:
            raise ConnectionError(
                f"a request gave {timing.output_tokens} tokens in {timing.events} events, "
                f"not {output_tokens}"
            )
    first_ms = np.array([timing.first_s - timing.sent_s for timing in timings]) * 1e3
    gaps_ms = np.concatenate([np.frombuffer(timing.gaps_s) for timing in timings]) * 1e3
    tokens = output_tokens * len(timings)
    return {
        "seconds": seconds,
        "requests": len(timings),
        "output_tokens": tokens,
        "events": sum(timing.events for timing in timings),
        "output_rate": tokens / seconds,
        "ttft_mean_ms": float(first_ms.mean()),
        "ttft_p99_ms": float(np.percentile(first_ms, 99)),
        "itl_mean_ms": float(gaps_ms.mean()) if gaps_ms.size else 0.0,
        "itl_p99_ms": float(np.percentile(gaps_ms, 99)) if gaps_ms.size else 0.0,
    }


def main(arguments: list[str]) -> int:
    job = json.loads(Path(arguments[0]).read_text())
    try:
        found = uvloop.run(run(job))
    except TimeoutError:
        found = {"error": f"not done within {job['timeout_s']:g} s"}
    except OSError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
