"""A standby with real processes: it waits, is promoted after the fence, and may die itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import WAIT_S, Server, gone, until
from test_failover import assert_every_stream_is_whole, ended, start, streaming
from test_http_failover import MODEL, stream, url

from holdfast.proc.status import at_rest

Serve = Callable[..., Server]
WORKER, STANDBY, CORE = "holdfast worker 0", "holdfast standby 0", "holdfast core"
# Of the warm target on two cores, from SIGKILL to the next token, with the bundled model.
RESUME_S_MAX = 1.5


def prepared(server: Server, seconds: float = WAIT_S) -> int:
    """The pid of a standby that waits."""

    def pid() -> int | None:
        facts = {p["title"]: p for p in server.status()["processes"]}[STANDBY]
        return facts["pid"] if facts["state"] == "prepared" else None

    return until("a standby that waits", pid, seconds)


def test_a_standby_takes_the_place_of_a_killed_worker_and_the_next_one_is_started(
    serve: Serve,
) -> None:
    server = serve(standby="warm").wait_ready()
    standby = prepared(server)
    worker = server.pids()[WORKER]
    os.kill(worker, signal.SIGKILL)
    until("epoch 2 at the core", lambda: server.messages("core", "worker", epoch=2, fds=1))
    assert server.pids()[WORKER] == standby
    # Nothing new was started for it, and it was asked for its sum after the fence.
    assert [m["pid"] for m in server.messages("worker", "promote")] == [worker, standby]
    assert server.messages("keeper", "weights_sum", loaded=True)
    assert prepared(server) not in (worker, standby)
    with open(f"/proc/{standby}/cmdline", "rb") as file:
        assert file.read().strip(b"\0") == WORKER.encode()


@pytest.mark.parametrize("kind", ["warm", "cold", "none"])
def test_a_server_is_at_rest_when_the_next_kill_finds_what_its_standby_promises(
    serve: Serve, kind: str
) -> None:
    """A cold standby never waits and `none` has no place: neither is waited for."""
    server = serve(standby=kind).wait_ready()
    for epoch in (2, 3):
        until("rest", lambda: at_rest(server.status()))
        states = {p["title"]: p["state"] for p in server.status()["processes"]}
        assert states.get(STANDBY) == {"warm": "prepared", "cold": "gone", "none": None}[kind]
        os.kill(server.pids()[WORKER], signal.SIGKILL)
        until(
            "the next epoch",
            lambda epoch=epoch: server.messages("core", "worker", epoch=epoch, fds=1),
        )


@pytest.mark.parametrize("role", [WORKER, CORE, "both"])
def test_streams_go_on_with_a_standby_whoever_dies(serve: Serve, role: str) -> None:
    server = start(serve, standby="warm", step_s=0.15).wait_ready()
    standby = prepared(server)
    streaming(server, 1)
    pids = server.pids()
    for title in (CORE, WORKER) if role == "both" else (role,):
        os.kill(pids[title], signal.SIGKILL)
    assert not ended(server), "the kill came too late to prove anything"
    assert_every_stream_is_whole(server)
    if role != "both":
        # Of both, the worker's end may be seen first: then the standby goes to a core that is dead
        # already, and with it.
        assert server.pids()[WORKER] == standby
        assert server.status()["epoch"] == 2


def test_streams_go_on_when_the_promoted_standby_dies_too(serve: Serve) -> None:
    server = start(serve, standby="warm", step_s=0.15).wait_ready()
    standby = prepared(server)
    streaming(server, 1)
    os.kill(server.pids()[WORKER], signal.SIGKILL)
    until("promoted", lambda: server.pids()[WORKER] == standby)
    os.kill(standby, signal.SIGKILL)
    assert_every_stream_is_whole(server)


def test_a_standby_that_dies_is_replaced_and_nobody_notices(serve: Serve) -> None:
    server = serve(standby="warm").wait_ready()
    before = server.pids()
    standby = prepared(server)
    os.kill(standby, signal.SIGKILL)
    until("lost", lambda: server.event("lost", "standby"))
    assert prepared(server) != standby
    after = server.pids()
    assert {t for t in before if before[t] != after[t]} <= {STANDBY}
    assert not server.messages("core", "worker_lost")


def test_a_damaged_standby_never_serves_and_a_new_worker_loads_alone(serve: Serve) -> None:
    server = serve(standby="warm", act={"worker": "damaged"}).wait_ready()
    standby = prepared(server)
    os.kill(server.pids()[WORKER], signal.SIGKILL)
    until("epoch 2 at the core", lambda: server.messages("core", "worker", epoch=2))
    boots = server.log("worker", "boot")
    assert [boot["loaded"] for boot in boots] == [False, False]
    assert gone(standby)
    assert standby not in {m["pid"] for m in server.messages("worker", "promote")}


def test_cold_and_none_keep_no_process_waiting(serve: Serve) -> None:
    servers = {mode: serve(standby=mode, api_processes=1).wait_ready() for mode in ("cold", "none")}
    for server in servers.values():
        os.kill(server.pids()[WORKER], signal.SIGKILL)
        until("epoch 2", lambda s=server: s.messages("core", "worker", epoch=2))
        assert server.pids().get(STANDBY) is None
    # A cold one is started beside the fence, as a standby.
    assert len(servers["cold"].log("standby", "boot")) == 1
    assert not servers["none"].log("standby", "boot")


def test_sigterm_stops_a_standby_with_the_others(serve: Serve) -> None:
    server = serve(standby="warm").wait_ready()
    prepared(server)
    pids = server.pids()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert server.messages("standby", "stop")
    assert all(gone(pid) for pid in pids.values())


def real(serve: Serve, standby: str) -> Server:
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    options: dict[str, Any] = {"modules": {}, "model": MODEL, "real": True, "standby": standby}
    return serve(api_processes=1, limits=limits, **options).wait_ready()


def counted(server: Server, name: str) -> float:
    """A counter without labels, or the sum of those with; 0 while there is none."""
    lines = httpx.get(url(server) + "/metrics").text.splitlines()
    mine = [line.split() for line in lines if line.startswith(f"holdfast_{name}")]
    return sum(float(line[1]) for line in mine)


@pytest.mark.parametrize("standby", ["warm", "none"])
def test_the_real_worker_resumes_the_same_text_and_within_its_time(
    serve: Serve, standby: str
) -> None:
    server = real(serve, standby)
    undisturbed = stream(server, tokens=200)
    if standby == "warm":
        prepared(server)
    gaps: list[float] = []
    at = [0.0]
    hits = [0.0]

    def kill() -> None:
        hits[0] = counted(server, "prefix_hit_tokens_total")
        at[0] = time.monotonic()
        os.kill(server.pids()[WORKER], signal.SIGKILL)

    def seen() -> None:
        gaps.append(time.monotonic() - at[0])

    # Some pages behind its prompt: fewer tokens than a page would leave nothing to find.
    assert stream(server, 40, kill, tokens=200, then=seen) == undisturbed
    # What was on its way when the worker died comes at once: the longest silence is the pause.
    pause_s = max(after - before for before, after in zip([0.0, *gaps], gaps, strict=False))
    print(f"standby {standby}: {pause_s:.3f} s from SIGKILL to the next token")
    assert standby != "warm" or pause_s < RESUME_S_MAX
    # What the dead worker had sealed was verified, and found by the request that went on.
    assert counted(server, "pages_verified_total") > 0
    assert counted(server, "prefix_hit_tokens_total") > hits[0]
    assert counted(server, "pages_failed_total") == 0
    metrics = httpx.get(url(server) + "/metrics").text
    assert 'holdfast_processes_ready{role="worker"} 1.0' in metrics
    assert server.status()["epoch"] == 2
