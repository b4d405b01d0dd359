"""Starvation: how long the threads of another process have waited for a processor.

Linux counts it per thread in /proc/PID/task/TID/schedstat: the second figure, nanoseconds in which
the thread could have run and another did. A process that hangs, is stopped or sleeps does not
count up; one on a machine with more load than cores does. So core.clocks can tell the two apart.
Where the kernel does not count (CONFIG_SCHED_INFO off, some sandboxes) it is always zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable

# The figures are read when a step starts, but at most once in so long: some 50 us each time.
REST_S = 1.0


def waited_ns(pid: int) -> dict[int, int]:
    """Nanoseconds waited by each thread (tid) since it began; empty when nobody counts, or the
    process is gone."""
    found = {}
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/schedstat", "rb") as file:
                found[int(tid)] = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return found
    return found


class Starvation:
    """Of one process at a time. `read` replaces /proc (tests)."""

    def __init__(self, read: Callable[[int], dict[int, int]] = waited_ns) -> None:
        self._read = read
        self._pid: int | None = None
        self._before: dict[int, int] = {}
        self._read_s = float("-inf")

    def watch(self, pid: int | None) -> None:
        """This process from now on; None: nobody."""
        self._pid, self._before, self._read_s = pid, {}, float("-inf")

    def rested(self, now_s: float) -> None:
        """Count from now on, or from at most REST_S ago."""
        if self._pid is not None and now_s - self._read_s >= REST_S:
            self._before, self._read_s = self._read(self._pid), now_s

    def starved(self) -> float:
        """Seconds that the thread which waited longest has waited since then."""
        if self._pid is None:
            return 0.0
        after = self._read(self._pid)
        waits = (waited - self._before.get(tid, 0) for tid, waited in after.items())
        return max(waits, default=0) * 1e-9
