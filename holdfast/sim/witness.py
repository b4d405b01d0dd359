"""Witness: what happened to each request between api and core, and so which ends have a cause.

Sees every message in both directions and every plan, counts for itself, and asks the engine only
for what is live. Raises Violation for what must never be said: a token after a cancel or too late,
a second Cancel or Finish, an admitted request that the core does not know, work for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from holdfast.api.generation import TIMEOUT_MIN_S
from holdfast.config import Limits
from holdfast.core.request import Request
from holdfast.sim.oracle import ClientView
from holdfast.sim.rot import Cell, Rot
from holdfast.sim.violation import Violation
from holdfast.sim.world import Job
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    Finish,
    Refused,
    Resume,
    Submit,
    ToApi,
    ToCore,
    TokenBatch,
)


class Witness:
    """`grace`: virtual time in which a word from api reaches the core."""

    def __init__(self, limits: Limits, grace: int, rot: Rot) -> None:
        self.limits = limits
        self.grace = grace
        self.rot = rot
        self.views: dict[int, ClientView] = {}
        self.poison: dict[int, int] = {}  # request -> position whose computation kills the worker
        self.not_finite: set[int] = set()  # requests with a row that the world made so
        self.faulted: set[int] = set()  # requests that a core which died had ended by a fault
        self.gapped: set[int] = set()  # requests of which the world lost a token
        self._deadlines: dict[int, int] = {}
        self._asked: set[tuple[int, int]] = set()  # (life of core, request submitted or resumed)
        self._admitted: set[int] = set()
        self._over: set[int] = set()  # the core was told that nobody wants them
        self._told: set[tuple[int, int, int]] = set()  # (life of core, life of api, request)
        self._full: dict[int, bool] = {}  # first id of a Submit -> whether a bound was reached
        self._rows: dict[tuple[int, int], list[int]] = {}  # (epoch, step) -> its rows' requests

    def register(self, view: ClientView, deadline: int) -> None:
        """A choice is asked for under a new id; the core learns its deadline a little later."""
        if view.request in self.views:
            raise Violation(f"request id {view.request:#x} was given out twice")
        self.views[view.request] = view
        if view.job.poison_at is not None:
            self.poison[view.request] = view.job.poison_at
        self._deadlines[view.request] = deadline + self.grace + int(TIMEOUT_MIN_S * 1e6) + 1

    # --- messages ---

    def to_core(
        self,
        message: ToCore,
        lives: tuple[int, int],
        live: Iterable[Request],
        active: int,
        now: int,
        waited: int,
    ) -> None:
        """A message reaches a core with these requests `live`, `active` of them in a row.

        lives: of that core, and of the api process that sent it. waited: until the core read it.
        """
        if isinstance(message, Submit):
            self._postpone(message, now, waited)
            self._asked.update((lives[0], request) for request in message.ids)
            self._submit(message, list(live), active)
        elif isinstance(message, Resume):
            self._asked.update((lives[0], request) for request, _ in message.pairs)
        over = message.ids if isinstance(message, Cancel) else ()
        over = (message.id,) if isinstance(message, Finish) else over
        for request in over:
            if (*lives, request) in self._told:
                raise Violation(f"request {request:#x} was cancelled or finished twice")
            self._told.add((*lives, request))
        self._over.update(over)

    def _postpone(self, submit: Submit, now: int, waited: int) -> None:
        """What is left of a request's time is said when it is sent, and counts from its reading."""
        late = now + int(TIMEOUT_MIN_S * 1e6) + 1
        passed = submit.timeout_s <= TIMEOUT_MIN_S  # before a core was there, which is to end it
        for request in submit.ids:
            deadline = self._deadlines.get(request, 0) + waited
            self._deadlines[request] = max(deadline, late) if passed else deadline

    def _submit(self, submit: Submit, live: list[Request], active: int) -> None:
        if not all(request in self.views for request in submit.ids):
            raise Violation(f"{submit.ids} were submitted under ids that no client has")
        limit = len(submit.prompt) // 4 + submit.max_tokens
        tokens = sum(request.limit for request in live) + len(submit.ids) * limit
        self._full[submit.ids[0]] = (
            len(live) - active + len(submit.ids) > self.limits.queue_requests
            or tokens > self.limits.live_tokens
        )

    def dropped(self, requests: Iterable[int]) -> None:
        """The core drops these by itself: their api process died."""
        self._over.update(requests)

    def to_api(self, message: ToApi) -> None:
        """The core answers."""
        if isinstance(message, Accepted):
            self._admitted.update(message.ids)
        elif isinstance(message, Refused):
            for request in message.ids:
                if request in self._admitted and request not in self._over:
                    raise Violation(f"request {request:#x} was admitted and then forgotten")

    def tokens(self, life: int, api: int, batch: TokenBatch, now: int) -> None:
        """The core of this life sends tokens: none unasked, none after it was told to stop, none to
        another api process, none too late."""
        for request, index, token in zip(
            batch.requests.tolist(), batch.indexes.tolist(), batch.tokens.tolist(), strict=True
        ):
            if self.rot.excuses(request, index):
                self.views[request].excuse(index, token)
            if request in self._over:
                raise Violation(f"request {request:#x}: a token after its cancel or finish")
            if (life, request) not in self._asked:
                raise Violation(f"request {request:#x}: its client has not asked this core yet")
            if request >> 48 != api:
                raise Violation(f"request {request:#x}: its token goes to api process {api}")
            # Step 0: made earlier, and sent to a client that resumes.
            if batch.step and now > self._deadlines[request]:
                raise Violation(f"request {request:#x}: token {index} was made after its deadline")

    def plan(
        self,
        key: tuple[int, int],
        requests: list[int],
        now: int,
        linked_since: Callable[[int], int | None],
    ) -> None:
        """Plan `key` (epoch, step) computes these; for nobody no longer than the word takes.

        linked_since: since when an api process has a link to this core, None when it has none.
        """
        self._rows[key] = requests
        for request in requests:
            view = self.views[request]
            if view.ended_at is None or view.orphaned:
                continue
            since = linked_since(request >> 48)
            if since is not None and now > max(view.ended_at, since) + self.grace:
                raise Violation(f"request {request:#x} ({view.how}) is computed for nobody")

    def spoil(self, key: tuple[int, int], row: int) -> None:
        """The world makes place `row` of plan `key` not finite."""
        self.not_finite.add(self._rows[key][row])

    def misread(self, key: tuple[int, int], place: int, position: int, cells: set[Cell]) -> None:
        """The row at `place` of plan `key` draws its token at `position` with rotten cells in
        sight."""
        request = self._rows[key][place]
        index = position - len(self.views[request].job.prompt)
        self.rot.drawn(key, request, index, cells)

    # --- causes ---

    def may_refuse(self, request: int) -> bool:
        """Whether a bound was reached when the Submit of this first id came to the core."""
        return self._full.get(request, False)

    def never_fits(self, job: Job) -> bool:
        """Whether this engine can never take such a job."""
        limits, limit = self.limits, len(job.prompt) + job.max_tokens
        return (
            limits.pages_for_tokens(limit) > limits.pages_usable
            or job.choices > limits.queue_requests
            or job.choices * limit > limits.live_tokens
        )
