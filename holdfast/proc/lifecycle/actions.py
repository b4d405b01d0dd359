"""What goes into the state machine, and what comes out: frozen messages, no IO.

In: `Happened`. Out: actions, to be done in order. The supervisor does them with processes, sockets
and signals, the simulator with its own; neither decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.proc.lifecycle.states import Event, Role
from holdfast.wire.messages import Memory


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of the process with this number. detail: in words. code: EXITED, the exit status,
    negative for a signal. operator: FAULT, the operator can mend it. weights_sum: SUM, uint64.
    step: SUM, GOOD: the last step of the epoch that was computed before the weights were read.
    hung: ACCUSED, no result came in time. closed: ACCUSED, only its link's end was seen. since_s:
    FAULT, ACCUSED, when it was said, of a hang when its step began; None: unknown. facts: READY,
    for the operator's eyes."""

    event: Event
    process: int
    detail: str = ""
    code: int = 0
    operator: bool = False
    hung: bool = False
    closed: bool = False
    since_s: float | None = None
    weights_sum: int = 0
    step: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process of this number and role. loaded: worker, standby: the slab holds the weights,
    so it writes none. epoch, recover: core. linked: api: give the core, which is there, the other
    end of its link."""

    process: int
    role: Role
    index: int = 0
    loaded: bool = False
    epoch: int = 0
    recover: bool = False
    linked: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL."""

    process: int


@dataclass(frozen=True, slots=True)
class Tell:
    """A control message, as in the table of proc.child; the process is there."""

    process: int
    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Promote:
    """Give worker `process` the epoch and one end of a new link, the core the other end.

    Every process of an older epoch is gone, and the weights were verified after that. memory: what
    became of the pages since the promotion before.
    """

    process: int
    epoch: int
    core: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Introduce:
    """Make a new link between the api process and a new core."""

    process: int
    index: int
    core: int


@dataclass(frozen=True, slots=True)
class ClosePort:
    """No process will be started on the listening sockets again."""


@dataclass(frozen=True, slots=True)
class Count:
    """One more of the metric process_restarts_total."""

    role: Role


@dataclass(frozen=True, slots=True)
class Lost:
    """A process ended, by a fault and not by our will. kind: as in the metric faults_total.

    noticed_at_s: when its end, or what led to it, was first heard of. noticed_s: seconds from its
    word (of a hang: from the start of its step) until then, None without a word. fenced_s: from
    then to the proof that it is gone, None when no process was made.
    """

    title: str
    role: Role
    kind: str
    detail: str
    noticed_at_s: float
    noticed_s: float | None
    fenced_s: float | None


@dataclass(frozen=True, slots=True)
class Notice:
    """What the CLI shows. kind: starting | progress | ready | lost | restarted | resumed |
    draining | stopped | warning | failed. done, total: bytes of `message` (progress only)."""

    kind: str
    title: str
    message: str = ""
    done: int = 0
    total: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


Action = Spawn | Kill | Tell | Promote | Introduce | ClosePort | Count | Lost | Notice
