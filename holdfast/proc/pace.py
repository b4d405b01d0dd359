"""Pace: a standby that prepares itself on a GPU rests far longer than it works.

A GPU is shared by turns: while a standby computes its warm-up, a live stream's step takes twice as
long. What streams notice of it is the share of their steps that meet it, so after each piece of
work it waits a second; when it is needed it waits no more. Pieces are small: rehearsals of two
layers (model.decoder), and captures, which compute nothing. On a CPU the scheduler does better
(proc.background). Pure: waiting comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable

# A context of its own and its first cuBLAS calls cannot be paced: 0.4 s in which a live step takes
# up to 1.6 times as long (docs/gpu-faults.md). Some 33 pieces with as many rests make that 1 % of
# the time until a standby is prepared; one that is needed before hurries.
REST_S = 1.0


class Pace:
    """Called when a piece of work is over, on the GPU too."""

    def __init__(self, wait: Callable[[float], bool]) -> None:
        """wait(seconds): whether there is a hurry, as soon as there is; else after so long."""
        self._wait = wait
        self.hurried = False

    def __call__(self) -> None:
        self.hurried = self.hurried or self._wait(REST_S)
