"""A client's stream over HTTP while processes die: the real api, core, keeper and supervisor.

The device is the one of integers (sim_worker): its text means nothing, but the same request always
gives the same text, and a wrong page, row or token gives another one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Server, until

import holdfast

Serve = Callable[..., Server]
MODEL = os.path.join(os.path.dirname(holdfast.__file__), "assets", "holdfast-tiny")
TOKENS = 60
BODY = {
    "model": "fake",
    "prompt": "What a day",
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture
def server(serve: Serve) -> Server:
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    options: dict[str, Any] = {"modules": {"worker": "sim_worker"}, "model": MODEL}
    started = serve(api_processes=1, limits=limits, extra={"step_s": 0.02}, **options)
    return started.wait_ready()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.event('ready')[3]['port']}"


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def stream(
    server: Server,
    after_chunks: int = 0,
    act: Callable[[], None] = lambda: None,
    *,
    tokens: int = TOKENS,
    then: Callable[[], None] = lambda: None,
) -> str:
    """The text of one stream; `act` is called once after so many chunks of it, `then` at each
    later one."""
    body = {**BODY, "max_tokens": tokens}
    texts: list[str] = []
    usage: dict[str, Any] = {}
    with httpx.stream("POST", url(server) + "/v1/completions", json=body, timeout=30) as response:
        assert response.status_code == 200, response.read()
        for event in events(response):
            assert "error" not in event, event
            usage = event.get("usage") or usage
            texts += [choice["text"] for choice in event["choices"]]
            if len(texts) == after_chunks:
                act()
            elif after_chunks and len(texts) > after_chunks:
                then()
    assert usage["completion_tokens"] == tokens
    return "".join(texts)


@pytest.mark.parametrize("roles", [["worker 0"], ["core"], ["core", "worker 0"]])
def test_a_client_sees_the_same_text_when_processes_die_in_the_middle(
    server: Server, roles: list[str]
) -> None:
    undisturbed = stream(server)

    def kill() -> None:
        pids = server.pids()
        for role in roles:
            os.kill(pids[f"holdfast {role}"], signal.SIGKILL)

    assert stream(server, 5, kill) == undisturbed
    assert server.status()["epoch"] == 2


def test_the_real_worker_resumes_with_the_tokens_it_would_have_drawn(serve: Serve) -> None:
    """Weights and KV pool lie in the keeper's memory, the second worker loads nothing."""
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    server = serve(api_processes=1, limits=limits, modules={}, model=MODEL, real=True)
    server.wait_ready()
    undisturbed = stream(server, tokens=200)

    def kill() -> None:
        os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)

    assert stream(server, 5, kill, tokens=200) == undisturbed
    assert server.status()["epoch"] == 2
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert server.stderr() == ""


def test_ready_follows_the_worker_and_health_the_process(server: Server) -> None:
    assert httpx.get(url(server) + "/ready").status_code == 200
    pid = server.pids()["holdfast worker 0"]
    os.kill(pid, signal.SIGKILL)
    until("not ready", lambda: httpx.get(url(server) + "/ready").status_code == 503)
    assert httpx.get(url(server) + "/health").status_code == 200
    until("ready again", lambda: httpx.get(url(server) + "/ready").status_code == 200)


def test_restarts_show_in_the_metrics_and_counters_outlive_the_core(server: Server) -> None:
    stream(server)

    def metrics() -> dict[str, float]:
        lines = httpx.get(url(server) + "/metrics").text.splitlines()
        found = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("holdfast_"): float(value) for name, _, value in found}

    before = metrics()
    os.kill(server.pids()["holdfast core"], signal.SIGKILL)
    until("restarted", lambda: server.event("restarted", "worker"))
    after = metrics()
    assert after['process_restarts_total{role="core"}'] == 1
    assert after["worker_epoch"] == 2
    assert after["tokens_generated_total"] >= before["tokens_generated_total"] >= TOKENS


def test_sigterm_finishes_the_stream_refuses_new_requests_and_exits_0(server: Server) -> None:
    refused: list[int] = []

    def terminate() -> None:
        server.process.send_signal(signal.SIGTERM)
        until("draining", lambda: server.event("draining"))

        def refuses() -> bool:
            short = {"model": "fake", "prompt": "a", "max_tokens": 1}
            answer = httpx.post(url(server) + "/v1/completions", json=short, timeout=30)
            refused.append(answer.status_code)
            return answer.status_code == 503

        until("refusal", refuses)

    stream(server, 2, terminate, tokens=150)
    assert server.wait_exit() == 0
    assert refused[-1] == 503


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_fault_is_told_in_one_line_and_in_a_file_where_one_was_asked_for(
    serve: Serve, tmp_path: Path, with_folder: bool
) -> None:
    folder = tmp_path / "faults"
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    options: dict[str, Any] = {"modules": {"worker": "sim_worker"}, "model": MODEL}
    if with_folder:
        options["fault_dir"] = str(folder)
    server = serve(api_processes=1, limits=limits, extra={"step_s": 0.02}, **options).wait_ready()
    stream(server, 5, lambda: os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL))

    def line() -> str | None:
        said = [event[2] for event in server.events() if event[0] == "warning"]
        return next((one for one in said if one.startswith("epoch 1 ended")), None)

    said = until("a line", line)
    assert "1 requests were in flight" in said and "SIGKILL" in said
    if not with_folder:
        assert not folder.exists() and "report:" not in said
        return
    (file,) = until("a report", lambda: list(folder.glob("*.json")))
    assert said.endswith(f"report: {file}")
    shown = subprocess.run(
        [sys.executable, "-m", "holdfast", "faults", str(file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "160"},
    ).stdout
    report = json.loads(file.read_text())
    assert report["in_flight"][0]["rows"][0]["request"] in shown
    assert "by its own fault: no" in shown and "Pages that these plans wrote" in shown
    assert "token_ids" not in file.read_text()
