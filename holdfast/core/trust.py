"""Trust: up to when what was computed is known to have been computed with the right weights.

A checksum of a page says "unchanged since sealed", not "right": wrong weights give pages whose sums
are good. So every proof that the weights are the bytes that were loaded moves a mark, and what was
sealed or emitted behind the last mark is in doubt once they are found to be others.

Owned by core.brain. Pure; a moment is a number of the ledger's clock and of tokens emitted so far.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """clock: of the ledger. tokens: emitted by this core until then."""

    clock: int
    tokens: int


# Moments remembered at most; passes over the weights that take longer prove less.
MOMENTS_MAX = 4096


class Trust:
    """`until`: the last moment before which the weights were surely right."""

    def __init__(self) -> None:
        self.until = Moment(0, 0)
        self._taken: deque[tuple[int, Moment]] = deque(maxlen=MOMENTS_MAX)

    def proved(self, now: Moment) -> None:
        """They were verified, or loaded, while nothing was computed. Steps number anew."""
        self.until = now
        self._taken.clear()

    def taken(self, step: int, now: Moment) -> None:
        """The result of this step is in; need not be said of every step."""
        self._taken.append((step, now))

    def found_good(self, step: int) -> None:
        """A pass of the scrub that began once this step was computed found them good. It vouches
        for nothing that was computed since it began."""
        while self._taken and self._taken[0][0] <= step:
            self.until = self._taken.popleft()[1]
