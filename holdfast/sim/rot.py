"""Rot: cells of sealed pages that have changed with nobody's doing, and what was drawn from them.

A page that changes silently is found when it is read again, and not before: tokens that were drawn
meanwhile may be wrong, and stay. So a token may differ from the oracle's if, and only if, the
device read a rotten cell when it drew it, and the core had not been told of the page by then.

Knows memory, steps and requests; nothing of the engine.
"""

from __future__ import annotations

import numpy as np

Cell = tuple[int, int]  # page of group 0, place in it
Step = tuple[int, int]  # epoch, step


class Rot:
    """`cells`: rotten ones -> the value they have instead of the right one."""

    def __init__(self, pages: np.ndarray) -> None:
        """pages: uint64[pages, page_tokens], group 0 of the device."""
        self._pages = pages
        self.cells: dict[Cell, int] = {}
        self._seen: dict[Step, set[Cell]] = {}  # rotten cells whose sums a step gave
        self._drawn: dict[tuple[int, int], tuple[Step, set[Cell]]] = {}

    def strike(self, page: int, at: int) -> None:
        """This cell changes."""
        if (page, at) not in self.cells:
            self._pages[page, at] ^= np.uint64(1)
            self.cells[page, at] = int(self._pages[page, at])

    def among(self, pages: list[int]) -> set[Cell]:
        """Rotten cells of these pages: those that were not written since."""
        if not self.cells:
            return set()
        mine = set(pages)
        return {
            (page, at)
            for (page, at), value in self.cells.items()
            if page in mine and int(self._pages[page, at]) == value
        }

    def summed(self, step: Step, pages: list[int]) -> None:
        """A step gives the sums of these pages of group 0."""
        self._seen[step] = self.among(pages)

    def drawn(self, step: Step, request: int, index: int, cells: set[Cell]) -> None:
        """A step drew this token of a request with these rotten cells in sight."""
        self._drawn[request, index] = (step, cells)

    def told(self, step: Step) -> None:
        """The core has taken the result of this step: from now on it knows what that summed, and
        nothing that was drawn later from such a page may count."""
        found = self._seen.pop(step, set())
        if not found:
            return
        for cell in found:
            self.cells.pop(cell, None)
        self._drawn = {
            token: (at, cells)
            for token, (at, cells) in self._drawn.items()
            if not (at[0] == step[0] and at[1] >= step[1] and cells <= found)
        }

    def known(self, cells: set[Cell]) -> None:
        """The core is told of these by another way than a step's sums."""
        for cell in cells:
            self.cells.pop(cell, None)

    def excuses(self, request: int, index: int) -> bool:
        """Whether this token may be wrong."""
        return (request, index) in self._drawn
