"""A load client in a process of its own: many streaming requests over plain sockets, counted.

    python -m holdfast.bench.load HOST PORT STREAMS SECONDS      prints one JSON object

It opens STREAMS connections, asks each for one endless chat stream, waits until all have begun,
then counts server-sent events for SECONDS. It parses nothing of the events: the client must not be
what is measured. Fails loudly when a connection is refused, ends, or stays silent.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

START_TIMEOUT_S = 60.0
SILENCE_S = 10.0
_READ_BYTES = 1 << 18
_EVENT = b"data: "


def request_bytes(host: str, *, model: str, max_tokens: int, prompt: str = "Go on.") -> bytes:
    """One POST of a streaming chat request, as bytes for a socket."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Stream:
    """One connection and how many events it has brought; an event cut by a read is not lost."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.sock = socket.create_connection(address, timeout=START_TIMEOUT_S)
        self.sock.sendall(request)
        self.sock.setblocking(False)
        self.events = 0
        self.bytes = 0
        self._tail = b""

    def read(self) -> None:
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise RuntimeError(f"a stream ended after {self.events} events: {self._tail!r}")
        if not self.events and not self.bytes and b" 200 " not in data[:32]:
            raise RuntimeError(f"the server says {data[:300]!r}")
        self.bytes += len(data)
        joined = self._tail + data
        self.events += joined.count(_EVENT)
        # The longest beginning of an event mark that the next read could complete.
        self._tail = joined[-(len(_EVENT) - 1) :]


def measure(host: str, port: int, streams: int, seconds: float, request: bytes) -> dict[str, float]:
    selector = selectors.DefaultSelector()
    opened = [Stream((host, port), request) for _ in range(streams)]
    for stream in opened:
        selector.register(stream.sock, selectors.EVENT_READ, stream)
    _read_until(selector, lambda: all(stream.events for stream in opened), START_TIMEOUT_S)
    before = [(stream.events, stream.bytes) for stream in opened]
    start = time.perf_counter()
    _read_until(selector, lambda: time.perf_counter() - start >= seconds, seconds + SILENCE_S)
    spent = time.perf_counter() - start
    events = [stream.events - old for stream, (old, _) in zip(opened, before, strict=True)]
    sizes = [stream.bytes - old for stream, (_, old) in zip(opened, before, strict=True)]
    for stream in opened:
        stream.sock.close()
    return {
        "seconds": spent,
        "events": sum(events),
        "events_per_s": sum(events) / spent,
        "bytes_per_event": sum(sizes) / max(1, sum(events)),
        "slowest_stream_events": min(events),
    }


def _read_until(selector: selectors.BaseSelector, done, timeout_s: float) -> None:
    """Read what comes until `done()`. Raises RuntimeError at the deadline or after a silence."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not done within {timeout_s} s")
        ready = selector.select(min(SILENCE_S, timeout_s))
        if not ready:
            raise RuntimeError(f"no stream said anything for {SILENCE_S} s")
        for key, _ in ready:
            key.data.read()


def main(arguments: list[str]) -> None:
    host, port, streams, seconds, model, max_tokens = arguments
    request = request_bytes(host, model=model, max_tokens=int(max_tokens))
    print(json.dumps(measure(host, int(port), int(streams), float(seconds), request)))


if __name__ == "__main__":
    main(sys.argv[1:])
