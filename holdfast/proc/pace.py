"""Pace: a standby that prepares itself on a GPU rests as long as it has worked.

A GPU is shared by turns: while a standby computes its warm-up, a live stream's step takes twice as
long. So between two pieces of that work it waits as long as the piece took, and live streams have
the GPU to themselves at least half of the time; when it is needed it waits no more. On a CPU the
scheduler does better (proc.background). Pure: clock and waiting come from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# A piece that took longer was mostly a compiler, which no stream notices; and seventy captures with
# as many rests are 3.5 seconds more of a start at most, after which a second fault finds a standby.
REST_MAX_S = 0.05


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
        self.hurried = self._wait(min(self._clock() - self._began_s, REST_MAX_S))
        self._began_s = self._clock()
