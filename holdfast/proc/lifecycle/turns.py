"""TURNS: the phases of the whole server and what ends them. Data; see `table`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.proc.lifecycle.states import Phase, Turn, Wait
from holdfast.proc.lifecycle.table import Step


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
