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

from holdfast.core.clocks import SAMPLES_MIN
from holdfast.core.journal import records_of, replay
from holdfast.sim.fake_worker import expected_token
from holdfast.wire.messages import End

Serve = Callable[..., Server]
VOCAB, REQUESTS, TOKENS = 1000, 4, 40
LIMITS = {"vocab_size": VOCAB, "context_tokens": 96, "pages": 64, "live_tokens": 4096}


def start(serve: Serve, *, step_s: float = 0.01, tokens: int = TOKENS, **options: Any) -> Server:
    return serve(
        api_processes=1,
        modules={"worker": "sim_worker", "api": "sim_api"},
        limits=LIMITS,
        extra={"requests": REQUESTS, "tokens": tokens, "step_s": step_s},
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


def expected(request: int, tokens: int = TOKENS) -> list[int]:
    history = list(np.arange(request, request + 4 + request) % VOCAB)
    for _ in range(tokens):
        history.append(expected_token(np.array(history, np.int32), VOCAB))
    return history[-tokens:]


def ended(server: Server) -> dict[int, int]:
    return {line[0]: line[2] for line in lines(server) if line[1] == "end"}


def streaming(server: Server, tokens: int) -> None:
    until("streaming", lambda: all(len(tokens_of(server, r)) >= tokens for r in range(REQUESTS)))


def assert_every_stream_is_whole(server: Server, tokens: int = TOKENS) -> None:
    until("all ended", lambda: len(ended(server)) == REQUESTS)
    assert ended(server) == dict.fromkeys(range(REQUESTS), End.LENGTH)
    for request in range(REQUESTS):
        assert tokens_of(server, request) == expected(request, tokens)


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

    # The new process submits the same ids: known ones would go on where they were.
    until("ends", lambda: sum(line[1] == "end" for line in second_life(server)) == REQUESTS)
    for request in range(REQUESTS):
        tokens = [x for x in second_life(server) if x[0] == request and isinstance(x[1], int)]
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


def test_streams_survive_a_worker_that_hangs(serve: Serve) -> None:
    """Stopped and killed by nobody: the core's clock finds it."""
    server = start(serve, step_s=0.02, tokens=80).wait_ready()
    # Until then a step of some size has been seen often enough.
    streaming(server, 2 * SAMPLES_MIN)
    os.kill(server.pids()["holdfast worker 0"], signal.SIGSTOP)
    assert_every_stream_is_whole(server, 80)
    lost = server.event("lost", "worker")
    assert lost is not None and "no result for" in lost[2]
    resumed = until("resumed", lambda: server.event("resumed", "worker"))
    assert resumed[2].endswith(f"{REQUESTS} streams")


@pytest.mark.parametrize("title", ["holdfast core", "holdfast keeper 0"])
def test_streams_survive_a_process_that_hangs_without_a_deadline(serve: Serve, title: str) -> None:
    server = start(serve, step_s=0.1, heartbeat_timeout_s=1.5).wait_ready()
    streaming(server, 1)
    os.kill(server.pids()[title], signal.SIGSTOP)
    until("lost", lambda: server.event("lost", title))
    assert len(ended(server)) < REQUESTS, "it hung too late to prove anything"
    assert_every_stream_is_whole(server)


@pytest.mark.parametrize("standby", ["warm", "none"])
def test_streams_survive_the_keeper_and_its_memory(serve: Serve, standby: str) -> None:
    server = start(serve, step_s=0.05, standby=standby).wait_ready()
    streaming(server, 3)
    pids = server.pids()
    os.kill(pids["holdfast keeper 0"], signal.SIGKILL)
    until("resumed", lambda: server.event("resumed", "keeper"))
    assert len(ended(server)) < REQUESTS, "the kill came too late to prove anything"
    assert_every_stream_is_whole(server)
    assert gone(pids["holdfast worker 0"])
    assert pids["holdfast core"] == server.pids()["holdfast core"]


def test_streams_survive_core_keeper_and_worker_killed_together(serve: Serve) -> None:
    server = start(serve, step_s=0.05, standby="warm").wait_ready()
    streaming(server, 3)
    pids = server.pids()
    for title in ("holdfast core", "holdfast keeper 0", "holdfast worker 0"):
        os.kill(pids[title], signal.SIGKILL)
    assert_every_stream_is_whole(server)


def test_a_server_all_of_whose_processes_are_killed_at_once_serves_again(serve: Serve) -> None:
    """Streams end with the api process that held their connections; what comes next is whole."""
    server = start(serve, step_s=0.02, standby="warm").wait_ready()
    streaming(server, 2)
    pids = server.pids()
    for pid in pids.values():
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    until("all ended", lambda: sum(line[1] == "end" for line in second_life(server)) == REQUESTS)
    for request in range(REQUESTS):
        tokens = [x for x in second_life(server) if x[0] == request and isinstance(x[1], int)]
        assert [x[2] for x in tokens] == expected(request)
    assert server.status()["phase"] == "serving"


def second_life(server: Server) -> list[list[Any]]:
    """What the second api process got."""
    seen = lines(server)
    boots = [at for at, line in enumerate(seen) if line[0] == "boot"]
    return seen[boots[1] :] if len(boots) > 1 else []


def test_the_copy_on_disk_holds_every_request_and_token(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    server = start(serve, journal_dir=str(folder)).wait_ready()
    assert_every_stream_is_whole(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    records = [r for p in sorted(folder.iterdir()) for r in records_of(memoryview(p.read_bytes()))]
    found = replay(records)
    assert {number: request.tokens for number, request in found.items()} == {
        number: expected(number) for number in range(REQUESTS)
    }
    assert all(request.end == End.LENGTH for request in found.values())
