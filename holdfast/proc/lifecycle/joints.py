"""JOINTS: what two or more processes allow together, tried in order after every event until none
applies. Data; with `table` and `turns` it is the whole of what `machine.Lifecycle` decides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from holdfast.proc.lifecycle.states import ALIVE, DYING, EMPTY, LIVE, Phase, Role, State, Turn, Wait
from holdfast.proc.lifecycle.table import Step

_KEEPER, _CORE, _API, _WORKER, _STANDBY = Role
_ALL = tuple(Role)
_S = State


class Fact(StrEnum):
    """What a joint rule may ask besides states; steps.Steps answers."""

    HELD = "the weights are held"
    UNHELD = "the weights are not held"
    MAY_START = "the weights are held, or no standby maps them"
    WARM = "--standby warm"
    WANTED = "--standby is not none"
    AT_ONCE = "the worker's end costs no pause, and no standby ended within a minute"
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
    also: Mapping[Role, tuple[State, ...]] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    then: State | None = None
    within: Wait | None = None
    do: tuple[Step, ...] = ()
    reason: str = ""
    turn: Turn | None = None
    why: str = ""


JOINTS: tuple[Joint, ...] = (
    Joint(
        "start the keeper",
        LIVE,
        (_KEEPER,),
        (_S.GONE,),
        {_WORKER: EMPTY, _STANDBY: EMPTY},
        do=(Step.START,),
        why="who maps the memory of the one before is fenced: there is room for its own",
    ),
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
