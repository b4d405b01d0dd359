"""A server started by the command line, seen by a shell: what it prints, hides and leaves."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.proc import status

KEY = "sk-a-secret-of-this-test"
START_TIMEOUT_S = 60


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    said: list[str]

    def children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HOLDFAST_")}
    return {**kept, "COLUMNS": "100"}


def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | env,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = ["--port", "0", "--kv-pages", "600", "--max-rows", "8", "--threads", "1"]
    options += ["--served-name", "tiny", "--api-key", KEY]
    process = subprocess.Popen(
        [sys.executable, "-m", "holdfast", "serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        said = [line_within(process)]
        assert said[0].startswith("holdfast serves tiny on http://127.0.0.1:"), said
        said += [line_within(process) for _ in range(4)]
        wait_for_standby(process.pid)
        yield Server(process, said[0].split()[-1], said)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def line_within(process: subprocess.Popen[str]) -> str:
    """The next line of stdout; fails with what stderr says when the server ends instead."""
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        assert process.stderr is not None
        pytest.fail(f"the server ended: {process.stderr.read()[-2000:]}")
    return line.rstrip("\n")


def wait_for_standby(pid: int) -> None:
    """The last process to come; a second after the others."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        facts = status.read(pid)
        assert facts is not None and time.monotonic() < deadline, facts
        if [p["state"] for p in facts["processes"] if "standby" in p["title"]] == ["prepared"]:
            return
        time.sleep(0.05)


def test_its_start_lines_say_how_it_computes(server: Server) -> None:
    assert server.said[1].strip() == "cpu, float32, reference kernels, graphs off"


def test_the_curl_line_it_prints_is_a_request_that_works_and_holds_no_key(server: Server) -> None:
    assert KEY not in server.said[4]
    # As a shell reads it; urllib sends it, since a bare machine may have no curl.
    words = shlex.split(server.said[4])
    assert words[0] == "curl"
    headers = dict(words[i + 1].split(": ", 1) for i, w in enumerate(words) if w == "-H")
    headers["Authorization"] = headers["Authorization"].replace("$HOLDFAST_API_KEY", KEY)
    body = words[words.index("-d") + 1]
    request = urllib.request.Request(words[1], body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["message"]["content"]


def test_no_command_line_shows_the_key_once_it_serves(server: Server) -> None:
    pids = [server.process.pid, *server.children()]
    assert len(pids) == 6  # supervisor, keeper, core, api, worker, standby
    for pid in pids:
        shown = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert KEY.encode() not in shown, pid
        assert shown.startswith(b"holdfast "), shown


def test_ps_shows_every_process_and_its_state(server: Server) -> None:
    done = run("ps", "--json")
    mine = [s for s in json.loads(done.stdout) if s["pid"] == server.process.pid]
    assert len(mine) == 1
    states = {process["title"]: process["state"] for process in mine[0]["processes"]}
    titles = ("holdfast api 0", "holdfast core", "holdfast worker 0", "holdfast keeper 0")
    assert states == dict.fromkeys(titles, "ready") | {"holdfast standby 0": "prepared"}
    shown = run("ps").stdout
    for title in titles:
        assert title in shown
    assert KEY not in done.stdout + shown


def test_chat_with_a_running_server_streams_each_line_of_stdin_as_a_turn(server: Server) -> None:
    done = run(
        "chat",
        "--url",
        server.address,
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        stdin="What is a list?\n/clear\nWhat is a list?\n",
        HOLDFAST_API_KEY=KEY,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert answers and answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_chat_says_what_the_server_says_of_a_wrong_key(server: Server) -> None:
    done = run("chat", "--url", server.address, "--api-key", "wrong")
    assert (done.returncode, done.stdout) == (1, "")
    assert "401" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_it_with_code_0_and_nothing_is_left(server: Server) -> None:
    with urllib.request.urlopen(f"{server.address}/health", timeout=10) as answer:
        assert answer.status == 200
    children = server.children()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_generate_answers_in_this_process_and_the_same_seed_twice_the_same() -> None:
    asked = ("--max-tokens", "16", "--seed", "5", "--threads", "1", "--kv-pages", "300")
    first = run("generate", "What is a tuple?", *asked)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert run("generate", "-", *asked, stdin="What is a tuple?").stdout == first.stdout


def test_generate_names_a_sampling_value_that_is_out_of_range() -> None:
    done = run("generate", "Hi", "--temperature", "3", "--kv-pages", "300")
    assert done.returncode == 2
    assert done.stderr.startswith("holdfast: --temperature: ")
    assert len(done.stderr.splitlines()) == 1


def test_chat_in_this_process_answers_a_scripted_talk() -> None:
    asked = ("--max-tokens", "8", "--temperature", "0", "--threads", "1", "--kv-pages", "300")
    done = run("chat", *asked, stdin="Hello\nWhat is a list?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
