"""The api process's server on loopback: the official client, real sockets, a real child process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from apikit import END_ID, FakeCore, Kit, bundled, kit, until

from holdfast.core.metrics import API_SLOT, Metrics, MetricsBoard
from holdfast.proc.api import _Server, server_config
from holdfast.wire.link import Link
from holdfast.wire.messages import End


@contextmanager
def serving(**options: Any) -> Iterator[tuple[Kit, str, Callable[[Callable[[], Any]], Any]]]:
    """A server in a thread: (kit, base url, call something on its loop)."""
    listen = socket.create_server(("127.0.0.1", 0))
    port = listen.getsockname()[1]
    up, box = threading.Event(), {}

    async def main() -> None:
        async with kit(**options) as k:
            server = _Server(server_config(k.app, {"drain_timeout_s": 5}))
            box.update(kit=k, loop=asyncio.get_running_loop(), server=server)
            task = asyncio.create_task(server.serve(sockets=[listen]))
            await until(lambda: server.started)
            up.set()
            await task

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert up.wait(10)

    def call(what: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), box["loop"]).result(10)

    try:
        yield box["kit"], f"http://127.0.0.1:{port}", call
    finally:
        box["server"].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about"
        time.sleep(0.005)


def test_the_official_client_chats_streams_and_gets_its_errors() -> None:
    with serving(api_keys=("key",)) as (k, url, call):
        call(lambda: k.says("Hello wörld 👩"))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
            message = [{"role": "user", "content": "Hi"}]
            answer = client.chat.completions.create(
                model="tiny", messages=message, n=2, seed=7, logprobs=True, top_logprobs=2
            )
            assert [c.message.content for c in answer.choices] == ["Hello wörld 👩"] * 2
            assert answer.choices[0].logprobs.content[0].top_logprobs
            assert k.core.submits[-1].seeds[0] == 7
            chunks = list(
                client.chat.completions.create(
                    model="tiny",
                    messages=message,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == "Hello wörld 👩"
            assert chunks[-1].usage.total_tokens > 0
            plain = client.completions.create(model="tiny", prompt="x", stop="wörld", logprobs=1)
            assert plain.choices[0].text == "Hello "
            assert plain.choices[0].finish_reason == "stop"
            assert [m.id for m in client.models.list()] == ["tiny"]
            with pytest.raises(openai.BadRequestError, match="temperature"):
                client.completions.create(model="tiny", prompt="x", temperature=9)
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="x")
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()


def test_an_error_in_a_stream_reaches_the_official_client_as_an_error() -> None:
    with serving() as (k, url, call):
        call(lambda: setattr(k.core, "answer", lambda s, c: ([10, 11], int(End.NOT_FINITE))))
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
            client.completions.create(model="tiny", prompt="x", stream=True) as stream,
            pytest.raises(openai.APIError),
        ):
            list(stream)


def test_a_closed_connection_frees_the_request_at_once() -> None:
    with serving() as (k, url, call):
        call(lambda: setattr(k.core, "answer", lambda s, c: ([10], int(End.NONE))))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="x", stream=True)
            next(iter(stream))
            stream.close()
            wait_for(lambda: len(k.core.cancels) == 1)
            assert call(lambda: k.client.open) == 0


def test_a_client_that_stops_reading_loses_its_connection_and_its_pages() -> None:
    options = {"write_timeout_s": 0.3, "buffer_tokens": 4096}
    with serving(client_options=options) as (k, url, call):
        # Tokens for ever: more bytes than any socket buffer holds.
        call(lambda: setattr(k.core, "answer", lambda s, c: ([10] * 200_000, int(End.NONE))))
        host, port = url.removeprefix("http://").split(":")
        body = b'{"model":"tiny","prompt":"x","stream":true,"logprobs":20}'
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            sock.sendall(head % len(body) + body)
            wait_for(lambda: k.board.total("stream_cancelled_total", ("slow_reader",)) == 1)
            wait_for(lambda: len(k.core.cancels) == 1)
            assert call(lambda: k.client.open) == 0
            sock.settimeout(10)
            with pytest.raises(ConnectionResetError):
                while sock.recv(1 << 20):
                    pass


def test_an_endless_request_head_is_told_so_and_cut_off() -> None:
    with serving() as (_, url, _call):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(10)
            sock.sendall(b"GET /health HTTP/1.1\r\n")
            for _ in range(1000):
                sock.sendall(b"x-filler: " + b"y" * 1000 + b"\r\n")
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 431 ")
            # It reads on for a second, so that the answer is not lost, and not for ever.
            with pytest.raises(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass


def test_the_api_process_serves_drains_and_stops_by_its_control_channel() -> None:
    from holdfast.config import Limits
    from holdfast.proc.child import limits_config, spawn

    limits = Limits(vocab_size=6144, context_tokens=4096)
    metrics_fd = os.memfd_create("metrics")
    os.ftruncate(metrics_fd, Metrics.size(API_SLOT + 1))
    ours, theirs = Link.pair()
    listen = socket.create_server(("127.0.0.1", 0))
    config = {
        "limits": limits_config(limits),
        "model": str(bundled()),
        "served_name": "holdfast-tiny",
        "ids_will_do": False,
        "api_keys": [],
        "cors_origins": [],
        "write_timeout_s": 10.0,
        "keepalive_s": 10.0,
        "first_id": 1,
        "body_bytes_max": 1 << 20,
        "drain_timeout_s": 5.0,
        "log_level": "info",
    }
    fds = {"core": theirs.fileno(), "metrics": metrics_fd, "listen": listen.fileno()}
    child = spawn("api", 0, module="holdfast.proc.api", config=config, fds=fds)
    theirs.close()
    try:
        ready = child.control.wait(30)
        assert ready is not None
        assert ready[0]["type"] == "ready"
        url = f"http://127.0.0.1:{listen.getsockname()[1]}"
        asyncio.run(_talk(child, ours, url))
        child.control.send({"type": "stop"})
        assert child.wait(15) == 0
    finally:
        child.kill()
        child.wait(10)
        child.close()
        listen.close()
        os.close(metrics_fd)


async def _talk(child: Any, link: Link, url: str) -> None:
    """One answer, then the core dies in the middle of another, which goes on over the next."""
    core = FakeCore(link, lambda s, c: ([300, 301, END_ID], int(End.STOP))).open()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        message = [{"role": "user", "content": "Hi"}]
        answer = await client.chat.completions.create(model="holdfast-tiny", messages=message)
        whole = answer.choices[0].message.content
        assert answer.usage.completion_tokens == 3
        core.answer = lambda s, c: ([300], int(End.NONE))
        asked = asyncio.create_task(
            client.chat.completions.create(model="holdfast-tiny", messages=message)
        )
        await until(lambda: any(row.sent for row in core.rows.values()))
        (request_id,) = core.rows
        core.close()
        child.control.send({"type": "core_lost", "detail": "killed"})
        ours, theirs = Link.pair()
        core = FakeCore(ours, core.answer).open()
        child.control.send({"type": "core"}, [theirs.fileno()])
        theirs.close()
        await until(lambda: core.resumes == [(request_id, 1)])
        core.batch([(request_id, 1, 301, 0), (request_id, 2, END_ID, int(End.STOP))])
        assert (await asked).choices[0].message.content == whole
        child.control.send({"type": "drain"})
        deadline_s = time.monotonic() + 5
        while True:
            try:
                await client.models.list()
                await client.completions.create(model="holdfast-tiny", prompt="x", max_tokens=1)
            except openai.InternalServerError as error:
                assert error.status_code == 503
                break
            assert time.monotonic() < deadline_s
    core.close()


def test_metrics_of_a_killed_process_are_continued_by_the_next() -> None:
    buffer = bytearray(Metrics.size(API_SLOT + 1))
    Metrics(buffer, API_SLOT).add("prompt_tokens_total", 5)
    Metrics(buffer, API_SLOT).add("prompt_tokens_total", 6)
    assert MetricsBoard(buffer, API_SLOT + 1).total("prompt_tokens_total") == 11
