"""FaultClocks: what each fault cost, on three clocks (DESIGN 1): noticed, fenced, resumed.

It hears of every lost process (lifecycle.actions.Lost) and, from the core, of the first new token
after one; it counts both in /metrics and says one line a fault. Owned by the supervisor; it decides
nothing. It must not know how a process ends.
"""

from __future__ import annotations

from collections import deque

from holdfast.core.metrics import Metrics
from holdfast.proc.lifecycle.actions import Lost, Notice
from holdfast.proc.lifecycle.states import Role

# Without these nobody computes a token; whoever lost an api process or a standby waits for nothing.
_NEEDED = (Role.WORKER, Role.CORE, Role.KEEPER)
# Faults since the last new token that are told one by one: restarts are bounded a minute.
_OPEN_MAX = 100


class FaultClocks:
    """`lost` and `resumed` as they are heard of, in order."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._open: deque[Lost] = deque(maxlen=_OPEN_MAX)

    def lost(self, lost: Lost) -> None:
        """A process ended by a fault."""
        self._metrics.add("faults_total", labels=(lost.kind,))
        if lost.noticed_s is not None:
            self._metrics.observe("noticed_seconds", lost.noticed_s)
        if lost.fenced_s is not None:
            self._metrics.observe("fenced_seconds", lost.fenced_s)
        if lost.role in _NEEDED:
            self._open.append(lost)

    def resumed(self, streams: int, at_s: float) -> list[Notice]:
        """The core has a new token of one of `streams`, or none of them waited, since `at_s`."""
        if not self._open:
            return []
        self._metrics.add("resumes_total")
        self._metrics.add("streams_resumed_total", streams)
        told = []
        for lost in self._open:
            seconds = max(0.0, at_s - lost.noticed_at_s)
            self._metrics.observe("resumed_seconds", seconds)
            told.append(Notice("resumed", lost.title, _line(lost, seconds, streams)))
        self._open.clear()
        return told


def _line(lost: Lost, resumed_s: float, streams: int) -> str:
    # Death without a word is seen by the end of its socket: how long it took nobody can know.
    noticed = "by end of file" if lost.noticed_s is None else show_seconds(lost.noticed_s)
    fenced = "no process" if lost.fenced_s is None else f"fenced {show_seconds(lost.fenced_s)}"
    clocks = f"noticed {noticed}, {fenced}, resumed {show_seconds(resumed_s)}"
    return f"{lost.detail}; {clocks}, {streams} stream{'' if streams == 1 else 's'}"


def show_seconds(seconds: float) -> str:
    """Milliseconds below a tenth of a second."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
