"""Checkers: what must hold after every event of a simulation, said independently of the engine.

Each raises Violation, whose text names the request, page or step. They derive nothing from the
engine's own bookkeeping where they can keep their own: what a client saw, which launched step may
touch which page, what the oracle's text is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from holdfast.config import Limits
from holdfast.sim.copy_watch import CopyWatch
from holdfast.sim.fake_worker import expected_token
from holdfast.sim.violation import Violation
from holdfast.sim.world import Job
from holdfast.wire.messages import End
from holdfast.wire.plan import StepPlan
from holdfast.wire.rows import RowTable


class ClientView:
    """What the client of one request id has seen, against the oracle."""

    def __init__(self, job: Job, request: int) -> None:
        self.job = job
        self.request = request
        self.history = list(job.prompt)
        self.tokens = 0
        self.end: End | None = None
        self.accepted = False
        self.abandoned = False  # cancelled, or its api process died: nothing is owed any more

    def token(self, index: int, token: int, end: End, vocab_size: int) -> None:
        """One token reached the client."""
        if self.end is not None:
            raise Violation(f"request {self.request:#x}: token {index} after its end {self.end!r}")
        if index != self.tokens:
            raise Violation(
                f"request {self.request:#x}: token index {index} after {self.tokens} tokens"
            )
        want = expected_token(np.array(self.history, np.int32), vocab_size)
        if token != want:
            raise Violation(
                f"request {self.request:#x}: token {index} is {token}, its own history gives {want}"
            )
        self.history.append(token)
        self.tokens += 1
        if end is not End.NONE:
            self.finish(end)

    def finish(self, end: End) -> None:
        """The request ended; whether that end is right."""
        if self.end is not None:
            raise Violation(f"request {self.request:#x} ended twice: {self.end!r}, {end!r}")
        self.end = end
        full = self.tokens == self.job.max_tokens
        stopped = self.tokens > 0 and self.history[-1] in self.job.stop_ids
        if end is End.LENGTH and not full:
            raise Violation(f"request {self.request:#x}: LENGTH after {self.tokens} tokens")
        if end is End.STOP and not stopped and self.job.finish_after is None:
            raise Violation(f"request {self.request:#x}: STOP without a stop id")
        if stopped and end is End.LENGTH:
            raise Violation(f"request {self.request:#x}: its stop id was taken for its length")


class PageWatch:
    """No page gets a new writer while a launched step of another life may touch it.

    Keeps a row table of its own that follows the plans at launch, so it sees what the device will.
    """

    def __init__(self, limits: Limits, copies: CopyWatch) -> None:
        self.limits = limits
        self.copies = copies
        self.rows = RowTable(limits)
        self.touched: dict[int, dict[int, int]] = {}  # page -> life -> last launched step
        self.tenants: dict[int, str] = {}  # page -> whose tokens it holds
        self.handles: dict[int, int] = {}  # handle -> the life it was given to, for ever
        self.acknowledged = 0

    def launch(
        self,
        plan: StepPlan,
        tenant_of_row: Callable[[int], str],
        handle_of: Callable[[int, int], int],
    ) -> None:
        """`plan` is about to be sent; the callbacks say whose request holds a row of it, and by
        which handle the brain holds the page in (row, column)."""
        rows, size = self.rows, self.limits.page_tokens
        rows.apply(plan)
        for row, count in zip(plan.rows.tolist(), plan.query_lens.tolist(), strict=True):
            life, start = int(rows.records["owner"][row]), int(rows.length[row])
            table = rows.page_table[0, row]
            if life == 0:
                raise Violation(f"step {plan.step} computes row {row}, which nobody owns")
            last = (start + count - 1) // size
            tenant = tenant_of_row(row)
            for page in table[start // size : last + 1].tolist():
                self._write(plan.step, page, life)
            for column in range(-(-start // size), last + 1):
                self.tenants[int(table[column])] = tenant
                handle = handle_of(row, column)
                if self.handles.setdefault(handle, life) != life:
                    raise Violation(f"step {plan.step}: handle {handle:#x} is given out again")
            for page in table[: last + 1].tolist():
                if page == 0:
                    raise Violation(f"step {plan.step}: row {row} reads the trash page")
                if self.tenants.get(page) != tenant:
                    raise Violation(
                        f"step {plan.step}: row {row} of tenant {tenant} reads page {page}, which "
                        f"holds tokens of {self.tenants.get(page)}"
                    )
                self.touched.setdefault(page, {})[life] = plan.step
                self.copies.step_touches(plan.step, page, writes=False)
        rows.advance(plan, np.zeros(plan.rows.size, np.int32))

    def copy_writes(self, page: int) -> None:
        """A copy that begins now writes a page."""
        for life, last in self.touched.get(page, {}).items():
            if last > self.acknowledged:
                raise Violation(f"a copy writes page {page} while step {last} of life {life} runs")

    def _write(self, step: int, page: int, life: int) -> None:
        self.copies.step_touches(step, page, writes=True)
        for other, last in self.touched.get(page, {}).items():
            if other != life and last > self.acknowledged:
                raise Violation(
                    f"step {step} writes page {page} for life {life} while step {last} of life "
                    f"{other} may still touch it"
                )

    def acknowledge(self, step: int) -> None:
        self.acknowledged = step


def check_bounds(limits: Limits, in_flight: int, live: int, live_tokens: int) -> None:
    """No queue over its bound."""
    if in_flight > limits.steps_ahead:
        raise Violation(f"{in_flight} plans in flight, bound {limits.steps_ahead}")
    if live > limits.live_requests:
        raise Violation(f"{live} live requests, bound {limits.live_requests}")
    if live_tokens > limits.live_tokens:
        raise Violation(f"{live_tokens} live tokens, bound {limits.live_tokens}")
