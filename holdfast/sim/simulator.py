"""The simulator: the production api, brain, journal and rows under one seeded order of events.

    clients, api (sim.api) -> channel -> core (Brain, sim.core) -> channel -> worker (sim.worker)
    supervisor (proc.lifecycle, sim.processes): notices, kills, fences, starts, promotes

Time is virtual and integer; events are a heap of (time, serial number); every choice comes from one
Random of the seed. No asyncio, no wall clock, no hash order: one seed, one trace, byte for byte.
Faults come at the world's rates until `faults_until`; then the world heals, and every live request
must end within a bound. Checkers run after every event (sim.checkers).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.sim.api import SimApi
from holdfast.sim.copy_traffic import CopyTraffic
from holdfast.sim.core import SimCore
from holdfast.sim.fake_graphs import Capture
from holdfast.sim.fake_worker import memory_of
from holdfast.sim.oracle import Answer, answer_to
from holdfast.sim.processes import Processes
from holdfast.sim.rot import Rot
from holdfast.sim.violation import Violation
from holdfast.sim.witness import Witness
from holdfast.sim.world import Job, World

# An event is handled in no virtual time, so a livelock would spin: this many events end the run.
EVENTS_MAX = 200_000


@dataclass(slots=True)
class Outcome:
    """How one seed ended. `violation` is None when everything held."""

    seed: int
    violation: str | None
    events: int
    steps: int
    tokens: int
    faults: dict[str, int]
    ends: dict[str, int]


class Simulation:
    """One run. `trace` gets one line an event when given."""

    def __init__(self, world: World, trace: Callable[[str], None] | None = None) -> None:
        self.world = world
        self.limits = world.limits
        self.rng = Random(world.seed * 0x85EB_CA6B + 7)
        self.now = 0
        self._events: list[tuple[int, int, Callable[[], None], str]] = []
        self._serial = 0
        self._trace = trace
        self.handled = 0
        self.touched = False  # whether the event at hand reached the core
        self.steps = 0
        self.faults: dict[str, int] = {}
        self.refusals = 0  # at the api process's own door
        self._answers: dict[tuple[int, int], Answer] = {}
        # In the liveness phase everything ends long before.
        self.horizon = world.faults_until + 20_000 * world.step_time
        self.journal = memoryview(bytearray(Journal.size(self.limits)))
        self.metrics = Metrics(memoryview(bytearray(Metrics.size(1))), 0)
        self.memory = memory_of(self.limits)
        self.rot = Rot(self.memory[0])
        self.witness = Witness(self.limits, world.channel_time, self.rot)
        self.pages_void = False  # changed by a worker that ended, and not dropped yet
        self.captures: list[Capture] = []  # graphs of the worker before
        self.old_results: list[tuple[int, bytes]] = []
        self.copies = CopyTraffic(self)
        self.core: SimCore  # the last one
        self.apis = [SimApi(self, index) for index in range(self.limits.api_processes)]
        self.processes = Processes(self)
        self.processes.boot()
        for job in world.jobs:
            self.at(
                job.at, lambda job=job: self.apis[job.api].arrive(job), f"client {job.number} asks"
            )

    # --- time ---

    def at(self, time: int, action: Callable[[], None], label: str) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, action, label))

    def after(self, delay: int, action: Callable[[], None], label: str) -> None:
        self.at(self.now + delay, action, label)

    def chance(self, rate: str, rng: Random | None = None) -> bool:
        """Whether a fault strikes now. Draws the same whether it is on or off, and never heals
        in the safety phase."""
        value = getattr(self.world.rates, rate)
        drawn = (rng or self.rng).random()
        if self.now >= self.world.faults_until or drawn >= value:
            return False
        self.faults[rate] = self.faults.get(rate, 0) + 1
        self.say(f"FAULT {rate}")
        return True

    def say(self, text: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.now:>12} {text}")

    @property
    def now_s(self) -> float:
        return self.now * 1e-6

    def run(self) -> Outcome:
        """Run to the end. Never raises for what it is meant to find."""
        violation = None
        try:
            self.run_until(lambda: False)
            self._check_end()
        except Exception as error:
            # Whatever a tick raises would end the core, again and again: all of it is a finding.
            violation = f"{type(error).__name__}: {error}"
            self.say(f"VIOLATION {violation}")
        ends: dict[str, int] = {}
        for view in self.witness.views.values():
            ends[view.how or "none"] = ends.get(view.how or "none", 0) + 1
        tokens = sum(view.tokens for view in self.witness.views.values())
        return Outcome(
            self.world.seed, violation, self.handled, self.steps, tokens, self.faults, ends
        )

    def run_until(self, over: Callable[[], bool]) -> None:
        """Handle events until `over` or none is left."""
        while self._events and not over():
            self.now, _, action, label = heapq.heappop(self._events)
            self.handled += 1
            if self.handled > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events")
            self.say(label)
            action()
            self._check()

    # --- for api ---

    def answer_to(self, job: Job, choice: int) -> Answer:
        """The oracle's answer, computed once."""
        key = (job.number, choice)
        if key not in self._answers:
            self._answers[key] = answer_to(job, choice, self.limits)
        return self._answers[key]

    # --- checks ---

    def _check(self) -> None:
        if self.touched and self.core.up:  # Else nothing but virtual time has changed for it.
            self.core.check()
        self.touched = False

    def _check_end(self) -> None:
        """Liveness: everything ended, and everything is home."""
        for view in self.witness.views.values():
            if view.how is None:
                raise view.wrong(f"never ended ({view.tokens} of {len(view.answer.tokens)} tokens)")
        if self.processes.gave_up:
            self.processes.check_over()
            return
        self.core.check_end()
        self.copies.check_end()


def simulate(world: World, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run one world to its end."""
    return Simulation(world, trace).run()
