"""Slot: one place for a process (api 0, core, worker 0, standby 0, keeper 0) and what is known of
who fills it. Owned by machine.Lifecycle; no rule lives here."""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields
from operator import attrgetter

from holdfast.proc.lifecycle.policy import RESTART_WINDOW_S
from holdfast.proc.lifecycle.states import ALIVE, Role, State


@dataclass(slots=True)
class Slot:
    """process: its number, None when none is here. deadline_s: when the state has taken too long,
    or of PAUSED: is over. epoch (worker): 0 before its promotion. loaded: it found weights.

    reason: why we ended it. fault: its own last word. operator: which the operator can mend.
    hung: the core's word, no result came in time. cause: the kind of its fault, as far as it is
    known before its exit status is. noticed_s: when its end was first heard of; word_s: when that
    had been said.
    blameless: its end was our doing and does not count. orphan: its core ended first, and nobody
    asks any more what it computed. detail: how the last one ended. ends: when those that count
    ended, oldest first, of the last minute.
    """

    role: Role
    index: int = 0
    state: State = State.GONE
    since_s: float = 0.0
    process: int | None = None
    deadline_s: float | None = None
    epoch: int = 0
    loaded: bool = False
    reason: str = ""
    fault: str = ""
    operator: bool = False
    hung: bool = False
    cause: str = ""
    noticed_s: float | None = None
    word_s: float | None = None
    blameless: bool = False
    orphan: bool = False
    restarts: int = 0
    detail: str = ""
    ends: tuple[float, ...] = ()

    def copy(self) -> Slot:
        """An equal one of its own."""
        return Slot(*_values(self))

    @property
    def title(self) -> str:
        return title(self.role, self.index)

    @property
    def alive(self) -> bool:
        """A process is here that can still be spoken to."""
        return self.state in ALIVE

    def enter(self, state: State, now_s: float, deadline_s: float | None) -> None:
        if self.alive and state not in ALIVE and self.noticed_s is None:
            self.noticed_s = now_s
        self.state = state
        self.since_s = now_s
        self.deadline_s = deadline_s

    def filled(self, process: int) -> None:
        """A new process is here."""
        self.process = process
        self.epoch = 0
        self.loaded = self.operator = self.hung = False
        self.blameless = self.orphan = False
        self.reason = self.fault = self.cause = ""
        self.noticed_s = self.word_s = None

    def move_from(self, other: Slot) -> None:
        """The process of `other` is here from now on, in the state that it is in."""
        assert other.process is not None
        self.filled(other.process)
        self.loaded = other.loaded
        self.enter(other.state, other.since_s, other.deadline_s)
        other.process = None
        other.enter(State.GONE, other.since_s, None)

    def ended(self, how: str, now_s: float) -> None:
        """The process is gone."""
        said = self.fault or self.reason
        self.detail = how + (f": {said}" if said else "")
        self.process = None
        if not self.blameless:
            self.ends = (*self.recent(now_s), now_s)

    def faulted(self, status: int) -> bool:
        """Whether the process that ended with this exit status did so by its own fault.

        SIGKILL is somebody's hand: ours, because the core did not believe it, or another's; unless
        it had said a fault, or hung. A worker whose link is closed exits with 0.
        """
        if self.orphan:
            return False
        return self.hung or bool(self.fault) or status not in (0, -signal.SIGKILL)

    def kind(self, status: int | None) -> str:
        """Of its fault, as the metric faults_total has it. status: None when it was not made."""
        if status is None:
            return "unstarted"
        if self.role is not Role.WORKER:
            return str(self.role)
        return self.cause or ("worker_killed" if status == -signal.SIGKILL else "worker_crash")

    def recent(self, now_s: float) -> tuple[float, ...]:
        """The ends that count at this time."""
        return tuple(at for at in self.ends if now_s - at <= RESTART_WINDOW_S)


_values = attrgetter(*(field.name for field in fields(Slot)))


def title(role: str, index: int) -> str:
    """What lists of processes show."""
    return "holdfast core" if role == "core" else f"holdfast {role} {index}"


def how_it_ended(status: int) -> str:
    """An exit status in words; negative: a signal."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
