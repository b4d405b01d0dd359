"""What `ps` learns of a server, and from whom."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
from conftest import Server, until

from holdfast.proc import status

Serve = Callable[..., Server]


def test_a_server_says_what_its_processes_do(serve: Serve) -> None:
    server = serve(api_keys=["sk-secret"]).wait_ready()
    facts = server.status()
    assert facts["pid"] == server.pid and facts["ready"] and facts["phase"] == "serving"
    assert facts["title"] == f"holdfast serve :{facts['port']}"
    assert facts["port"] == server.event("ready")[3]["port"]
    assert all(p["state"] == "ready" and p["rss_bytes"] > 1 << 20 for p in facts["processes"])
    assert "sk-secret" not in json.dumps(facts)
    os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)

    def restarted() -> bool:
        worker = next(p for p in server.status()["processes"] if "worker" in p["title"])
        return (worker["state"], worker["restarts"], worker["epoch"]) == ("ready", 1, 2)

    until("restart shown", restarted)
    worker = next(p for p in server.status()["processes"] if "worker" in p["title"])
    assert worker["last_end"].startswith("killed by SIGKILL")


def test_read_all_finds_every_server_and_nothing_else(serve: Serve) -> None:
    servers = [serve(api_processes=1).wait_ready(), serve(api_processes=1).wait_ready()]
    with socket.socket(socket.AF_UNIX) as other:
        # A name that looks like a server's, held by another process: it is not believed.
        other.bind(f"\0holdfast-{servers[0].pid + 4_000_000}")
        other.listen()

        def pretend() -> None:
            peer, _ = other.accept()
            with peer, contextlib.suppress(OSError):
                peer.send(b'{"pid": 1, "title": "not a server"}\n')

        thread = threading.Thread(target=pretend)
        thread.start()
        found = status.read_all()
        thread.join(10)
    ours = [facts["pid"] for facts in found if facts["pid"] in {s.pid for s in servers}]
    assert ours == sorted(s.pid for s in servers)
    assert all("processes" in facts for facts in found)


def test_a_reader_that_does_not_read_delays_nobody(serve: Serve) -> None:
    server = serve(api_processes=1).wait_ready()
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(f"\0holdfast-{server.pid}")
        assert server.status()["ready"]


def test_a_server_that_is_not_there_or_says_nothing_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert status.read(4_000_001) is None
    monkeypatch.setattr(status, "ANSWER_S_MAX", 0.1)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"\0holdfast-{os.getpid()}")
        mute.listen()
        started = time.monotonic()
        assert status.read(os.getpid()) is None
        assert time.monotonic() - started < 2


def test_another_user_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    server = status.StatusServer()
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(f"\0holdfast-{os.getpid()}")
        monkeypatch.setattr(status, "_credentials", lambda sock: (1, 12345, 12345))
        server.answer(lambda request: {"pid": 1})
        reader.settimeout(5)
        assert reader.recv(100) == b""
    server.close()


def test_a_line_that_is_no_request_is_told_so_and_silent_peers_are_bounded() -> None:
    server = status.StatusServer()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(status.PEERS_MAX + 1)]
    for peer in silent:
        peer.connect(f"\0holdfast-{os.getpid()}")
        server.answer(lambda request: {})
    silent[0].settimeout(5)
    assert silent[0].recv(100) == b"", "the oldest made room"
    silent[1].sendall(b"[1]\n")
    server.answer(lambda request: {})
    silent[1].settimeout(5)
    assert "one line with a JSON object" in json.loads(silent[1].recv(1000))["error"]
    silent[2].sendall(b'{"a": 1}\n')
    server.answer(lambda request: {"heard": request})
    silent[2].settimeout(5)
    assert json.loads(silent[2].recv(1000)) == {"heard": {"a": 1}}
    for peer in silent:
        peer.close()
    server.close()
