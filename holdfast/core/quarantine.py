"""Quarantine: which request makes the worker fault, found without ending an innocent one.

A worker that faults by itself says nothing of who did it. Suspects are the requests of all steps
in flight, each at its *position*, the tokens that were known of it. Suspicion is of (request,
position) and is over as soon as the request gets past that position.

    faults at one position    the request
    1                         runs as before: others were there as well
    2                         runs alone until it is past the position
    3, the last of them alone ends: nobody else can have done it

A fault that is explained so clears all others of what they were suspected of together with the
culprit. Requests that must run alone do so one after the other, each for as long as its known
tokens take to compute and one token more. A worker that is ended from outside meanwhile says
nothing; after ALONE_EPOCHS_MAX such ends a suspect goes free, so that nobody waits for ever.

All of it is memory of the core: a core that dies forgets its suspicions, and a request that makes
workers fault costs the next core up to three more epochs. Pure; knows no rows, steps or results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Faults that two requests had in common may be chance; who runs alone delays everybody.
_SHARED_FAULTS_MAX = 2
# Workers that end for another reason while one request runs alone, before it goes free.
ALONE_EPOCHS_MAX = 3


@dataclass(slots=True)
class Suspicion:
    """position: tokens known of the request at its faults. interrupted: see ALONE_EPOCHS_MAX."""

    position: int
    faults: int
    interrupted: int = 0


class Quarantine:
    """The suspects of one core. A request id and a position (tokens known) are plain integers."""

    def __init__(self) -> None:
        self._suspicions: dict[int, Suspicion] = {}
        self._line: deque[int] = deque()  # who must run alone, in this order

    @property
    def alone(self) -> int | None:
        """The request beside which nothing may run now."""
        return self._line[0] if self._line else None

    def suspicion(self, request: int) -> Suspicion | None:
        return self._suspicions.get(request)

    def implicate(self, suspects: list[tuple[int, int]], *, shared: bool) -> int | None:
        """The worker faulted with these (request, position) in flight, each request once.

        shared: steps of more than one request were in flight, be they live or not. Returns the
        request that must end because it was alone, if there is one.
        """
        for request, position in suspects:
            before = self._suspicions.get(request)
            if before is None or position > before.position:
                self._clear(request)
                self._suspicions[request] = Suspicion(position, 1)
                continue
            before.faults += 1
            if self.alone == request and not shared:
                self._suspicions.clear()
                self._line.clear()
                return request
            if before.faults >= _SHARED_FAULTS_MAX and request not in self._line:
                self._line.append(request)
        return None

    def interrupt(self) -> None:
        """The worker ended, and nobody in flight had to do with it."""
        if self._line:
            suspicion = self._suspicions[self._line[0]]
            suspicion.interrupted += 1
            if suspicion.interrupted >= ALONE_EPOCHS_MAX:
                self._clear(self._line[0])

    def progress(self, position: int) -> None:
        """So many tokens are known now of the request that runs alone."""
        if position > self._suspicions[self._line[0]].position:
            self._clear(self._line[0])

    def forget(self, request: int) -> None:
        """The request has ended."""
        if self._suspicions:
            self._clear(request)

    def _clear(self, request: int) -> None:
        if self._suspicions.pop(request, None) is not None and request in self._line:
            self._line.remove(request)
