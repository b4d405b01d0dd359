"""DrillServer: a real `holdfast serve --drills` on a loopback port of its own, to be broken.

Owns the process and what it says on stderr. Everything else is asked of it as any operator would:
its status socket, its /metrics.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import Any

from holdfast.errors import OperatorError
from holdfast.proc import status
from holdfast.proc.lifecycle.policy import RESTART_WINDOW_S

START_S = 180.0
STOP_S = 60.0
_LINES_KEPT = 400
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl
_POLL_S = 0.02
# A worker that steps says it between two of them.
_TELL_S_MAX = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a drill asks of its server; equal needs may share one."""

    api_processes: int = 1
    rows: int = 64
    kv_pages: int = 1200
    queue_requests: int | None = None
    keys: tuple[str, ...] = ()
    graphs: bool = False
    """Decode steps are replayed, on a CPU too; on a GPU they are in any case."""
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        given = ["--max-rows", self.rows, "--kv-pages", self.kv_pages]
        given += ["--api-processes", self.api_processes, *self.options]
        if self.queue_requests is not None:
            given += ["--queue-requests", self.queue_requests]
        if self.graphs:
            given += ["--graphs", "on"]
        return [str(one) for one in given]


def end_with_us() -> None:
    """In the new process: a drill that is killed leaves no server behind."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class DrillServer:
    """Ready when made. Raises OperatorError when it does not come up."""

    def __init__(self, needs: Needs, *, model: str | None, device: str, threads: int) -> None:
        self.needs = needs
        self._paced = device != "cpu"
        self._ends: deque[float] = deque()
        self.said: deque[str] = deque(maxlen=_LINES_KEPT)
        self.url = ""
        self._ready = threading.Event()
        command = [sys.executable, "-m", "holdfast", "serve", *([model] if model else [])]
        command += ["--drills", "--port", "0", "--device", device, "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, *needs.arguments()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HOLDFAST_API_KEY": " ".join(needs.keys), "COLUMNS": "200"},
            preexec_fn=end_with_us,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_S) or not self.url:
            self.close()
            last = " | ".join(list(self.said)[-3:]) or "it said nothing"
            raise OperatorError(f"the server of the drill did not come up: {last}")
        host, _, port = self.url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.name = self.status()["model"]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """What `ps` shows. Raises OperatorError when the supervisor does not answer."""
        found = status.read(self.process.pid)
        if found is None:
            raise OperatorError(f"the drill's server does not answer: {' | '.join(self.tail())}")
        return found

    def state(self, title: str) -> str:
        """Of one process, such as `standby 0`; `none` when it has no place."""
        found = [p for p in self.status()["processes"] if p["title"] == f"holdfast {title}"]
        return found[0]["state"] if found else "none"

    def provoke(self, **order: Any) -> float:
        """Give a drill's order: the moment it was taken, of the monotonic clock.

        Raises OperatorError with the server's refusal.
        """
        answer = status.ask(self.process.pid, {"provoke": order})
        if answer is None or "error" in answer:
            said = "no answer" if answer is None else answer["error"]
            raise OperatorError(f"the server does not do {order}: {said}")
        return answer["at_s"]

    def tell(self) -> None:
        """Until the worker has said what it counted, which it does once a second unasked: metrics
        are then of every step so far. Raises OperatorError when it does not."""
        since_s = time.monotonic()
        self.provoke(do="tell")
        while time.monotonic() < since_s + _TELL_S_MAX:
            if any(moment["kind"] == "told" for moment in self.moments("provoked", since_s)):
                return
            time.sleep(_POLL_S)
        raise OperatorError(f"the worker did not say what it counted within {_TELL_S_MAX:g} s")

    def moments(self, event: str, since_s: float = 0.0) -> list[dict[str, Any]]:
        """What the supervisor noted, oldest first."""
        found = self.status()["drills"]
        return [m for m in found if m["event"] == event and m["at_s"] >= since_s]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, `holdfast_` left out."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {name.removeprefix("holdfast_"): float(value) for name, _, value in pairs}

    def wait_warm(self, seconds: float) -> bool:
        """Until every process is up, and a standby prepared where one is kept. On a GPU it is told
        to hurry: it takes half a minute on purpose (proc.pace), beside streams that are none."""
        deadline_s, hurried = time.monotonic() + seconds, 0
        while time.monotonic() < deadline_s:
            found = self.status()
            if status.at_rest(found):
                return True
            pids = [p["pid"] for p in found["processes"] if p["title"] == "holdfast standby 0"]
            if self._paced and pids and pids[0] not in (None, hurried):
                with contextlib.suppress(OperatorError):  # It may be gone again.
                    self.provoke(do="hurry")
                hurried = pids[0]
            time.sleep(_POLL_S)
        return False

    def spend(self, ends: int) -> None:
        """So many ends of its worker are of now."""
        self._ends.extend([time.monotonic()] * ends)

    @property
    def recent_ends(self) -> int:
        """Ends of its worker that still count against it."""
        while self._ends and time.monotonic() - self._ends[0] > RESTART_WINDOW_S:
            self._ends.popleft()
        return len(self._ends)

    def tail(self) -> list[str]:
        """Its last lines."""
        return list(self.said)[-5:]

    def close(self) -> int:
        """SIGTERM, and its exit code; SIGKILL when that takes too long."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait(STOP_S)
        self._reader.join(5)
        if not self._reader.is_alive() and self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if not self.url and " on http://" in line:
                self.url = line.split(" on ")[1].strip()
                self._ready.set()
        self._ready.set()
