"""A standby prepares itself with CPU time that is left over, and serves like any other worker."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server, until
from test_http_failover import MODEL, stream
from test_standby import STANDBY, WORKER, prepared

from holdfast.proc.background import Background, leave_background

Serve = Callable[..., Server]


def classes(pid: int) -> list[int]:
    """The scheduling class of each thread of a process."""
    found = []
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            found.append(os.sched_getscheduler(int(name)))
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(autouse=True)
def share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `holdfast serve` does: threads of a worker do not spin for ever (cli.engine)."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")


def real(serve: Serve, **options: Any) -> Server:
    limits = {"vocab_size": 6144, "context_tokens": 256, "pages": 128, "live_tokens": 4096}
    shape: dict[str, Any] = {"modules": {}, "model": MODEL, "real": True, "standby": "warm"}
    shape |= {"api_processes": 1, "limits": limits, "threads": 2, "extra": {"background": True}}
    return serve(**shape | options).wait_ready()


def starting(server: Server) -> int:
    """The pid of a standby that is preparing itself, in the background already."""

    def pid() -> int | None:
        facts = {p["title"]: p for p in server.status()["processes"]}[STANDBY]
        begun = facts["state"] == "starting" and os.SCHED_IDLE in classes(facts["pid"])
        return facts["pid"] if begun else None

    return until("a standby in the background", pid, 60)


def test_work_in_the_background_has_the_idle_class_and_its_maker_keeps_its_own() -> None:
    seen: list[int] = []

    def work() -> int:
        seen.append(os.sched_getscheduler(0))
        inner = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        inner.start()
        inner.join()
        return 7

    task = Background(work)
    assert task.wait(20) and task.result() == 7
    assert seen == [os.SCHED_IDLE] * 2
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_an_error_in_the_background_is_raised_where_the_result_is_asked_for() -> None:
    def work() -> None:
        raise ValueError("of the work")

    task = Background(work)
    assert task.wait(20)
    with pytest.raises(ValueError, match="of the work"):
        task.result()


def test_work_leaves_the_background_when_it_is_asked_to() -> None:
    go = threading.Event()
    seen: list[int] = []

    def work() -> None:
        go.wait(20)
        seen.append(os.sched_getscheduler(0))

    task = Background(work)
    until("idle", lambda: os.SCHED_IDLE in classes(os.getpid()))
    left = leave_background()
    go.set()
    # False where this user may not; then nothing has changed.
    assert task.wait(20) and seen == [os.SCHED_OTHER if left else os.SCHED_IDLE]
    assert left or os.geteuid() != 0


def test_a_promoted_standby_has_no_thread_in_the_background(serve: Serve) -> None:
    server = real(serve)
    assert os.SCHED_OTHER in classes(starting(server)), "the main thread is never in it"
    standby = prepared(server, 90)
    undisturbed = stream(server, tokens=60)

    def kill() -> None:
        os.kill(server.pids()[WORKER], signal.SIGKILL)

    assert stream(server, 5, kill, tokens=60) == undisturbed
    assert server.pids()[WORKER] == standby
    found = classes(standby)
    # As many that compute as were asked for, and none of them slow.
    assert set(found) == {os.SCHED_OTHER} and len(found) >= 2


def needed_early(server: Server) -> tuple[str, int]:
    """Kill the worker while its standby is still being prepared, until that is in a hurry: what an
    undisturbed stream says, and the standby's pid."""
    undisturbed = stream(server, tokens=60)
    os.kill(prepared(server, 90), signal.SIGKILL)
    standby = starting(server)
    os.kill(server.pids()[WORKER], signal.SIGKILL)
    until("the place is taken", lambda: server.pids()[WORKER] == standby)
    until("it is in a hurry", lambda: set(classes(standby)) == {os.SCHED_OTHER}, 60)
    return undisturbed, standby


def test_a_standby_that_is_needed_before_it_is_prepared_leaves_the_background(
    serve: Serve,
) -> None:
    server = real(serve)
    undisturbed, standby = needed_early(server)
    assert stream(server, tokens=60) == undisturbed
    assert server.pids()[WORKER] == standby and server.status()["epoch"] == 2


def test_where_nobody_may_leave_the_background_the_process_starts_again(serve: Serve) -> None:
    """As an ordinary user's does; the worker gives its privilege up, in case a test has it."""
    server = real(serve, modules={"worker": "humble_worker"})
    undisturbed, standby = needed_early(server)
    # The same process, which has gone through its start a second time.
    assert stream(server, tokens=60) == undisturbed
    assert server.pids()[WORKER] == standby and server.status()["epoch"] == 2
