"""Draft depth: how many draft tokens a row may try in a step.

A draft token costs a query token of the step and, when it is wrong, nothing else but that; when it
is right it saves a step. So depth follows what was accepted lately: with a chance r that a draft
holds given that those before it did, the draft at depth d is worth its place while r ** d is at
least WORTH. A row whose drafts fail goes down to none and tries one again every PROBE_STEPS.

Owned by core.scheduler, told by core.commit. Pure: no clock, no random numbers; knows rows, not
requests, pages or text. Which tokens are proposed is the device's business.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits

WORTH = 0.4
# A new row starts here: two or three drafts, until its own record says otherwise.
RATE_FIRST = 0.7
# Weight of one step in a row's rate: the last ten steps or so count.
WEIGHT = 0.1
PROBE_STEPS = 16
# Below the rate at which one draft is worth its place.
_RATE_LEAST = 0.02
_RATE_MOST = 0.98


class DraftPolicy:
    """rate: float64[R], the chance that a row's next draft is right, smoothed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rate = np.full(limits.rows_total, RATE_FIRST)
        self.proposed = 0
        self.accepted = 0

    def enter(self, row: int) -> None:
        """A request gets this row: what its predecessor's drafts were worth says nothing."""
        self.rate[row] = RATE_FIRST

    def depths(self, rows: np.ndarray, step: int, tokens: int) -> np.ndarray:
        """int32[k]: drafts for each of these rows in `step`, at most `tokens` in all.

        When the rows together want more than that, all are cut to the same depth.
        """
        most = self.limits.draft_depth
        depth = np.floor(np.log(WORTH) / np.log(self.rate[rows])).astype(np.int32)
        np.clip(depth, 0, most, out=depth)
        if step % PROBE_STEPS == 0:
            np.maximum(depth, 1, out=depth)
        if int(depth.sum()) > tokens:
            np.minimum(depth, tokens // max(1, rows.size), out=depth)
        return depth

    def learn(self, rows: np.ndarray, drafts: np.ndarray, accepted: np.ndarray) -> None:
        """rows int32[k] had uint8[k] drafts of which the first `accepted` uint8[k] held.

        Of d drafts with a right ones, a were right and, when a < d, one was wrong; those behind it
        were never judged.
        """
        tried = drafts > 0
        if np.count_nonzero(tried) == 0:
            return
        rows, drafts, accepted = rows[tried], drafts[tried], accepted[tried]
        judged = np.minimum(accepted + np.uint8(1), drafts)
        seen = accepted / judged
        rate = self.rate[rows] + WEIGHT * (seen - self.rate[rows])
        self.rate[rows] = np.clip(rate, _RATE_LEAST, _RATE_MOST)
        self.proposed += int(drafts.sum())
        self.accepted += int(accepted.sum())
