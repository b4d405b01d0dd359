"""Slot: one place for a process (api 0, core, worker 0, keeper 0) and the life of who fills it.

    gone -> starting -> ready -> (ends) -> waiting -> starting ...
                 \\---------> ending -> (ends)

It counts ends within a minute and says when the next process may start, or that enough is enough.
Owned by proc.supervisor, which alone starts and ends processes. Pure but for `time` passed in.
"""

from __future__ import annotations

import enum
import signal
from collections import deque
from dataclasses import dataclass, field

from holdfast.proc.child import Child, title

_WINDOW_S = 60.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0


class SlotState(enum.StrEnum):
    GONE = "gone"
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"  # told to end or killed; its pidfd has not fired
    WAITING = "waiting"  # its process ended; the next one starts at `spawn_s`


@dataclass(slots=True)
class Slot:
    """deadline_s: when STARTING or ENDING has taken too long. reason: why we ended it, if we did.

    killed: SIGKILL was sent. fault: the process's own last word. blameless: its end was our doing
    and does not count.
    fresh (api): no core that was ready has been told of this process.
    """

    role: str
    index: int = 0
    state: SlotState = SlotState.GONE
    since_s: float = 0.0
    child: Child | None = None
    deadline_s: float | None = None
    spawn_s: float | None = None
    restarts: int = 0
    reason: str = ""
    fault: str = ""
    operator: bool = False
    killed: bool = False
    blameless: bool = False
    fresh: bool = False
    detail: str = ""
    _ends: deque[float] = field(default_factory=deque)

    @property
    def title(self) -> str:
        return title(self.role, self.index)

    @property
    def alive(self) -> bool:
        """A process is here that can still be spoken to."""
        return self.state in (SlotState.STARTING, SlotState.READY)

    def enter(self, state: SlotState, now_s: float, deadline_s: float | None = None) -> None:
        self.state = state
        self.since_s = now_s
        self.deadline_s = deadline_s

    def started(self, child: Child, now_s: float, deadline_s: float) -> None:
        self.child = child
        self.spawn_s = None
        self.reason = self.fault = ""
        self.operator = self.killed = self.blameless = False
        self.enter(SlotState.STARTING, now_s, deadline_s)

    def ended(self, status: int, now_s: float) -> None:
        """The process is gone, with this exit status (negative: a signal)."""
        said = self.fault or self.reason
        self.detail = how_it_ended(status) + (f": {said}" if said else "")
        self.child = None
        self.enter(SlotState.GONE, now_s)
        if not self.blameless:
            self._ends.append(now_s)

    def may_restart(self, now_s: float, restarts_per_minute: int) -> bool:
        """Put the next start on the clock, unless it has ended too often within a minute."""
        while self._ends and now_s - self._ends[0] > _WINDOW_S:
            self._ends.popleft()
        count = len(self._ends)
        if count > restarts_per_minute:
            return False
        delay_s = 0.0 if count < 2 else min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** (count - 2))
        self.restarts += 1
        self.enter(SlotState.WAITING, now_s)
        self.spawn_s = now_s + delay_s
        return True

    def next_s(self) -> float | None:
        """When the supervisor must look at this slot again."""
        times = [at for at in (self.deadline_s, self.spawn_s) if at is not None]
        return min(times) if times else None


def how_it_ended(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
