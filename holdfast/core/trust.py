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


class Trust:
    """`until`: the last moment before which the weights were surely right."""

    def __init__(self) -> None:
        self.until = Moment(0, 0)
        self._words: deque[Moment] = deque(maxlen=2)

    def proved(self, now: Moment) -> None:
        """They were verified, or loaded, while nothing was computed."""
        self.until = now
        self._words.clear()

    def found_good(self, now: Moment) -> None:
        """The word of a scrub that reads them beside the steps, one pass after another.

        A pass vouches for no moment after it began to read, and it began before the word of the
        pass before had travelled here; at the word before that one it had surely not begun.
        """
        if len(self._words) == 2:
            self.until = self._words[0]
        self._words.append(now)
