"""The state table of the server's processes, as data: what must happen on each event.

One of three tables. ROWS: one process, its state and an event. `joints`: what several processes
allow together. `turns`: the phases of the server. `machine.Lifecycle` interprets them,
docs/processes.md shows them (`document`), and tests/proc/test_lifecycle.py walks every state that
can be reached. A combination that cannot be is listed, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from holdfast.proc.lifecycle.states import (
    ALIVE,
    DYING,
    EMPTY,
    EVENTS,
    PINGED,
    STATES,
    Event,
    Role,
    State,
    Wait,
)

_KEEPER, _CORE, _API, _WORKER, _STANDBY = Role
_ALL = tuple(Role)


class Step(StrEnum):
    """What is done besides entering a state; a method of steps.Steps each."""

    COME_UP = "come up"
    EXTEND = "extend the deadline"
    NOTE = "keep its last word"
    KEEP_HUNG = "keep whether it hung"
    TELL_GOOD = "core: the weights are good"
    COMPARE = "keeper: compare the sum"
    HOLD = "the weights are held"
    FORGET = "the weights are not held"
    KILL_KEEPER = "kill the keeper"
    DRAINED = "server: drained"
    UNFENCED = "server: unfenced; beside a standby without an epoch it goes on"
    LOSE = "tell how it ended"
    LOSE_MEMORY = "the memory is lost, the weights are not held; kill who maps it"
    LOSE_CORE = "api: core_lost; kill a worker that has an epoch"
    LOSE_API = "core: api_lost"
    LOSE_WORKER = "core: worker_lost, and whether it faulted"
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
        (_S.STARTING, _S.PREPARED, _S.SUMMED, _S.VERIFIED),
        _never("it was not asked"),
    ),
    Row(
        Event.SUM,
        (_WORKER,),
        (_S.READY,),
        Rule(do=(Step.COMPARE,), why="a scrub: it has read the weights again between its steps"),
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
    Row(Event.GOOD, (_WORKER,), (_S.READY,), Rule(do=(Step.TELL_GOOD,))),
    Row(
        Event.BAD,
        (_WORKER,),
        (_S.READY,),
        Rule(
            _S.KILLED,
            Wait.FENCE,
            (Step.FORGET,),
            why="a scrub found it: the core drops what was sealed since they were last good",
            reason="the weights are not the bytes that were loaded",
        ),
    ),
    *(
        Row(event, (_WORKER,), states, rule)
        for event in (Event.GOOD, Event.BAD)
        for states, rule in (
            ((_S.STARTING, _S.VERIFYING, _S.VERIFIED), _never("no sum was given")),
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
        Rule(
            _S.KILLED,
            Wait.FENCE,
            (Step.KEEP_HUNG,),
            why="the core's word: a digest, a result or a link is wrong",
        ),
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
        Rule(
            _S.GONE,
            do=(Step.LOSE, Step.LOSE_MEMORY, Step.REPLACE),
            why="the next one makes new memory: weights are loaded, pages computed anew",
        ),
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
        (_KEEPER, _API, _WORKER),
        (_S.STARTING,),
        Rule(_S.GONE, do=(Step.LOSE, Step.REPLACE), why="no process could be made; tried again"),
    ),
    Row(
        Event.UNSTARTED,
        (_CORE,),
        (_S.STARTING,),
        Rule(
            _S.GONE,
            do=(Step.LOSE, Step.LOSE_CORE, Step.REPLACE),
            why="no process could be made; tried again. Api processes were introduced to it",
        ),
    ),
    Row(
        Event.UNSTARTED,
        (_STANDBY,),
        (_S.STARTING,),
        Rule(_S.GONE, do=(Step.LOSE,), why="no process could be made; tried again"),
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
    *(
        Row(
            Event.SILENT,
            (role,),
            (PINGED[role],),
            Rule(_S.KILLED, Wait.FENCE, reason="it answered nothing for {heartbeat} s"),
        )
        for role in PINGED
    ),
    *(
        Row(
            Event.SILENT,
            (role,),
            tuple(state for state in (*ALIVE, *DYING) if state is not PINGED[role]),
            _never("it is not asked"),
        )
        for role in PINGED
    ),
    Row(
        Event.DUE,
        (_KEEPER, _CORE, _API, _WORKER),
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
