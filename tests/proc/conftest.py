"""Servers of fake roles for the process tests: real processes, nothing behind them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.proc import status

HERE = Path(__file__).parent
WAIT_S = 20.0

SCRIPT = """
import json, sys
from pathlib import Path
from holdfast.config import Limits
from holdfast.errors import OperatorError
from holdfast.proc.supervisor import ServeOptions, Supervisor

asked = json.loads(sys.argv[2])

class Spec:
    path = Path(asked.pop("model", sys.argv[1]))
    def weights_bytes(self, dtype): return 4096
    def kv_token_bytes(self, dtype): return 4

bounds = {"vocab_size": 8, "context_tokens": 64, "pages": 8, "rows_max": 4,
          "queue_requests": 8, "live_tokens": 1024, "api_processes": asked.pop("api_processes", 2)}
limits = Limits(**{**bounds, **asked.pop("limits", {})})
modules = asked.pop("modules", {r: "fake_role" for r in ("keeper", "worker", "core", "api")})
for name in ("journal_dir", "fault_dir", "gpu_coredump"):
    if name in asked:
        asked[name] = Path(asked[name])
if asked.pop("real", False):
    from holdfast.model.spec import ModelSpec
    spec = ModelSpec.load(Spec.path)
else:
    spec = Spec()
options = ServeOptions(spec=spec, limits=limits, served_name="fake", **asked)

def show(event):
    print(json.dumps([event.kind, event.title, event.message, dict(event.facts)]), flush=True)

try:
    supervisor = Supervisor(options, on_event=show, modules=modules)
    code = supervisor.run()
except OperatorError as error:
    print(json.dumps(["operator", "", str(error), {}]), flush=True)
    code = 2
sys.exit(code)
"""


def until(what: str, check: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """The first true value of `check`, which is asked again and again; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return value


def gone(pid: int) -> bool:
    """A process that ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Server:
    """A supervisor of fake roles in a process of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.log_path = folder / "log"
        self.log_path.touch()
        act = options.pop("act", {})
        options.setdefault("port", 0)
        options.setdefault("standby", "none")
        # A standby that takes CPU time left over would wait for the other tests (proc.background).
        extra = {"background": False, **options.pop("extra", {})}
        options["extra"] = {"log": str(self.log_path), "act": act, **extra}
        self.out_path = folder / "out"
        with self.out_path.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder), json.dumps(options)],
                stdout=out,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(HERE)},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def events(self) -> list[list[Any]]:
        return [
            json.loads(line)
            for line in self.out_path.read_text().splitlines(True)
            if line[-1] == "\n"
        ]

    def event(self, kind: str, title: str = "") -> list[Any] | None:
        found = [e for e in self.events() if e[0] == kind and title in e[1]]
        return found[-1] if found else None

    def log(self, role: str, event: str, **facts: Any) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [
            line
            for line in lines
            if line["role"] == role
            and line["event"] == event
            and all(line.get(k, line.get("message", {}).get(k)) == v for k, v in facts.items())
        ]

    def messages(self, role: str, kind: str, **facts: Any) -> list[dict[str, Any]]:
        return self.log(role, "message", **{**facts, "type": kind})

    def wait_ready(self) -> Server:
        def ready() -> Any:
            assert self.process.poll() is None or self.event("ready"), self.stderr()
            return self.event("ready")

        until("ready", ready)
        return self

    def pids(self) -> dict[str, int]:
        found = status.read(self.pid)
        assert found is not None
        return {process["title"]: process["pid"] for process in found["processes"]}

    def status(self) -> dict[str, Any]:
        found = status.read(self.pid)
        assert found is not None
        return found

    def wait_exit(self, seconds: float = WAIT_S) -> int:
        return self.process.wait(seconds)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        servers.append(Server(tmp_path / f"server{len(servers)}", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
