"""The words of the state table: who there is, what state it can be in, what can happen to it.

Data only. Owned by proc.lifecycle; values are what `holdfast ps` and docs/processes.md show.
"""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    KEEPER = "keeper"
    CORE = "core"
    API = "api"
    WORKER = "worker"
    """The one process that may write pages, or the one that will."""
    STANDBY = "standby"
    """The next worker: it has no epoch, reads, and writes nothing but the trash page."""


class State(StrEnum):
    GONE = "gone"
    PAUSED = "paused"
    """No process; one may be started when the pause is over."""
    STARTING = "starting"
    PREPARED = "prepared"
    """Imported, memory mapped, warm: waits for an epoch."""
    VERIFYING = "verifying"
    """Reads the weights and sums them."""
    SUMMED = "summed"
    """The keeper compares the sum."""
    VERIFIED = "verified"
    READY = "ready"
    """Serves; of a worker: it has an epoch and the core's link, and may write."""
    ENDING = "ending"
    """Told to end, or about to by itself; its pidfd has not fired."""
    KILLED = "killed"
    """SIGKILL was sent; its pidfd has not fired."""


class Event(StrEnum):
    # Words of the process, or about it.
    READY = "ready"
    PROGRESS = "progress"
    SUM = "sum"
    GOOD = "good"
    BAD = "bad"
    DRAINED = "drained"
    ACCUSED = "accused"
    FAULT = "fault"
    BROKEN = "broken"
    # What the kernel says.
    EOF = "eof"
    EXITED = "exited"
    UNSTARTED = "unstarted"
    # What the clock says.
    SILENT = "silent"
    """It was asked whether it is there, and did not answer in time."""
    DEADLINE = "deadline"
    DUE = "due"


class Phase(StrEnum):
    """Of the whole server."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENDING = "ending"
    STOPPING = "stopping"
    OVER = "over"


class Turn(StrEnum):
    """What happens to the whole server."""

    UP = "all ready"
    SIGNAL = "signal"
    OPERATOR = "operator's fault"
    CANNOT = "cannot go on"
    UNFENCED = "unfenced"
    DRAINED = "drained"
    TIME_UP = "time up"
    NO_CORE = "no core"
    EMPTY = "no process left"


class Wait(StrEnum):
    """Named deadlines; proc.lifecycle.policy has the seconds."""

    START = "start"
    VERIFY = "verify"
    COMPARE = "compare"
    DYING = "dying"
    STOP = "stop"
    API_STOP = "api stop"
    FENCE = "fence"
    HEARTBEAT = "heartbeat"
    """Not of a state: how long an answer to a ping may take."""
    DRAIN = "drain"
    END = "end"


class Standby(StrEnum):
    """When the next worker is started."""

    WARM = "warm"
    """While the worker serves: it waits, prepared."""
    COLD = "cold"
    """When the worker begins to end: beside the fence."""
    NONE = "none"
    """After the fence."""


STATES: dict[Role, tuple[State, ...]] = {
    role: tuple(
        state
        for state in State
        if state not in {State.PREPARED, State.VERIFYING, State.SUMMED, State.VERIFIED}
    )
    for role in (Role.KEEPER, Role.CORE, Role.API)
} | {
    Role.WORKER: tuple(State),
    Role.STANDBY: tuple(
        state
        for state in State
        if state not in {State.VERIFYING, State.SUMMED, State.VERIFIED, State.READY}
    ),
}

# A process is here that can be spoken to; one is here and ends; none is here.
ALIVE = (
    State.STARTING,
    State.PREPARED,
    State.VERIFYING,
    State.SUMMED,
    State.VERIFIED,
    State.READY,
)
DYING = (State.ENDING, State.KILLED)
EMPTY = (State.GONE, State.PAUSED)
# Processes are replaced in these phases, and only in these.
LIVE = (Phase.STARTING, Phase.SERVING, Phase.DRAINING)

_COMMON = (
    Event.READY,
    Event.PROGRESS,
    Event.FAULT,
    Event.BROKEN,
    Event.EOF,
    Event.EXITED,
    Event.UNSTARTED,
    Event.DEADLINE,
    Event.DUE,
)
EVENTS: dict[Role, tuple[Event, ...]] = {
    Role.KEEPER: (*_COMMON, Event.SILENT),
    Role.CORE: (*_COMMON, Event.SILENT, Event.DRAINED),
    Role.API: (*_COMMON, Event.SILENT, Event.ACCUSED),
    Role.WORKER: (*_COMMON, Event.SUM, Event.GOOD, Event.BAD, Event.ACCUSED),
    Role.STANDBY: (*_COMMON, Event.SILENT, Event.SUM),
}
# Who is asked whether it is there, and in which state: those that wait for nothing and have no
# deadline. Over a worker that serves watches the core, with a clock for each step (core.clocks).
PINGED: dict[Role, State] = {
    Role.KEEPER: State.READY,
    Role.CORE: State.READY,
    Role.API: State.READY,
    Role.STANDBY: State.PREPARED,
}
# Words that a child says of itself: one that comes when it cannot is a broken child, not our bug.
WORDS = (
    Event.READY,
    Event.PROGRESS,
    Event.SUM,
    Event.GOOD,
    Event.BAD,
    Event.DRAINED,
    Event.ACCUSED,
    Event.FAULT,
)
