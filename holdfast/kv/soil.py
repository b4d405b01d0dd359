"""Soil: which pages hold bytes that may be anything, and must be zeroed before their next use.

0 * NaN is NaN: attention multiplies what it masks by zero, so a page that is not finite anywhere
spoils whoever reads it. Whoever first uses a soiled page has it zeroed by the same plan, and is
told of it once. Only kv.ledger may call this; it knows pages, not why they are soiled.
"""

from __future__ import annotations

import numpy as np

from holdfast.errors import require
from holdfast.wire.plan import TRASH_PAGE


class Soil:
    """One flag a page of each group's pool; `count` of them are set."""

    def __init__(self, pages_by_group: tuple[int, ...]) -> None:
        self._dirty = [np.zeros(pages, np.bool_) for pages in pages_by_group]
        self.count = 0

    def mark(self, group: int, pages: np.ndarray) -> None:
        """These distinct pages int[k] hold what must not be read."""
        dirty = self._dirty[group]
        self.count += pages.size - np.count_nonzero(dirty[pages])
        dirty[pages] = True

    def mark_all_but(self, group: int, clean: np.ndarray) -> None:
        """Nobody knows what the pages hold, but for those of bool[pages] `clean`."""
        dirty = self._dirty[group]
        self.count -= np.count_nonzero(dirty)
        np.logical_not(clean, out=dirty)
        dirty[TRASH_PAGE] = False
        self.count += np.count_nonzero(dirty)

    def wipe(self, group: int, pages: np.ndarray) -> np.ndarray:
        """bool[k]: which of these distinct pages the plan at hand must zero, and will."""
        dirty = self._dirty[group][pages]
        self._dirty[group][pages[dirty]] = False
        self.count -= np.count_nonzero(dirty)
        return dirty

    def verify(self) -> None:
        """Recount. Raises InvariantError."""
        found = sum(np.count_nonzero(one) for one in self._dirty)
        require(found == self.count, f"{self.count} dirty pages, found {found}")
