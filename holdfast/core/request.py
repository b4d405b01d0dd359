"""One admitted request, and its life as one table.

    state      admit      preempt    end
    WAITING    RUNNING    -          ENDED
    RUNNING    -          WAITING    ENDED
    ENDED      -          -          -

`-` is a bug of ours and raises. Home of the invariant that every admitted request ends exactly
once, with a reason. While a request runs, its tokens and counters live in the row arrays
(core.running) and in the mirror; this object holds them while it waits.
"""

from __future__ import annotations

import enum

import numpy as np

from holdfast.core.journal import Admission
from holdfast.errors import InvariantError
from holdfast.wire.messages import End


class Phase(enum.IntEnum):
    WAITING = 0
    RUNNING = 1
    ENDED = 2


class Event(enum.Enum):
    ADMIT = "admit"
    PREEMPT = "preempt"
    END = "end"


LIFE: dict[tuple[Phase, Event], Phase] = {
    (Phase.WAITING, Event.ADMIT): Phase.RUNNING,
    (Phase.WAITING, Event.END): Phase.ENDED,
    (Phase.RUNNING, Event.PREEMPT): Phase.WAITING,
    (Phase.RUNNING, Event.END): Phase.ENDED,
}


class Request:
    """tokens: int32[prompt + emitted], what is known of it whenever it waits."""

    __slots__ = (
        "admission",
        "cached_tokens",
        "deadline_s",
        "emitted",
        "end",
        "followers",
        "limit",
        "phase",
        "prompt_len",
        "row",
        "tokens",
    )

    def __init__(self, admission: Admission, tokens: np.ndarray, deadline_s: float) -> None:
        self.admission = admission
        self.tokens = tokens
        self.prompt_len = len(admission.prompt) // 4
        self.limit = self.prompt_len + admission.max_tokens
        self.deadline_s = deadline_s
        self.emitted = tokens.size - self.prompt_len
        self.cached_tokens = admission.cached_tokens
        self.phase = Phase.WAITING
        self.row = 0
        self.end = End.NONE
        # Other choices of the same prompt, held back until this one's prompt pages are shared.
        self.followers: list[Request] = []

    @property
    def id(self) -> int:
        return self.admission.id

    def admit(self, row: int) -> None:
        self._move(Event.ADMIT)
        self.row = row

    def preempt(self, tokens: np.ndarray) -> None:
        """Back to waiting with `tokens` int32[prompt + emitted]; its pages are recomputed later."""
        self._move(Event.PREEMPT)
        self.tokens = tokens
        self.emitted = tokens.size - self.prompt_len
        self.row = 0

    def finish(self, end: End) -> None:
        self._move(Event.END)
        self.end = end

    def _move(self, event: Event) -> None:
        after = LIFE.get((self.phase, event))
        if after is None:
            raise InvariantError(f"request {self.id:#x}: {event.value} in phase {self.phase.name}")
        self.phase = after
