"""StepClocks: how long the worker's present step may take before it is taken for hung.

A step's clock runs from its start on the device: a plan that is sent while another runs starts when
that one's result came. Its bound is FACTOR times the p99.9 of the steps of its size so far, plus
MARGIN_S, and never more than `timeout_s`. A size that has been seen too seldom borrows the bound of
another, scaled up by how much larger it is; for the very first steps `timeout_s` holds.

A false restart is worse than a late one, so two kinds of time do not count: what this process
itself slept through (`lapse`: a stopped core, a suspended machine), and what the worker waited for
a processor (`starved`: a machine with more load than cores). What is left, a worker that blocks,
spins or is stopped, is a hang.

Pure: told the time and the plans; owned by whoever sends them (core.loop, the simulator).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from holdfast.wire.plan import StepPlan

# The cap, and the bound while nothing is known: a CPU step of a large model takes many seconds.
STEP_TIMEOUT_S = 60.0
# With a histogram that rounds up by 7 % at most: four times.
FACTOR = 3.7
MARGIN_S = 0.5
QUANTILE = 0.999
# A step that takes longer than this and half its bound makes the server not ready until it is back.
LATE_S = 5.0
# Fewer steps than this say little of a size. While no size has so many, the longest step counts
# FEW_FACTOR times and the margin as well: a young server must not wait a minute for a hang.
SAMPLES_MIN = 30
FEW_MIN = 3
FEW_FACTOR = 4
# After so many steps older ones count half: a size's bound follows a machine that became faster.
SAMPLES_MAX = 20_000
# The first steps of an epoch meet cold caches and pages that this process never touched: a size of
# their own.
FRESH_STEPS = 4
# Each size bucket is four times as wide as the one below, and so may take four times as long.
_BASE = 4
# Durations in buckets of a tenth of an octave from 0.1 ms: at most 7.2 % too long.
_FIRST_S = 1e-4
_PER_OCTAVE = 10
_BUCKETS = 20 * _PER_OCTAVE


class Size(NamedTuple):
    """The size of a plan; steps of one size take about the same time. Powers of four of its query
    tokens, of the context that these read, and of pages that are summed, zeroed or copied."""

    fresh: int
    tokens: int
    context: int
    pages: int

    def over(self, other: Size) -> float:
        """How many times as long a step of this size takes as one of `other`, at most."""
        steps = sum(max(0, mine - its) for mine, its in zip(self, other, strict=True))
        return float(_BASE**steps)


def size_of(plan: StepPlan, context_tokens: int, *, fresh: bool) -> Size:
    """Of a plan whose rows together have a context of so many tokens. An admitted token is copied,
    not computed: it counts as a 64th of a query token."""
    pages = plan.seals.size + plan.zeros.size + plan.copies.size
    tokens = int(plan.query_lens.sum()) + plan.admit_tokens.size // 64
    return Size(int(fresh), _power(tokens), _power(context_tokens), _power(pages))


def _power(count: int) -> int:
    """0 for none, 1 for 1 to 3, 2 for 4 to 15, ..."""
    return 0 if count <= 0 else 1 + (count.bit_length() - 1) // 2


class Durations:
    """Seconds of steps of one size: a histogram that forgets slowly. Bounded."""

    __slots__ = ("_counts", "_usual", "count")

    def __init__(self) -> None:
        self.count = 0
        self._counts = [0] * _BUCKETS
        self._usual = 0  # the bucket of the quantile when it was last looked for

    def add(self, seconds: float) -> bool:
        """Whether `quantile` may be another now; a fall of it is told some steps later."""
        at = 0
        if seconds > _FIRST_S:
            at = min(_BUCKETS - 1, math.ceil(math.log2(seconds / _FIRST_S) * _PER_OCTAVE))
        self._counts[at] += 1
        self.count += 1
        if self.count >= SAMPLES_MAX:
            self._counts = [count // 2 for count in self._counts]
            self.count = sum(self._counts)
        return at > self._usual or self.count in (FEW_MIN, SAMPLES_MIN) or self.count % 64 == 0

    def quantile(self) -> float:
        """The p99.9, rounded up to a bucket's end: of fewer than a thousand, the longest."""
        beyond, left = 0, self.count * (1 - QUANTILE)
        for at in range(_BUCKETS - 1, -1, -1):
            beyond += self._counts[at]
            if beyond > left:
                self._usual = at
                return _FIRST_S * 2 ** (at / _PER_OCTAVE)
        return 0.0


class StepClocks:
    """`sent` and `done` in the order of the plans, `reset` at each new epoch.

    starved(): seconds that the worker has waited for a processor since it was last `rested()`; by
    default nobody can tell. margin_s, factor: other numbers for the simulator, whose steps are not
    ours.
    """

    def __init__(
        self,
        timeout_s: float = STEP_TIMEOUT_S,
        *,
        margin_s: float = MARGIN_S,
        factor: float = FACTOR,
        starved: Callable[[], float] = lambda: 0.0,
        rested: Callable[[float], None] = lambda now_s: None,
    ) -> None:
        self._timeout_s = timeout_s
        self._margin_s = margin_s
        self._factor = factor
        self._starved = starved
        self._rested = rested
        self._durations: dict[Size, Durations] = {}
        self._bounds: dict[Size, float] = {}
        self._running: deque[Size] = deque()
        self._started_s = 0.0
        self._starved_s = 0.0
        self._left = 0

    @property
    def started_s(self) -> float:
        """When the present step began."""
        return self._started_s

    @property
    def deadline_s(self) -> float | None:
        """When the present step will have taken too long; None when no plan is with the worker."""
        if not self._running:
            return None
        allowed_s = self._bound(self._running[0]) + self._starved_s
        return self._started_s + min(self._timeout_s, allowed_s)

    def sent(self, plan: StepPlan, context_tokens: int, now_s: float) -> None:
        """A plan has left for the worker."""
        if not self._running:
            self._start(now_s)
        self._left -= 1
        self._running.append(size_of(plan, context_tokens, fresh=self._left >= 0))

    def done(self, now_s: float) -> None:
        """The result of the oldest plan is here; the next one has begun."""
        if not self._running:
            return
        size = self._running.popleft()
        if self._known(size).add(now_s - self._started_s):
            self._bounds.clear()
        self._start(now_s)

    def reset(self) -> None:
        """Another worker: what was sent to the one before is void, what was learnt is not."""
        self._running.clear()
        self._left = FRESH_STEPS

    def lapse(self, seconds: float) -> None:
        """This process was not running for so long: no result could be seen."""
        self._started_s += seconds

    def hung(self, now_s: float) -> bool:
        """Whether the present step has taken too long. To be asked after all results were read."""
        deadline_s = self.deadline_s
        if deadline_s is None or now_s < deadline_s:
            return False
        self._starved_s = max(self._starved_s, self._starved())
        return now_s >= (self.deadline_s or math.inf)

    def late(self, now_s: float) -> bool:
        """Whether the present step takes so long that nobody should send more."""
        deadline_s = self.deadline_s
        if deadline_s is None:
            return False
        return now_s - self._started_s > max(LATE_S, (deadline_s - self._started_s) / 2)

    def _start(self, now_s: float) -> None:
        self._started_s, self._starved_s = now_s, 0.0
        self._rested(now_s)

    def _known(self, size: Size) -> Durations:
        found = self._durations.get(size)
        if found is None:
            found = self._durations[size] = Durations()
        return found

    def _bound(self, size: Size) -> float:
        """Seconds that a step of this size may take."""
        bound = self._bounds.get(size)
        if bound is None:
            usual, margin_s = self._usual(size, SAMPLES_MIN), self._margin_s
            if not usual:
                usual = [FEW_FACTOR * seconds for seconds in self._usual(size, FEW_MIN)]
                margin_s *= FEW_FACTOR
            seen = self._durations.get(size)
            # What has been seen of it, however seldom, is the least that is usual.
            least = 0.0 if seen is None else seen.quantile()
            bound = self._timeout_s
            if usual:
                bound = min(bound, self._factor * max(least, min(usual)) + margin_s)
            self._bounds[size] = bound
        return bound

    def _usual(self, size: Size, samples: int) -> list[float]:
        """What each size that was seen so often says of this one, in seconds."""
        return [
            known.quantile() * size.over(other)
            for other, known in self._durations.items()
            if known.count >= samples
        ]
