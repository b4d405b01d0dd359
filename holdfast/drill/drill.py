"""Drill: one way to break a server, and what is promised then. A frozen description; the families
(faults, processes, pages, load, input) make them, the registry lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from holdfast.drill.server import Needs
from holdfast.drill.stage import Stage

# A worker that is ready to take over: the figure of issue 4 for two cores and the bundled model.
WARM_S = 1.5
# A process must be started, which imports; a worker besides imports torch and warms up.
COLD_CORE_S = 6.0
COLD_WORKER_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """name, what: for `drill list`. play: breaks and judges. streams: without --streams.

    cases: variants, each with a report of its own; a case is `kind` or `kind/phase`.
    caught: how the provocation must be met (report.CAUGHT). sabotage: what is broken besides, in
    words; sabotage_kind: the kind of failure that must see it. ends: ends of the worker a case
    costs, since restarts of a server are paced. needs_sabotaged: of the server under sabotage,
    where that is another. spoils: under sabotage the server is not fit for another drill.
    """

    name: str
    what: str
    play: Callable[[Stage], Awaitable[None]]
    caught: str = "contained"
    streams: int = 8
    needs: Needs = field(default_factory=Needs)
    cases: tuple[str, ...] = ("",)
    sabotage: str = "a wrong page, planted before it is sealed"
    sabotage_kind: str = "tokens"
    needs_sabotaged: Needs | None = None
    ends: int = 1
    spoils: bool = False
