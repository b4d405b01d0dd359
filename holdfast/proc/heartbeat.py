"""Heartbeat: who was asked whether it is there, and has not answered.

The state table says who is asked (lifecycle.states.PINGED): processes that wait for nothing, so
that no deadline of theirs would ever show that they hang. Only time that the supervisor itself was
awake counts, so that a laptop that slept, or a supervisor that was stopped, blames nobody. Pure:
told the time, and by whom it was answered.
"""

from __future__ import annotations

from collections.abc import Iterable

# One question a second and process: a message of some twenty bytes.
PERIOD_S = 1.0
# What one look at the clock adds at most. The supervisor looks at least once a second.
LOOK_S_MAX = 2.0


class Heartbeat:
    """`tick` at least once a PERIOD_S. timeout_s: of one answer, in seconds awake."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._looked_s = now_s
        self._awake_s = 0.0
        # Process -> when it was asked last, and since when it owes an answer (None: it does not).
        self._asked: dict[int, float] = {}
        self._owes: dict[int, float] = {}

    def answered(self, process: int) -> None:
        """It is there. Harmless of one that was not asked."""
        self._owes.pop(process, None)

    def tick(self, processes: Iterable[int], now_s: float) -> tuple[list[int], list[int]]:
        """(whom to ask now, who is silent) of the processes that are to be asked, in their order.
        One that is silent is named once."""
        self._awake_s += min(max(0.0, now_s - self._looked_s), LOOK_S_MAX)
        self._looked_s = now_s
        watched = list(processes)
        for book in (self._asked, self._owes):
            for gone in [one for one in book if one not in watched]:
                del book[gone]
        silent = [
            process
            for process in watched
            if self._awake_s - self._owes.get(process, self._awake_s) > self._timeout_s
        ]
        for process in silent:
            del self._owes[process]
        ask = [
            process
            for process in watched
            if process not in self._owes
            and process not in silent
            and self._awake_s - self._asked.get(process, -PERIOD_S) >= PERIOD_S
        ]
        for process in ask:
            self._asked[process] = self._owes[process] = self._awake_s
        return ask, silent
