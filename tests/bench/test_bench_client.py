"""The load client: what it counts as an event, where its clocks stand, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from holdfast.bench import client
from holdfast.bench.client import Timing

Write = Callable[[bytes], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str | None, **more: object) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


USAGE = event(None, usage={"completion_tokens": 3})
END = chunk(USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def load(serve: Callable[[dict, Write], Awaitable[None]], **changes: object) -> dict:
    """The client's figures against a server that answers each request by `serve`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await serve(json.loads(await reader.readexactly(size)), write)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def main() -> dict:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        job = {
            "host": "127.0.0.1",
            "port": server.sockets[0].getsockname()[1],
            "path": "/v1/completions",
            "model": "m",
            "prompts": [[1, 2, number] for number in range(6)],
            "output_tokens": 3,
            "concurrency": 2,
            "timeout_s": 20.0,
        }
        async with server:
            return await client.run(job | changes)

    return asyncio.run(main())


def test_every_prompt_is_sent_once_besides_the_first_that_warms_up() -> None:
    seen = []

    async def serve(body: dict, write: Write) -> None:
        seen.append(tuple(body["prompt"]))
        assert body["ignore_eos"] and body["stream"] and body["max_tokens"] == 3
        await write(HEAD + b"".join(chunk(event(f" {n}")) for n in range(3)) + END)

    found = load(serve)
    assert sorted(seen) == sorted([(1, 2, 0), *((1, 2, n) for n in range(6))])
    assert (found["requests"], found["output_tokens"], found["events"]) == (6, 18, 18)
    assert found["output_rate"] == pytest.approx(18 / found["seconds"])


def test_no_more_requests_are_open_than_asked_for() -> None:
    open_now, most = [0], [0]

    async def serve(body: dict, write: Write) -> None:
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        await asyncio.sleep(0.02)
        open_now[0] -= 1
        await write(HEAD + b"".join(chunk(event(f" {n}")) for n in range(3)) + END)

    load(serve, concurrency=3)
    assert most[0] == 3


def test_events_without_text_are_no_tokens_and_a_cut_event_is_not_lost() -> None:
    async def serve(body: dict, write: Write) -> None:
        whole = event("a") + b": keep-alive\n\n" + event('"') + event("c") + event("") + USAGE
        await write(HEAD)
        # Cut anywhere: inside marks, inside JSON, and in chunks that are not events.
        for at in range(0, len(whole), 7):
            await write(chunk(whole[at : at + 7]))
            await asyncio.sleep(0)
        await write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    assert load(serve)["events"] == 18


def test_first_token_and_gaps_are_measured_where_vllm_measures_them() -> None:
    async def serve(body: dict, write: Write) -> None:
        await asyncio.sleep(0.05)
        await write(HEAD + chunk(event("a")))
        for text in "bc":
            await asyncio.sleep(0.02)
            await write(chunk(event(text)))
        await asyncio.sleep(0.2)  # after the last token: in nobody's latency
        await write(END)

    found = load(serve, concurrency=1)
    assert 50 <= found["ttft_mean_ms"] < 200
    assert 20 <= found["itl_mean_ms"] < 150
    assert found["seconds"] >= 6 * 0.29


def test_percentiles_are_over_all_requests_together() -> None:
    one, two = Timing(10.0, first_s=10.1), Timing(20.0, first_s=20.3)
    one.gaps_s.extend([0.01] * 98)
    two.gaps_s.extend([0.03, 0.05])
    for timing in (one, two):
        timing.events, timing.output_tokens = 3, 3
    found = client.figures([one, two], 2.0, 3)
    assert found["ttft_mean_ms"] == pytest.approx(200)
    assert found["ttft_p99_ms"] == pytest.approx(298)
    assert found["itl_mean_ms"] == pytest.approx((98 * 10 + 30 + 50) / 100)
    assert found["itl_p99_ms"] == pytest.approx(30.2)
    assert found["output_rate"] == 3.0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nbusy", "429.*busy"),
        (HEAD + chunk(event("a")) + chunk(USAGE) + b"0\r\n\r\n", None),
        (HEAD + chunk(b'data: {"error": {"message": "engine_fault"}}\n\n') + END, "engine_fault"),
        (HEAD + chunk(event("a")) + b"0\r\n\r\n", "gave None tokens"),
        (b"nonsense\r\n\r\n", "not HTTP"),
    ],
    ids=["refused", "merged", "failed stream", "no usage", "no http"],
)
def test_a_request_that_fails_fails_the_run_loudly(answer: bytes, words: str | None) -> None:
    async def serve(body: dict, write: Write) -> None:
        await write(answer)

    if words is None:  # Three tokens in one event: the server's own count is what holds.
        assert load(serve)["output_tokens"] == 18
        return
    with pytest.raises(ConnectionError, match=words):
        load(serve)


def test_a_server_that_is_silent_ends_at_the_deadline() -> None:
    async def serve(body: dict, write: Write) -> None:
        await asyncio.sleep(3)

    with pytest.raises(TimeoutError):
        load(serve, timeout_s=0.3)
