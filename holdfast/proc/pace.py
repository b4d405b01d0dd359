"""Pace: a standby that prepares itself on a GPU rests far longer than it has worked.

A GPU is shared by turns: while a standby computes its warm-up, a live stream's step takes twice as
long. What streams notice of it is the share of their steps that meet it, so between two pieces it
waits many times as long as the piece took; when it is needed it waits no more. Pieces are small:
rehearsals of two layers (model.decoder), and captures, which compute nothing. On a CPU the
scheduler does better (proc.background). Pure: clock and waiting come from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# With rests as long as the pieces, which were whole models, p99 between tokens of an 8B model at 32
# streams was x1.31 (H200). Most of a piece is its launches now, milliseconds of the host.
RESTS = 20
# Fifty pieces (18 shapes of warm-up, some captures a bucket) are 25 seconds more at most, after
# which a second fault finds a standby. A hurry ends a rest at once.
REST_MAX_S = 0.5


class Pace:
    """Called when a piece of work is over, on the GPU too."""

    def __init__(
        self, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """wait(seconds): whether there is a hurry, as soon as there is; else after so long."""
        self._wait = wait
        self._clock = clock
        self._began_s = clock()
        self.hurried = False

    def __call__(self) -> None:
        if self.hurried:
            return
        self.hurried = self._wait(min(RESTS * (self._clock() - self._began_s), REST_MAX_S))
        self._began_s = self._clock()
