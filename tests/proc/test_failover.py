"""The real core, keeper and supervisor with a device of integers: streams survive every death.

The fake device computes its tokens from the pages and rows it sees, so that a stream with a gap, a
repeated token or a page of somebody else is a wrong stream.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Server, gone, until

from holdfast.core.journal import records_of, replay
from holdfast.sim.fake_worker import expected_token
from holdfast.wire.messages import End

Serve = Callable[..., Server]
VOCAB, REQUESTS, TOKENS = 1000, 4, 40
LIMITS = {"vocab_size": VOCAB, "context_tokens": 96, "pages": 64, "live_tokens": 4096}


def start(serve: Serve, *, step_s: float = 0.01, **options: Any) -> Server:
    return serve(
        api_processes=1,
        modules={"worker": "sim_worker", "api": "sim_api"},
        limits=LIMITS,
        extra={"requests": REQUESTS, "tokens": TOKENS, "step_s": step_s},
        **options,
    )


def lines(server: Server) -> list[list[Any]]:
    text = server.log_path.read_text()
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def tokens_of(server: Server, request: int) -> list[int]:
    """The request's tokens, which must have come once each and in order."""
    found = [line for line in lines(server) if line[0] == request and isinstance(line[1], int)]
    assert [line[1] for line in found] == list(range(len(found)))
    return [line[2] for line in found]


def expected(request: int) -> list[int]:
    history = list(np.arange(request, request + 4 + request) % VOCAB)
    for _ in range(TOKENS):
        history.append(expected_token(np.array(history, np.int32), VOCAB))
    return history[-TOKENS:]


def ended(server: Server) -> dict[int, int]:
    return {line[0]: line[2] for line in lines(server) if line[1] == "end"}


def streaming(server: Server, tokens: int) -> None:
    until("streaming", lambda: all(len(tokens_of(server, r)) >= tokens for r in range(REQUESTS)))


def assert_every_stream_is_whole(server: Server) -> None:
    until("all ended", lambda: len(ended(server)) == REQUESTS)
    assert ended(server) == dict.fromkeys(range(REQUESTS), End.LENGTH)
    for request in range(REQUESTS):
        assert tokens_of(server, request) == expected(request)


@pytest.mark.parametrize("role", ["holdfast worker 0", "holdfast core"])
def test_streams_survive_sigkill_and_go_on_without_a_token_lost_or_repeated(
    serve: Serve, role: str
) -> None:
    server = start(serve).wait_ready()
    streaming(server, 3)
    os.kill(server.pids()[role], signal.SIGKILL)
    until("restarted", lambda: server.event("restarted", role))
    assert len(ended(server)) < REQUESTS, "the kill came too late to prove anything"
    assert_every_stream_is_whole(server)


def test_streams_survive_worker_and_core_killed_together(serve: Serve) -> None:
    server = start(serve).wait_ready()
    streaming(server, 3)
    pids = server.pids()
    for role in ("holdfast core", "holdfast worker 0"):
        os.kill(pids[role], signal.SIGKILL)
    assert_every_stream_is_whole(server)


def test_streams_survive_a_stopped_process_that_is_then_killed(serve: Serve) -> None:
    server = start(serve).wait_ready()
    streaming(server, 3)
    pid = server.pids()["holdfast worker 0"]
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert_every_stream_is_whole(server)


@pytest.mark.parametrize("with_core", [False, True])
def test_requests_of_a_dead_api_process_are_forgotten(serve: Serve, with_core: bool) -> None:
    """Also by a core that was not there when it died, and reads them from the journal."""
    server = start(serve, step_s=0.02).wait_ready()
    streaming(server, 2)
    if with_core:
        # The second end within a minute is followed by a pause, in which the api process dies.
        os.kill(server.pids()["holdfast core"], signal.SIGKILL)
        until("restarted", lambda: server.event("restarted", "core"))
        os.kill(server.pids()["holdfast core"], signal.SIGKILL)
        until("no core", lambda: server.pids()["holdfast core"] is None)
    os.kill(server.pids()["holdfast api 0"], signal.SIGKILL)

    def second_life() -> list[list[Any]]:
        seen = lines(server)
        boots = [at for at, line in enumerate(seen) if line[0] == "boot"]
        return seen[boots[1] :] if len(boots) > 1 else []

    # The new process submits the same ids: known ones would go on where they were.
    until("ends", lambda: sum(line[1] == "end" for line in second_life()) == REQUESTS)
    for request in range(REQUESTS):
        tokens = [x for x in second_life() if x[0] == request and isinstance(x[1], int)]
        assert [x[1] for x in tokens] == list(range(TOKENS))
        assert [x[2] for x in tokens] == expected(request)


def test_sigterm_lets_streams_finish(serve: Serve) -> None:
    server = start(serve).wait_ready()
    streaming(server, 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert_every_stream_is_whole(server)


def test_streams_that_outlast_the_drain_deadline_end_with_shutdown(serve: Serve) -> None:
    server = start(serve, step_s=0.05, drain_timeout_s=0.3).wait_ready()
    streaming(server, 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert ended(server) == dict.fromkeys(range(REQUESTS), End.SHUTDOWN)
    for request in range(REQUESTS):
        got = tokens_of(server, request)
        assert 0 < len(got) < TOKENS and got == expected(request)[: len(got)]


def test_without_the_keeper_streams_end_with_an_engine_fault(serve: Serve) -> None:
    server = start(serve).wait_ready()
    streaming(server, 3)
    pids = server.pids()
    os.kill(pids["holdfast keeper 0"], signal.SIGKILL)
    assert server.wait_exit() == 70
    assert ended(server) == dict.fromkeys(range(REQUESTS), End.ENGINE_FAULT)
    assert all(gone(pid) for pid in pids.values())


def test_the_copy_on_disk_holds_every_request_and_token(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    server = start(serve, journal_dir=str(folder)).wait_ready()
    assert_every_stream_is_whole(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    records = [r for p in sorted(folder.iterdir()) for r in records_of(memoryview(p.read_bytes()))]
    found = replay(records)
    assert [found[number].tokens for number in sorted(found)] == list(
        map(expected, range(REQUESTS))
    )
    assert all(request.end == End.LENGTH for request in found.values())
