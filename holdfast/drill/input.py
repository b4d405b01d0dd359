"""The drill of hostile input: what no honest client sends, beside streams that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable

from holdfast.drill.drill import Drill
from holdfast.drill.stage import Stage

# A client that is refused hears so within this; a slow one is left hanging no longer.
ANSWER_S = 10.0
_SLOW_S = 1.0
_FLOOD = 200
Address = tuple[str, int]


def _post(body: bytes, *, length: int | None = None, path: str = "/v1/completions") -> bytes:
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


def _ask(**fields: object) -> bytes:
    return _post(json.dumps({"prompt": "x", "max_tokens": 4, **fields}).encode())


# name -> (bytes to send, statuses that are right)
REQUESTS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "no JSON": (_post(b"{"), (400,)),
    "a list": (_post(b"[1, 2]"), (400,)),
    "nothing": (_post(b""), (400,)),
    "bytes that are no UTF-8": (_post(b'{"prompt": "\xff\xfe"}'), (400,)),
    "a lone surrogate": (_post(b'{"prompt": "\\ud800", "max_tokens": 4}'), (400,)),
    "deep nesting": (_post(b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), (400,)),
    "a number of 5,000 digits": (_post(b'{"max_tokens":' + b"9" * 5000 + b"}"), (400,)),
    "NaN": (_post(b'{"prompt": "x", "temperature": NaN}'), (400,)),
    "a body announced too large": (_post(b"x", length=1 << 40), (413,)),
    "an unknown field": (_ask(tempreature=1), (400,)),
    "temperature 1e308": (_ask(temperature=1e308), (400,)),
    "negative max_tokens": (_ask(max_tokens=-1), (400,)),
    "max_tokens of a context no one has": (_ask(max_tokens=1 << 40), (400,)),
    "n of a million": (_ask(n=1_000_000), (400,)),
    "a token id outside the vocabulary": (_ask(prompt=[1 << 31]), (400,)),
    "an empty prompt": (_ask(prompt=[]), (400,)),
    "a thousand prompts": (_ask(prompt=["x"] * 1000), (400,)),
    "logit_bias of infinity": (_post(b'{"prompt": "x", "logit_bias": {"1": 1e999}}'), (400,)),
    "a stop string of a megabyte": (_ask(stop="x" * (1 << 20)), (400,)),
    "a model that is not here": (_ask(model="../../etc/passwd"), (404,)),
    "a prompt longer than any context": (_ask(prompt="word " * 400_000), (400,)),
    "a path out of the tree": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
    "another method": (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
    "no HTTP": (b"\x16\x03\x01\x02\x00 hello\r\n\r\n", (400,)),
    "a drill over HTTP": (_post(b'{"provoke": {}}', path="/provoke"), (404,)),
    "an order in a body": (_ask(provoke={"do": "signal"}), (400,)),
    "a million headers' worth of bytes": (
        b"GET /health HTTP/1.1\r\n" + b"X-Flood: " + b"y" * (1 << 20) + b"\r\n\r\n",
        (400, 431),
    ),
}


async def answer(address: Address, data: bytes) -> int:
    """The status that this server gives to these bytes; 0 when it hangs up or says nothing."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(*address)
            with contextlib.suppress(OSError):
                writer.write(data)
                await writer.drain()
            try:
                head = await reader.readline()
            finally:
                writer.close()
            return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0


async def _slow(address: Address) -> None:
    """A byte at a time, for ever as far as it knows."""
    _, writer = await asyncio.open_connection(*address)
    with contextlib.suppress(OSError):
        for byte in _ask()[: int(_SLOW_S / 0.05)]:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.05)
    writer.close()


async def _half_closed(address: Address) -> None:
    """It asks for a long stream, says that it will send no more, and does not read."""
    _, writer = await asyncio.open_connection(*address)
    writer.write(_ask(stream=True, max_tokens=64, ignore_eos=True))
    await writer.drain()
    writer.write_eof()
    await asyncio.sleep(_SLOW_S)
    writer.close()


async def _silent(address: Address) -> None:
    """It connects, and never says anything."""
    _, writer = await asyncio.open_connection(*address)
    await asyncio.sleep(_SLOW_S)
    writer.close()


async def _cut_off(address: Address) -> None:
    """It promises a body and leaves in the middle."""
    _, writer = await asyncio.open_connection(*address)
    writer.write(_post(b"{", length=1000))
    await writer.drain()
    writer.close()


MANNERS: tuple[Callable[[Address], Awaitable[None]], ...] = (_slow, _half_closed, _silent, _cut_off)


async def hostile_input(stage: Stage) -> None:
    streams = await stage.begin()
    address = stage.server.address
    stage.report.broken = f"{len(REQUESTS)} bad requests, {len(MANNERS)} bad manners, a flood"
    stage.broken_s = time.monotonic()
    manners = [asyncio.create_task(manner(address)) for manner in MANNERS for _ in range(8)]
    for name, (data, right) in REQUESTS.items():
        status = await answer(address, data)
        shown = " or ".join(map(str, right))
        stage.expect("status", status in right, f"{name}: answered {status or 'nothing'}, {shown}")
    bad = REQUESTS["an unknown field"][0]
    flood = await asyncio.gather(*(answer(address, bad) for _ in range(_FLOOD)))
    stage.expect("status", set(flood) == {400}, f"in the flood: {sorted(set(flood))}")
    await asyncio.gather(*manners)
    await stage.finish()
    stage.judge(streams)
    stage.report.pause_s = max(stage.gaps(streams), default=None)
    restarts = stage.moved("process_restarts_total")
    stage.expect("lost", not restarts, f"{restarts:g} processes were restarted")
    failures = stage.moved("http_requests_total", code="500")
    stage.expect("status", not failures, f"{failures:g} answers of 500")
    await stage.judge_home(client_errors=True)


DRILLS = (
    Drill(
        name="hostile-input",
        what="malformed, huge, slow and broken requests; each is told, none is felt",
        play=hostile_input,
        caught="refused before launch",
        ends=0,
    ),
)
