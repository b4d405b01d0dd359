"""Who hangs without a deadline of its own; and how a fault's clocks are told."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from conftest import until

from holdfast.core.metrics import Metrics
from holdfast.proc.fault_clocks import FaultClocks
from holdfast.proc.heartbeat import PERIOD_S, Heartbeat
from holdfast.proc.lifecycle.actions import Lost
from holdfast.proc.lifecycle.states import Role
from holdfast.proc.starvation import Starvation, waited_ns


def run(beat: Heartbeat, now_s: float, seconds: float, answers: tuple[int, ...] = ()) -> list[int]:
    """Ticks of half a second over so long, of processes 1 and 2; who was silent."""
    found = []
    for tick in range(int(seconds * 2)):
        ask, silent = beat.tick([1, 2], now_s + tick / 2)
        found += silent
        for process in ask:
            if process in answers:
                beat.answered(process)
    return found


def test_a_process_that_answers_nothing_is_named_once_after_its_timeout() -> None:
    beat = Heartbeat(10, 0.0)
    assert run(beat, 0.0, 9.5, answers=(2,)) == []
    assert run(beat, 9.5, 5.0, answers=(2,)) == [1]


def test_an_answer_is_awaited_before_the_next_question() -> None:
    beat = Heartbeat(10, 0.0)
    assert beat.tick([1], 0.0)[0] == [1]
    assert beat.tick([1], PERIOD_S * 3)[0] == []
    beat.answered(1)
    assert beat.tick([1], PERIOD_S * 3.1)[0] == [1]


def test_time_in_which_the_supervisor_slept_blames_nobody() -> None:
    beat = Heartbeat(10, 0.0)
    beat.tick([1], 0.0)
    assert beat.tick([1], 3600.0) == ([], [])
    beat.answered(1)
    assert run(beat, 3600.0, 30.0, answers=(1, 2)) == []


def test_a_process_that_is_not_to_be_asked_any_more_owes_nothing() -> None:
    beat = Heartbeat(10, 0.0)
    beat.tick([1], 0.0)
    for now_s in range(1, 20):
        assert beat.tick([], float(now_s)) == ([], [])
    assert beat.tick([1], 20.0) == ([1], [])


def lost(role: Role = Role.WORKER, **facts: object) -> Lost:
    values = {
        "title": f"holdfast {role} 0",
        "role": role,
        "kind": "worker_killed" if role is Role.WORKER else str(role),
        "detail": "killed by SIGKILL",
        "noticed_at_s": 100.0,
        "noticed_s": None,
        "fenced_s": 0.003,
    }
    return Lost(**{**values, **facts})


def test_a_fault_is_one_line_with_its_three_clocks() -> None:
    metrics = Metrics.private()
    clocks = FaultClocks(metrics)
    clocks.lost(lost(noticed_s=0.0004))
    clocks.lost(lost(Role.CORE, noticed_at_s=100.05))
    first, second = clocks.resumed(12, 100.15)
    assert (first.kind, first.title) == ("resumed", "holdfast worker 0")
    assert first.message == (
        "killed by SIGKILL; noticed 0.4 ms, fenced 3.0 ms, resumed 0.15 s, 12 streams"
    )
    assert "noticed by end of file" in second.message
    assert "resumed 0.10 s" in second.message or "resumed 100.0 ms" in second.message
    assert metrics.get("faults_total", ("worker_killed",)) == 1
    assert metrics.get("resumes_total") == 1 and metrics.get("streams_resumed_total") == 12
    # Said once; and what nobody waited for is not said.
    assert clocks.resumed(12, 101.0) == []
    clocks.lost(lost(Role.API))
    assert clocks.resumed(1, 102.0) == []
    assert metrics.get("faults_total", ("api",)) == 1


def test_a_process_that_spins_among_others_has_waited_and_one_that_sleeps_has_not() -> None:
    spin = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    # More than there are cores, so that some wait.
    count = (os.cpu_count() or 1) + 2
    children = [subprocess.Popen(c, stdout=subprocess.PIPE) for c in [spin] * count + [sleep]]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline()
        watches = [Starvation() for _ in children]
        for watch, child in zip(watches, children, strict=True):
            watch.watch(child.pid)
            watch.rested(time.monotonic())
        if not waited_ns(children[0].pid):
            assert watches[0].starved() == 0.0, "a kernel that does not count: nobody waited"
            return
        until("waited", lambda: sum(watch.starved() for watch in watches[:-1]) > 0.2)
        assert watches[-1].starved() < 0.2
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert watches[0].starved() == 0.0, "it is gone"


def test_the_clock_is_rested_at_most_once_a_second() -> None:
    read: list[int] = []

    def waited(pid: int) -> dict[int, int]:
        read.append(pid)
        return {1: len(read) * 10**9, 2: 0}

    watch = Starvation(waited)
    watch.rested(0.0)
    assert watch.starved() == 0.0 and not read
    watch.watch(7)
    for now_s in (1.0, 1.5, 1.9):
        watch.rested(now_s)
    assert read == [7] and watch.starved() == 1.0
    watch.rested(2.1)
    assert watch.starved() == 1.0
