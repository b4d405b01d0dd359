"""Background: a process prepares itself with CPU time that nobody else wants, until it is needed.

A standby imports a tensor library and warms up beside streams that run on the same cores. Linux
schedules threads, so the work is done in a thread of the SCHED_IDLE class and the main thread stays
as it is: what serves later was never slow. An ordinary user may enter that class and not leave it
(that takes CAP_SYS_NICE or RLIMIT_NICE), hence `hurry` leaves it where it may, and else starts the
process anew by `exec` (proc.child.start_again): same pid, same descriptors, same parent, and in the
foreground from then on. A thread of the class also dies when there is time left over, so whoever
kills the process takes it out of there first, where it may.

A GPU is shared by turns, whatever class a thread is in: there a standby is paced (proc.pace).

The work must not touch the control channel, which the main thread reads meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

# A start takes two to four seconds of a core. On a machine whose cores are all taken it would never
# end, and a second fault would find no standby: after so long it is the others' equal.
PATIENCE_S = 30.0
# Between two looks at whether the work is done: what a promotion may wait for it at worst.
LOOK_S = 0.02


class Background:
    """`work` in a thread of its own; `result` gives what it returned or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the work is over; waits up to `timeout_s` for it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Call it once `wait` said True."""
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        # 0 is the calling thread. Threads that it starts inherit the class.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            self._value = self._work()
        except BaseException as error:  # Raised again in the main thread, by `result`.
            self._error = error


def leave_background(pid: int | None = None) -> bool:
    """Every thread of a process, this one if none is named, back in the usual class; False when we
    may not do that."""
    try:
        names = os.listdir(f"/proc/{'self' if pid is None else pid}/task")
    except FileNotFoundError:
        return True  # It has ended, and with it every thread.
    for name in names:
        try:
            if os.sched_getscheduler(int(name)) == os.SCHED_IDLE:
                os.sched_setscheduler(int(name), os.SCHED_OTHER, os.sched_param(0))
        except ProcessLookupError:
            continue  # That thread has ended.
        except PermissionError:
            return False
    return True
