"""WeightsScrub: reads the weights again while a worker serves, a slice between two steps.

Wrong weights give pages with right sums, so nothing else would ever find them. It reads one block
at a time at a bounded rate and does not catch up on what it missed; the sum of a whole pass is the
worker's to report and the keeper's to judge. Read only. Owned by proc.worker.
"""

from __future__ import annotations

import torch

from holdfast.ops.checksum import BLOCK_BYTES, SlabSum

# Of small weights, a pass a second proves enough: each is a word to the supervisor and the keeper.
PASS_S_MIN = 1.0


class WeightsScrub:
    """Of `slab` uint8[bytes] at `gbps` GB a second, more than 0. Times in seconds, any clock."""

    def __init__(self, slab: torch.Tensor, gbps: float, now_s: float) -> None:
        self._sum = SlabSum(slab)
        self._slice_s = BLOCK_BYTES / (gbps * 1e9)
        self._pass_s = now_s
        self._next_s = now_s + self._slice_s

    def due_s(self, now_s: float) -> float:
        """Seconds until the next slice may be read; 0: now."""
        return max(0.0, self._next_s - now_s)

    def read(self, now_s: float) -> int | None:
        """Read a slice that is due: the sum of all once a pass is over, else None."""
        self._next_s = now_s + self._slice_s
        total = self._sum.advance()
        if total is not None:
            self._next_s = max(self._next_s, self._pass_s + PASS_S_MIN)
            self._pass_s = self._next_s
        return total
