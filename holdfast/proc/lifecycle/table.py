"""The state table of the server's processes, as data: what must happen on each event.

Three tables. ROWS: one process, its state and an event. JOINTS: what two or more processes allow
together, tried in order after every event until none applies. TURNS: the phases of the server.
`machine.Lifecycle` interprets them, docs/processes.md shows them (`document`), and
tests/proc/test_lifecycle.py walks every state that can be reached. A combination that cannot be is
listed, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from holdfast.proc.lifecycle.states import (
    ALIVE,
    DYING,
    EMPTY,
    EVENTS,
    LIVE,
    STATES,
    Event,
    Phase,
    Role,
    State,
    Turn,
    Wait,
)

_KEEPER, _CORE, _API, _WORKER, _STANDBY = Role
_ALL = tuple(Role)


class Step(StrEnum):
    """What is done besides entering a state; a method of machine.Lifecycle each."""

    COME_UP = "come up"
    EXTEND = "extend the deadline"
    NOTE = "keep its last word"
    COMPARE = "keeper: compare the sum"
    HOLD = "the weights are held"
    FORGET = "the weights are not held"
    KILL_KEEPER = "kill the keeper"
    DRAINED = "server: drained"
    UNSTARTED = "server: cannot go on"
    UNFENCED = "server: unfenced; beside a standby without an epoch it goes on"
    LOSE = "tell how it ended"
    LOSE_MEMORY = "server: cannot go on"
    LOSE_CORE = "api: core_lost; kill a worker that has an epoch"
    LOSE_API = "core: api_lost"
    LOSE_WORKER = "core: worker_lost"
    REPLACE = "pause, or enough is enough"
    # Of JOINTS.
    START = "start"
    TAKE = "take the worker's place"
    PLAN = "pause, then start"
    VERIFY = "sum the weights"
    PROMOTE = "give it the next epoch and the core's link"
    KILL = "kill"
    STOP = "tell it to stop"
    # Of TURNS.
    ANNOUNCE = "announce that it serves"
    DRAIN = "core, api: drain"
    REFUSE = "api: drain"
    FAIL = "exit code 70, say why"
    FAIL_OPERATOR = "exit code 2, say why"
    EXIT_SIGNAL = "exit code 128 + signal"
    END_SHUTDOWN = "core: end streams (shutdown)"
    END_FAULT = "core: end streams (engine fault)"
    CLOSE_PORT = "stop listening"
    OUT_OF_TURN = "kill the core: it spoke out of turn"


@dataclass(frozen=True, slots=True)
class Rule:
    """then: the state entered, None to stay. within: its deadline. reason: why we kill, if we do;
    empty: the event says. never: this cannot be, `why` says why not."""

    then: State | None = None
    within: Wait | None = None
    do: tuple[Step, ...] = ()
    why: str = ""
    reason: str = ""
    never: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A rule for several roles and states; a state that a role does not have is left out."""

    event: Event
    roles: tuple[Role, ...]
    states: tuple[State, ...]
    rule: Rule


def _never(why: str) -> Rule:
    return Rule(never=True, why=why)


_KILL_LATE = "it did not end in time"
_S = State

ROWS: tuple[Row, ...] = (
    # --- words ---
    Row(
        Event.READY,
        (_KEEPER, _CORE, _API),
        (_S.STARTING,),
        Rule(_S.READY, do=(Step.COME_UP,)),
    ),
    Row(Event.READY, (_WORKER,), (_S.STARTING,), Rule(_S.PREPARED)),
    Row(Event.READY, (_STANDBY,), (_S.STARTING,), Rule(_S.PREPARED, do=(Step.COME_UP,))),
    Row(Event.READY, _ALL, ALIVE[1:], _never("it is said once")),
    Row(Event.READY, _ALL, DYING, Rule(why="too late")),
    Row(Event.PROGRESS, _ALL, (_S.STARTING, _S.VERIFYING), Rule(do=(Step.EXTEND,))),
    Row(
        Event.PROGRESS,
        _ALL,
        (_S.PREPARED, _S.SUMMED, _S.VERIFIED, _S.READY, *DYING),
        Rule(why="nothing waits for it"),
    ),
    Row(Event.SUM, (_WORKER,), (_S.VERIFYING,), Rule(_S.SUMMED, Wait.COMPARE, (Step.COMPARE,))),
    Row(
        Event.SUM,
        (_WORKER,),
        (_S.STARTING, _S.PREPARED, _S.SUMMED, _S.VERIFIED, _S.READY),
        _never("it was not asked"),
    ),
    Row(Event.SUM, (_STANDBY,), ALIVE, _never("it was not asked")),
    Row(Event.SUM, (_WORKER, _STANDBY), DYING, Rule(why="too late")),
    Row(Event.GOOD, (_WORKER,), (_S.SUMMED,), Rule(_S.VERIFIED, do=(Step.HOLD,))),
    Row(
        Event.BAD,
        (_WORKER,),
        (_S.SUMMED,),
        Rule(
            _S.KILLED,
            Wait.FENCE,
            (Step.FORGET,),
            why="its sum is not that of the bytes that were loaded",
            reason="the weights are not the bytes that were loaded",
        ),
    ),
    *(
        Row(event, (_WORKER,), states, rule)
        for event in (Event.GOOD, Event.BAD)
        for states, rule in (
            ((_S.STARTING, _S.VERIFYING, _S.VERIFIED, _S.READY), _never("no sum was given")),
            ((_S.PREPARED,), Rule(why="too late: the keeper is being killed for it")),
            (DYING, Rule(why="too late")),
        )
    ),
    Row(Event.DRAINED, (_CORE,), (_S.READY,), Rule(do=(Step.DRAINED,))),
    Row(Event.DRAINED, (_CORE,), (_S.STARTING,), _never("its loop has not begun")),
    Row(Event.DRAINED, (_CORE,), DYING, Rule(why="too late")),
    Row(
        Event.ACCUSED,
        (_WORKER,),
        (_S.READY,),
        Rule(_S.KILLED, Wait.FENCE, why="the core's word: a digest, a result or a link is wrong"),
    ),
    Row(Event.ACCUSED, (_WORKER,), ALIVE[:-1], _never("the core does not know it")),
    Row(Event.ACCUSED, (_API,), ALIVE, Rule(_S.KILLED, Wait.FENCE, why="the core's word")),
    Row(Event.ACCUSED, (_WORKER, _API), DYING, Rule(why="it ends already")),
    Row(Event.FAULT, _ALL, ALIVE, Rule(_S.ENDING, Wait.STOP, (Step.NOTE,), why="it exits now")),
    Row(Event.FAULT, _ALL, DYING, Rule(do=(Step.NOTE,))),
    Row(
        Event.BROKEN,
        _ALL,
        (*ALIVE, _S.ENDING),
        Rule(_S.KILLED, Wait.FENCE, why="it speaks nonsense or does not read"),
    ),
    Row(Event.BROKEN, _ALL, (_S.KILLED,), Rule(why="it ends already")),
    # --- the kernel ---
    Row(
        Event.EOF,
        _ALL,
        ALIVE,
        Rule(_S.ENDING, Wait.DYING, why="it is dying; its pidfd fires in a moment and says more"),
    ),
    Row(Event.EOF, _ALL, DYING, Rule(why="it ends already")),
    Row(
        Event.EXITED,
        (_KEEPER,),
        (*ALIVE, *DYING),
        Rule(_S.GONE, do=(Step.LOSE, Step.LOSE_MEMORY)),
    ),
    Row(
        Event.EXITED,
        (_CORE,),
        (*ALIVE, *DYING),
        Rule(_S.GONE, do=(Step.LOSE, Step.LOSE_CORE, Step.REPLACE)),
    ),
    Row(
        Event.EXITED,
        (_API,),
        (*ALIVE, *DYING),
        Rule(_S.GONE, do=(Step.LOSE, Step.LOSE_API, Step.REPLACE)),
    ),
    Row(
        Event.EXITED,
        (_WORKER,),
        (*ALIVE, *DYING),
        Rule(
            _S.GONE,
            do=(Step.LOSE, Step.LOSE_WORKER, Step.REPLACE),
            why="the fence: nothing of its epoch writes any more",
        ),
    ),
    Row(
        Event.EXITED,
        (_STANDBY,),
        (*ALIVE, *DYING),
        Rule(_S.GONE, do=(Step.LOSE,), why="the joint rule `plan a standby` paces the next one"),
    ),
    Row(
        Event.UNSTARTED,
        (_KEEPER, _CORE, _API, _WORKER),
        (_S.STARTING,),
        Rule(_S.GONE, do=(Step.UNSTARTED,), why="no process could be made"),
    ),
    Row(
        Event.UNSTARTED,
        (_STANDBY,),
        (_S.STARTING,),
        Rule(_S.GONE, do=(Step.LOSE,), why="no process could be made; it is tried again"),
    ),
    Row(Event.UNSTARTED, _ALL, (*ALIVE[1:], *DYING), _never("it was started")),
    # --- the clock ---
    Row(
        Event.DEADLINE,
        _ALL,
        (_S.STARTING,),
        Rule(_S.KILLED, Wait.FENCE, reason="it said nothing for {start} s while starting"),
    ),
    Row(
        Event.DEADLINE,
        (_WORKER,),
        (_S.VERIFYING,),
        Rule(_S.KILLED, Wait.FENCE, reason="it said nothing for {verify} s while verifying"),
    ),
    Row(
        Event.DEADLINE,
        (_WORKER,),
        (_S.SUMMED,),
        Rule(_S.PREPARED, do=(Step.KILL_KEEPER,), why="it is the keeper that is stuck"),
    ),
    Row(Event.DEADLINE, _ALL, (_S.ENDING,), Rule(_S.KILLED, Wait.FENCE, reason=_KILL_LATE)),
    Row(
        Event.DEADLINE,
        _ALL,
        (_S.KILLED,),
        Rule(do=(Step.UNFENCED,), why="it may still write: nothing may be started over it"),
    ),
    Row(Event.DEADLINE, _ALL, (_S.PREPARED, _S.VERIFIED, _S.READY), _never("it has none")),
    Row(
        Event.DUE,
        (_CORE, _API, _WORKER),
        (_S.PAUSED,),
        Rule(_S.GONE, why="the joint rules start the next one"),
    ),
    Row(Event.DUE, (_STANDBY,), (_S.PAUSED,), Rule(do=(Step.START,))),
    Row(Event.DUE, _ALL, (_S.GONE, *ALIVE, *DYING), _never("no start is planned")),
    # --- nobody there ---
    *(
        Row(event, _ALL, EMPTY, _never("no process is there"))
        for event in Event
        if event is not Event.DUE
    ),
)


class Fact(StrEnum):
    """What a joint rule may ask besides states; a method of machine.Lifecycle each."""

    HELD = "the weights are held"
    UNHELD = "the weights are not held"
    MAY_START = "the weights are held, or no standby maps them"
    WARM = "--standby warm"
    WANTED = "--standby is not none"
    AT_ONCE = "the worker's end will cost no pause"
    ALL_READY = "all but the standby are ready"
    NO_API = "no api process is left"
    EMPTY = "no process is left"


@dataclass(frozen=True, slots=True)
class Joint:
    """For each seat of `roles` in `states`, while `also` and `facts` hold: do it.

    then, within, reason: as in Rule. turn: told to the server instead, once.
    """

    name: str
    phases: tuple[Phase, ...]
    roles: tuple[Role, ...] = ()
    states: tuple[State, ...] = ()
    also: Mapping[Role, tuple[State, ...]] = ()  # type: ignore[assignment]
    facts: tuple[Fact, ...] = ()
    then: State | None = None
    within: Wait | None = None
    do: tuple[Step, ...] = ()
    reason: str = ""
    turn: Turn | None = None
    why: str = ""


JOINTS: tuple[Joint, ...] = (
    Joint("start the keeper", (Phase.STARTING,), (_KEEPER,), (_S.GONE,), do=(Step.START,)),
    Joint("start a process", LIVE, (_CORE, _API), (_S.GONE,), do=(Step.START,)),
    Joint(
        "take the place",
        LIVE,
        (_STANDBY,),
        (_S.STARTING, _S.PREPARED),
        {_WORKER: EMPTY},
        (Fact.HELD,),
        do=(Step.TAKE,),
        why="the worker's place is empty: its epoch is fenced",
    ),
    Joint(
        "start a worker",
        LIVE,
        (_WORKER,),
        (_S.GONE,),
        {_KEEPER: (_S.READY,)},
        (Fact.MAY_START,),
        do=(Step.START,),
        why="one that loads weights is alone with them",
    ),
    Joint(
        "clear the standby",
        LIVE,
        (_STANDBY,),
        (_S.STARTING, _S.PREPARED),
        facts=(Fact.UNHELD,),
        then=_S.KILLED,
        within=Wait.FENCE,
        do=(Step.KILL,),
        reason="the weights are loaded anew",
        why="it was prepared over bytes that are no weights",
    ),
    Joint(
        "verify",
        LIVE,
        (_WORKER,),
        (_S.PREPARED,),
        {_KEEPER: (_S.READY,)},
        then=_S.VERIFYING,
        within=Wait.VERIFY,
        do=(Step.VERIFY,),
        why="after the fence: a sum taken before it would not cover what the old epoch wrote last",
    ),
    Joint(
        "promote",
        LIVE,
        (_WORKER,),
        (_S.VERIFIED,),
        {_CORE: (_S.READY,)},
        then=_S.READY,
        do=(Step.PROMOTE,),
    ),
    Joint(
        "start a standby beside the fence",
        LIVE,
        (_STANDBY,),
        EMPTY,
        {_WORKER: DYING},
        (Fact.HELD, Fact.WANTED, Fact.AT_ONCE),
        do=(Step.START,),
        why="it imports while the old worker is fenced",
    ),
    Joint(
        "plan a standby",
        (Phase.STARTING, Phase.SERVING),
        (_STANDBY,),
        (_S.GONE,),
        {_WORKER: (_S.READY,)},
        (Fact.WARM,),
        then=_S.PAUSED,
        do=(Step.PLAN,),
        why="after a pause, so that it takes nothing from a recovery, nor a crash loop all",
    ),
    Joint(
        "plan no standby",
        LIVE,
        (_STANDBY,),
        (_S.PAUSED,),
        {_WORKER: tuple(state for state in _S if state is not _S.READY)},
        then=_S.GONE,
        why="the worker is lost first",
    ),
    Joint(
        "start nothing more",
        (Phase.ENDING, Phase.STOPPING),
        _ALL,
        (_S.PAUSED,),
        then=_S.GONE,
    ),
    Joint("all up", (Phase.STARTING,), facts=(Fact.ALL_READY,), turn=Turn.UP),
    Joint(
        "nobody to end the streams",
        (Phase.ENDING,),
        (_CORE,),
        (*EMPTY, *DYING),
        turn=Turn.NO_CORE,
    ),
    Joint(
        "stop api",
        (Phase.STOPPING,),
        (_API,),
        ALIVE,
        then=_S.ENDING,
        within=Wait.API_STOP,
        do=(Step.STOP,),
        why="they still send what was computed",
    ),
    Joint(
        "stop the others",
        (Phase.STOPPING,),
        (_CORE, _WORKER, _STANDBY, _KEEPER),
        ALIVE,
        facts=(Fact.NO_API,),
        then=_S.ENDING,
        within=Wait.STOP,
        do=(Step.STOP,),
        why="nobody is left whom they could serve",
    ),
    Joint("all gone", (Phase.STOPPING,), facts=(Fact.EMPTY,), turn=Turn.EMPTY),
)


@dataclass(frozen=True, slots=True)
class Change:
    """then: the phase entered, None to stay; within, do, why, never: as in Rule."""

    then: Phase | None = None
    within: Wait | None = None
    do: tuple[Step, ...] = ()
    why: str = ""
    never: bool = False


def _cannot_be(why: str) -> Change:
    return Change(never=True, why=why)


_P = Phase
_OVER = Change(_P.OVER, do=(Step.EXIT_SIGNAL,))
_END = Change(_P.ENDING, Wait.END, (Step.FAIL, Step.REFUSE, Step.END_FAULT))
_STOP = Change(_P.STOPPING, do=(Step.CLOSE_PORT,))
_AGAIN = Change(why="it is ending already")
_ONCE = _cannot_be("it is asked while starting")
_STREAMS = _cannot_be("streams are being ended only then")
_NO_CLOCK = _cannot_be("the phase has no deadline")
_NOT_STOPPING = _cannot_be("it is asked while stopping")

TURNS: dict[tuple[Phase, Turn], Change] = {
    (_P.STARTING, Turn.UP): Change(_P.SERVING, do=(Step.ANNOUNCE,)),
    **{(phase, Turn.UP): _ONCE for phase in Phase if phase is not _P.STARTING},
    (_P.STARTING, Turn.SIGNAL): _OVER,
    (_P.SERVING, Turn.SIGNAL): Change(_P.DRAINING, Wait.DRAIN, (Step.DRAIN,)),
    **{(p, Turn.SIGNAL): _OVER for p in (_P.DRAINING, _P.ENDING, _P.STOPPING)},
    (_P.STARTING, Turn.OPERATOR): Change(_P.OVER, do=(Step.FAIL_OPERATOR,)),
    **{(phase, Turn.OPERATOR): _ONCE for phase in Phase if phase is not _P.STARTING},
    (_P.STARTING, Turn.CANNOT): Change(_P.OVER, do=(Step.FAIL,)),
    (_P.SERVING, Turn.CANNOT): _END,
    (_P.DRAINING, Turn.CANNOT): _END,
    (_P.ENDING, Turn.CANNOT): _AGAIN,
    (_P.STOPPING, Turn.CANNOT): _AGAIN,
    **{(p, Turn.UNFENCED): Change(_P.OVER, do=(Step.FAIL,)) for p in Phase if p is not _P.OVER},
    **{(p, Turn.DRAINED): Change(do=(Step.OUT_OF_TURN,)) for p in (_P.STARTING, _P.SERVING)},
    (_P.DRAINING, Turn.DRAINED): _STOP,
    (_P.ENDING, Turn.DRAINED): _STOP,
    (_P.STOPPING, Turn.DRAINED): _AGAIN,
    **{(p, Turn.TIME_UP): _NO_CLOCK for p in (_P.STARTING, _P.SERVING, _P.STOPPING)},
    (_P.DRAINING, Turn.TIME_UP): Change(_P.ENDING, Wait.END, (Step.END_SHUTDOWN,)),
    (_P.ENDING, Turn.TIME_UP): _STOP,
    (_P.ENDING, Turn.NO_CORE): _STOP,
    **{(phase, Turn.NO_CORE): _STREAMS for phase in Phase if phase is not _P.ENDING},
    (_P.STOPPING, Turn.EMPTY): Change(_P.OVER),
    **{(phase, Turn.EMPTY): _NOT_STOPPING for phase in Phase if phase is not _P.STOPPING},
    **{
        (_P.OVER, turn): _cannot_be("the machine listens to nothing any more")
        for turn in Turn
        if turn not in (Turn.UP, Turn.OPERATOR, Turn.NO_CORE, Turn.EMPTY)
    },
}

# States without a deadline of their own, and whose next step they wait for; a rest waits for none.
RESTS: dict[Role, tuple[State, ...]] = {
    _KEEPER: (_S.READY,),
    _CORE: (_S.READY,),
    _API: (_S.READY,),
    _WORKER: (_S.READY,),
    _STANDBY: (_S.PREPARED,),
}
WAITS_FOR: dict[State, Role] = {_S.PREPARED: _KEEPER, _S.VERIFIED: _CORE}

Table = dict[tuple[Role, State, Event], Rule]


def table(rows: tuple[Row, ...] = ROWS) -> Table:
    """Rows spread over roles and states. Raises ValueError when two rows say the same cell."""
    found: Table = {}
    for row in rows:
        for role in row.roles:
            if row.event not in EVENTS[role]:
                continue
            for state in row.states:
                if state not in STATES[role]:
                    continue
                if (role, state, row.event) in found:
                    raise ValueError(f"two rules for {role}, {state}, {row.event}")
                found[role, state, row.event] = row.rule
    return found


TABLE: Table = table()
