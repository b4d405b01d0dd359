"""Measured processes: begun in a group of their own, and gone, all of them, when they are ended.

A server, or another engine, starts processes of its own; one that outlives its parent would hold
the GPU's memory from the next side of a comparison.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from holdfast.drill.server import end_with_us
from holdfast.errors import OperatorError, OptionError
from holdfast.proc import status

HOST = "127.0.0.1"
_POLL_S = 0.01
_KILLED_S = 30.0
# Loopback is asked directly, whatever proxy the environment names.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LOG_TAIL = 300
# A GPU's standby warms up at half speed at most (proc.pace): a minute where a start takes 20 s.
STANDBY_S_MAX = 180.0
_STANDBY_POLL_S = 0.1


def begin(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    stdout: int | IO[bytes] | None = None,
    option: str = "",
) -> subprocess.Popen[bytes]:
    """Start `command` in a group of its own; stderr, and stdout unless it is given, go to `log`.

    Raises OptionError(option) when there is nothing to run.
    """
    with log.open("wb") as said:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said if stdout is None else stdout,
                stderr=said,
                env=dict(env),
                start_new_session=True,
                preexec_fn=end_with_us,
            )
        except OSError as error:
            raise OptionError(option, f"cannot run {command[0]}: {error.strerror}") from None


def end(process: subprocess.Popen[bytes], *, grace_s: float, ask: bool = True) -> None:
    """Gone when this returns, with its group. ask: by SIGTERM; else it is ending by itself."""
    if ask:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    # Its group is its own (begin): no process of anybody else's is in it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_KILLED_S)


def tail(log: Path) -> str:
    """The last words of a log, on one line."""
    return " ".join(log.read_text(errors="replace").split())[-_LOG_TAIL:]


@dataclass(frozen=True, slots=True)
class Started:
    """seconds: from its start until it was ready; pid: of what `command` began."""

    url: str
    seconds: float
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How an engine's server is started. `command` of the port; ready_path answers 200 when it is
    ready, which it must be within timeout_s. option: what to change when it cannot be run. standby:
    what --standby it has, "" for an engine without one.
    """

    name: str
    command: Callable[[int], Sequence[str]]
    env: Mapping[str, str]
    ready_path: str
    timeout_s: float
    option: str = "holdfast serve"
    standby: str = ""

    @contextlib.contextmanager
    def running(self, **env: str) -> Iterator[Started]:
        """A server that is ready, ended afterwards. `env`: more of it.

        Raises OperatorError with its last words when it ends, or is not ready in time.
        """
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
            port, log = _free_port(), Path(folder) / "log"
            url = f"http://{HOST}:{port}"
            started_s = time.perf_counter()
            process = begin(
                self.command(port), env={**self.env, **env}, log=log, option=self.option
            )
            try:
                self._await_ready(process, url + self.ready_path, log, started_s)
                yield Started(url, time.perf_counter() - started_s, process.pid)
            finally:
                end(process, grace_s=60.0)

    def await_standby(self, started: Started, seconds: float = STANDBY_S_MAX) -> str:
        """What --standby it has, once nothing warms up beside it; "not warm" for a warm one that
        still does after so many seconds."""
        if self.standby != "warm":
            return self.standby
        end_s = time.monotonic() + seconds
        while not _standby_waits(started.pid):
            if time.monotonic() > end_s:
                return "not warm"
            time.sleep(_STANDBY_POLL_S)
        return "warm"

    def _await_ready(
        self, process: subprocess.Popen[bytes], url: str, log: Path, started_s: float
    ) -> None:
        while not _answers(url):
            if process.poll() is not None:
                raise OperatorError(
                    f"the server of {self.name} ended with code {process.returncode} before it "
                    f"was ready: {tail(log)}"
                )
            if time.perf_counter() - started_s > self.timeout_s:
                raise OperatorError(
                    f"the server of {self.name} was not ready within {self.timeout_s:g} s: "
                    f"{tail(log)}"
                )
            time.sleep(_POLL_S)


def our_server(arguments: Sequence[str], timeout_s: float) -> Server:
    """`holdfast serve` with these words; without an operator's keys, since no client has them."""

    def command(port: int) -> list[str]:
        words = [sys.executable, "-m", "holdfast", "serve", *arguments]
        return [*words, "--host", HOST, "--port", str(port), "--log-level", "warning"]

    return Server(
        name="holdfast",
        command=command,
        env={name: value for name, value in os.environ.items() if name != "HOLDFAST_API_KEY"},
        ready_path="/ready",
        timeout_s=timeout_s,
        standby=word_of(arguments, "--standby", "warm"),
    )


def word_of(arguments: Sequence[str], option: str, default: str) -> str:
    """What a command line says of an option that takes a word; the last one counts."""
    found = default
    words = " ".join(arguments).replace(option + "=", option + " ").split()
    for name, value in itertools.pairwise(words):
        if name == option:
            found = value
    return found


def _standby_waits(pid: int) -> bool:
    """Whether our server's standby is prepared."""
    facts = status.read(pid) or {}
    states = [p["state"] for p in facts.get("processes", ()) if "standby" in p["title"]]
    return states == ["prepared"]


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        return sock.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=2.0) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
