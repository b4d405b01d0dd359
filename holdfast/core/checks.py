"""PageChecks: which sealed pages the next plan sums again, and why.

Two readers of pages. After a worker's end all that was kept is read once, before anything else is
planned (`take_unverified`). While an engine serves, the scrub reads sealed pages round robin at a
rate, in plans that are launched anyway or, when there are none, in plans of its own (`take_scrub`).
Both are handles in `plan.seals`, behind those that the plan seals; the result's sums are compared
with the booked ones by core.commit.

Owned by core.scheduler. It knows pages and the time, no rows, requests or steps.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.kv.ledger import Ledger

# Pages verified by one plan after a worker's end. 4 GiB of pages of 2 MiB, which an H200 sums in
# 0.9 ms (4.7 TB/s): longer than the brain takes for two such plans, so 76 GiB go at the device's
# speed. A CPU core sums 5.5 GB/s: 0.8 s a plan of the largest pages, 25 ms of the bundled model's.
VERIFY_PAGES = 2048
# Pages of one plan of the scrub, and the most it is ever behind: 64 MiB of pages of 2 MiB are 14 us
# of an H200; fewer would cost a step's array calls (30 us) for less.
SCRUB_PAGES = 32


class PageChecks:
    """`pages_s`: pages that the scrub reads a second; 0 = off. `verify_pages`: of one plan after a
    worker's end."""

    def __init__(self, limits: Limits, ledger: Ledger, pages_s: float) -> None:
        self.limits = limits
        self.ledger = ledger
        self.pages_s = pages_s
        self.verify_pages = VERIFY_PAGES
        self.verified = self.scrubbed = 0  # pages found unchanged
        self._waiting = np.empty(0, np.uint64)
        self._group, self._page = 0, 0  # where the scrub goes on
        self._credit, self._credit_s = 0.0, 0.0  # pages that may be read, and when that was true

    def restart(self, kept: np.ndarray) -> None:
        """A new epoch: these uint64[k] handles outlived the worker, parents first."""
        self._waiting = kept

    def take_unverified(self) -> np.ndarray:
        """uint64[k] handles for the next plan; none once all were asked for."""
        # Of a page that was given up with its parent nothing need be known.
        while self._waiting.size:
            mine = self._waiting[: self.verify_pages]
            self._waiting = self._waiting[self.verify_pages :]
            mine = mine[self.ledger.are_sealed(mine)]
            if mine.size:
                return mine
        return self._waiting

    # --- the scrub ---

    def due_s(self) -> float:
        """When the next plan of the scrub is due; infinite when it is off or has nothing to do."""
        groups = range(self.limits.groups)
        if self.pages_s <= 0 or not any(self.ledger.sealed_from(g, 0, 1).size for g in groups):
            return float("inf")
        return self._credit_s + max(0.0, SCRUB_PAGES - self._credit) / self.pages_s

    def take_scrub(self, now_s: float) -> np.ndarray:
        """uint64[k] handles of sealed pages to be read again by the plan that is launched now."""
        gained = (now_s - self._credit_s) * self.pages_s
        self._credit = min(float(SCRUB_PAGES), self._credit + gained)
        self._credit_s = now_s
        # A hair less than whole, or a rounding of the clock would wake us for nothing.
        if self._credit < SCRUB_PAGES - 1e-3:
            return np.empty(0, np.uint64)
        self._credit = 0.0
        return self._next_sealed()

    def _next_sealed(self) -> np.ndarray:
        """The next handles in order of group and page, from where the last ones ended; at most a
        round."""
        found: list[np.ndarray] = []
        left = SCRUB_PAGES
        for _ in range(self.limits.groups + 1):
            mine = self.ledger.sealed_from(self._group, self._page, left)
            found.append(mine)
            left -= mine.size
            if left == 0:
                self._page = int(mine[-1] & np.uint64(0xFF_FFFF)) + 1
                break
            self._group, self._page = (self._group + 1) % self.limits.groups, 0
        handles = np.concatenate(found)
        # Where one round ends within the first group, its pages before the start come twice.
        _, first = np.unique(handles, return_index=True)
        return handles[np.sort(first)]
