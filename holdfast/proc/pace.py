"""Pace: a standby that prepares itself on a GPU rests far longer than it works.

A GPU is shared by turns: while a standby computes its warm-up, a live stream's step takes twice as
long. What streams notice of it is the share of their steps that meet it, so after each piece of
work it waits a second. Pieces are small: rehearsals of two layers (model.decoder), and captures,
which compute nothing. It rests no more when it is needed, and not while nobody streams, of which
the supervisor tells it (`Unwatched`). On a CPU the scheduler does better (proc.background). Pure:
waiting and the clock, of time.monotonic, come from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

# A context of its own and its first cuBLAS calls cannot be paced: 0.4 s in which a live step takes
# up to 1.6 times as long (docs/gpu-faults.md). Some 33 pieces with as many rests make that 1 % of
# the time until a standby is prepared; one that is needed before hurries.
REST_S = 1.0
# How long a word that nobody streams is believed: as far as streams that begin meanwhile are not
# spared. The supervisor looks as often.
FREE_S = 1.0
HURRY = math.inf


class Pace:
    """Called when a piece of work is over, on the GPU too."""

    def __init__(self, hear: Callable[[float], float], clock: Callable[[], float]) -> None:
        """hear(seconds): until when nobody is to be spared, as soon as somebody says so (HURRY:
        from now on); else, after so long, 0."""
        self._hear = hear
        self._clock = clock
        self._free_until_s = 0.0

    @property
    def hurried(self) -> bool:
        return self._free_until_s == HURRY

    def __call__(self) -> None:
        end_s = self._clock() + REST_S
        while self._free_until_s <= (now_s := self._clock()) < end_s:
            self._free_until_s = max(self._free_until_s, self._hear(end_s - now_s))


class Unwatched:
    """The supervisor's side: when to tell a standby that nobody streams."""

    def __init__(self) -> None:
        self._told: tuple[int, float] = (0, 0.0)

    def until_s(self, standby: int, running: float, now_s: float) -> float | None:
        """What to tell the process `standby`, which prepares itself, while `running` requests are
        in rows; None for nothing: somebody streams, or it was told already."""
        process, told_s = self._told
        if running or (process == standby and now_s < told_s + FREE_S / 2):
            return None
        self._told = (standby, now_s)
        return now_s + FREE_S
