"""One admitted request, and its life as one table.

    state      admit      preempt    load       loaded     end
    WAITING    RUNNING    -          LOADING    -          ENDED
    RUNNING    -          WAITING    -          -          ENDED
    LOADING    -          -          -          WAITING    ENDED
    ENDED      -          -          -          -          -

A LOADING request waits for pages of slower tiers, outside queue and batch.

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
    LOADING = 3


class Event(enum.Enum):
    ADMIT = "admit"
    PREEMPT = "preempt"
    LOAD = "load"
    LOADED = "loaded"
    END = "end"


LIFE: dict[tuple[Phase, Event], Phase] = {
    (Phase.WAITING, Event.ADMIT): Phase.RUNNING,
    (Phase.WAITING, Event.LOAD): Phase.LOADING,
    (Phase.WAITING, Event.END): Phase.ENDED,
    (Phase.LOADING, Event.LOADED): Phase.WAITING,
    (Phase.LOADING, Event.END): Phase.ENDED,
    (Phase.RUNNING, Event.PREEMPT): Phase.WAITING,
    (Phase.RUNNING, Event.END): Phase.ENDED,
}


class Request:
    """tokens: int32[prompt + emitted], what is known of it whenever it waits."""

    __slots__ = (
        "admission",
        "cached_tokens",
        "computed",
        "deadline_s",
        "emitted",
        "end",
        "followers",
        "limit",
        "loads",
        "phase",
        "prompt_len",
        "row",
        "tokens",
        "waits_from",
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
        self.loads = 0  # times it has waited for slower tiers since it last had a row
        # The launched step since which it is held back for a page whose sum is on its way.
        self.waits_from: int | None = None
        # Tokens whose KV was there when a fault voided it: computed again as far as no page of them
        # is found when it gets a row.
        self.computed = 0
        self.end = End.NONE
        # Other choices of the same prompt, held back until this one's prompt pages are shared.
        self.followers: list[Request] = []

    @property
    def id(self) -> int:
        return self.admission.id

    def admit(self, row: int) -> None:
        self._move(Event.ADMIT)
        self.row = row
        self.loads = 0
        self.waits_from = None

    def preempt(self, tokens: np.ndarray) -> None:
        """Back to waiting with `tokens` int32[prompt + emitted]; its pages are recomputed later."""
        self._move(Event.PREEMPT)
        self.tokens = tokens
        self.emitted = tokens.size - self.prompt_len
        self.row = 0

    def load(self) -> None:
        self._move(Event.LOAD)
        self.loads += 1

    def loaded(self) -> None:
        """What it waited for is there, or is not coming."""
        self._move(Event.LOADED)

    def finish(self, end: End) -> None:
        self._move(Event.END)
        self.end = end

    def _move(self, event: Event) -> None:
        after = LIFE.get((self.phase, event))
        if after is None:
            raise InvariantError(f"request {self.id:#x}: {event.value} in phase {self.phase.name}")
        self.phase = after
