"""The keeper's memory and the weights in it, with the real worker: lost, changed, and no stream."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Server, until
from test_http_failover import BODY, MODEL, stream, url

Serve = Callable[..., Server]
KEEPER = "holdfast keeper 0"


def real(serve: Serve, **options: Any) -> Server:
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    fixed: dict[str, Any] = {"modules": {}, "model": MODEL, "real": True, "limits": limits}
    return serve(api_processes=1, **fixed, **options).wait_ready()


def spoil_weights(server: Server) -> None:
    """Change a byte in the middle of the slab that the keeper owns."""
    folder = f"/proc/{server.pids()[KEEPER]}/fd"
    name = "memfd:holdfast-weights"
    fds = [fd for fd in os.listdir(folder) if name in os.readlink(f"{folder}/{fd}")]
    with open(f"{folder}/{fds[0]}", "r+b") as slab:
        slab.seek(os.fstat(slab.fileno()).st_size // 2)
        byte = slab.read(1)[0]
        slab.seek(-1, os.SEEK_CUR)
        slab.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("standby", ["warm", "none"])
def test_the_same_text_comes_although_the_keeper_and_its_memory_are_lost(
    serve: Serve, standby: str
) -> None:
    server = real(serve, standby=standby)
    undisturbed = stream(server, tokens=200)
    core = server.pids()["holdfast core"]

    def kill() -> None:
        os.kill(server.pids()[KEEPER], signal.SIGKILL)

    assert stream(server, 5, kill, tokens=200) == undisturbed
    assert server.status()["epoch"] == 2 and server.pids()["holdfast core"] == core
    told = until("resumed", lambda: server.event("resumed", "keeper"))
    print(told[2])
    text = httpx.get(url(server) + "/metrics").text
    assert 'holdfast_faults_total{kind="keeper"} 1.0' in text
    assert "holdfast_resumes_total 1.0" in text
    assert "holdfast_streams_resumed_total 1.0" in text
    assert "holdfast_resumed_seconds_count 1.0" in text
    assert "holdfast_fenced_seconds_count 1.0" in text


def test_weights_that_change_are_found_by_the_scrub_and_loaded_anew(serve: Serve) -> None:
    server = real(serve, standby="warm", scrub_gbps=2.0)
    undisturbed = stream(server, tokens=60)
    spoil_weights(server)
    until("epoch 2", lambda: server.status()["epoch"] == 2, 60)
    assert "the weights are not the bytes that were loaded" in server.event("lost", "worker")[2]
    until("serving", lambda: server.status()["ready"], 60)
    assert stream(server, tokens=60) == undisturbed
    assert 'faults_total{kind="weights"} 1.0' in httpx.get(url(server) + "/metrics").text


def test_faults_never_turn_into_a_client_error(serve: Serve) -> None:
    """While workers, the core and the keeper die: 200, or 503 with nobody to compute."""
    server = real(serve, standby="warm", restarts_per_minute=1000)
    codes: set[int] = set()
    over = threading.Event()

    def ask() -> None:
        body = {**BODY, "max_tokens": 5}
        while not over.is_set():
            with httpx.stream("POST", url(server) + "/v1/completions", json=body, timeout=60) as r:
                codes.add(r.status_code)
                for line in r.iter_lines():
                    if line.startswith("data: {"):
                        assert "error" not in json.loads(line[6:]), line

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        for title in ("holdfast worker 0", "holdfast core", KEEPER, "holdfast worker 0"):
            os.kill(server.pids()[title], signal.SIGKILL)
            until("not ready", lambda: not server.status()["ready"])
            until("ready again", lambda: server.status()["ready"], 60)
    finally:
        over.set()
        for thread in asking:
            thread.join(60)
    assert 200 in codes and codes <= {200, 503}
    assert httpx.get(url(server) + "/ready").status_code == 200
