"""The simulator: the production api, brain, journal and rows under one seeded order of events.

    clients, api (sim.api) -> channel -> core (Brain, here) -> channel -> worker (sim.worker)
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
from typing import Any

from holdfast.core.brain import POISON_MESSAGE, Brain
from holdfast.core.journal import Journal, recover
from holdfast.core.metrics import Metrics
from holdfast.errors import WorkerFault
from holdfast.proc.lifecycle.states import Event
from holdfast.sim.api import SimApi
from holdfast.sim.checkers import PageWatch, Suspects, check_bounds, check_sums
from holdfast.sim.copy_traffic import CopyTraffic
from holdfast.sim.fake_graphs import Capture
from holdfast.sim.fake_worker import memory_of
from holdfast.sim.oracle import Answer, answer_to
from holdfast.sim.page_order import PageOrder
from holdfast.sim.processes import Processes
from holdfast.sim.violation import Violation
from holdfast.sim.witness import Witness
from holdfast.sim.worker import SimWorker
from holdfast.sim.world import Job, World
from holdfast.wire.link import Kind, MemoryLink
from holdfast.wire.messages import End, Ended, TokenBatch, decode_to_api, decode_to_core
from holdfast.wire.plan import StepPlan, StepResult

# An event is handled in no virtual time, so a livelock would spin: this many events end the run.
EVENTS_MAX = 200_000
# Sealed pages are read again every so many checks.
SCRUB_EVERY = 10
# A result that is not back after so many step times means that the worker hangs.
HANG_STEPS = 300


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
        self.checks = 0
        self.touched = False  # whether the event at hand reached the core
        self.steps = 0
        self.faults: dict[str, int] = {}
        self.witness = Witness(self.limits, world.channel_time)
        self.refusals = 0  # at the api process's own door
        self._answers: dict[tuple[int, int], Answer] = {}
        # In the liveness phase everything ends long before.
        self.horizon = world.faults_until + 20_000 * world.step_time
        self.journal = memoryview(bytearray(Journal.size(self.limits)))
        self.metrics = Metrics(memoryview(bytearray(Metrics.size(1))), 0)
        self.memory = memory_of(self.limits)
        self.pages_void = False  # changed by a worker that ended, and not dropped yet
        self.captures: list[Capture] = []  # graphs of the worker before
        self.old_results: list[tuple[int, bytes]] = []
        self.copies = CopyTraffic(self)
        self.core_life = 0
        self.core_up = False
        self.apis = [SimApi(self, index) for index in range(self.limits.api_processes)]
        self.processes = Processes(self)
        self.processes.boot()
        for job in world.jobs:
            self.at(
                job.at, lambda job=job: self.apis[job.api].arrive(job), f"client {job.number} asks"
            )

    @property
    def epoch(self) -> int:
        """The core's."""
        return self.brain.epoch

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
            self._run()
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

    def _run(self) -> None:
        self.run_until(lambda: False)
        self._check_end()

    def run_until(self, over: Callable[[], bool]) -> None:
        """Handle events until `over` or none is left."""
        while self._events and not over():
            self.now, _, action, label = heapq.heappop(self._events)
            self.handled += 1
            if self.handled > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events: {self.brain.live} live")
            self.say(label)
            action()
            self._check()

    # --- the core: what core.loop does ---

    def core_spawned(self, life: int, epoch: int) -> None:
        """A core process begins; until it has started it reads nothing."""
        self.core_life, self._spawned_epoch = life, epoch
        self.peers: dict[int, int] = {}  # index -> number of the api process that it is linked to
        self._known: set[int] = set()  # numbers of those that it has ever been linked to
        self._unread: list[tuple[int, bytes, int]] = []  # of api processes that it will meet

    def core_starts(self) -> None:
        """It has read the journal, and listens."""
        journal = Journal(self.journal, self.limits)
        self.brain = Brain(
            self.limits,
            journal,
            self.metrics,
            epoch=self._spawned_epoch,
            life=self.core_life,
            wall_ns=lambda: self.now * 1000,
        )
        self.core_link, _ = MemoryLink.pair()
        self.core_link.epoch = self._spawned_epoch
        self.order = PageOrder(self.limits)
        self._new_watch()
        self.suspects = Suspects(self.limits, self.witness.poison)
        self.worker: SimWorker | None = None
        self._implicates = self._draining = False
        self.core_up = True
        self.brain.suspend()
        if self.core_life > 1:
            recovered = recover(self.journal)
            faulted = (one for one, entry in recovered.items() if entry.end == End.ENGINE_FAULT)
            self.witness.faulted.update(faulted)
            self.brain.restore(recovered, self.now_s)
        self.tick()

    def core_died(self) -> None:
        """Memory of the core is gone, and what it had not handed to a socket yet; what it had sent
        is still in the sockets, and read unless the supervisor's word is quicker."""
        self.core_up, gone = False, self.core_life
        for api in self.apis:
            api.core_died()
            noticed = self.rng.choice([0, self.world.channel_time])
            self.after(noticed, lambda api=api: api.link_lost(gone), f"api {api.index} lost it")

    def core_obeys(self, message: dict[str, Any]) -> None:
        """A word of the supervisor."""
        kind = message["type"]
        if kind == "worker":
            self._new_worker(message["epoch"], message["worker"])
        elif kind == "worker_lost":
            if self.worker is not None and self.worker.epoch <= message["epoch"]:
                self._lose_worker(message["detail"])
            self._implicates = message["implicates"]
        elif kind == "api":
            self._new_api(message["index"], message["process"], fresh=message["fresh"])
        elif kind == "api_lost":
            self._lose_api(message["index"])
        elif kind == "drain":
            self._draining = True
            self.brain.drain()
        else:
            assert kind == "end_all"
            self.brain.end_all(End(message["end"]), message["message"], self.now_s)
        self.tick()

    def _new_worker(self, epoch: int, worker: SimWorker) -> None:
        if self.worker is not None:
            raise Violation(f"epoch {epoch} comes to a core that has epoch {self.worker.epoch}")
        if self._implicates:
            self._take_suspects()
        self.worker = worker
        self.core_link.epoch = epoch
        self.copies.watch.fence(epoch)
        self.order.fence()
        self._new_watch()
        self.pages_void = False
        self.brain.new_epoch(epoch, self.now_s, implicates=self._implicates)
        self._implicates = False

    def _new_watch(self) -> None:
        self.watch = PageWatch(self.limits, self.copies.watch, self.order)
        self.flights: dict[int, list[tuple[int, int, int]]] = {}

    def _lose_worker(self, why: str, *, hung: bool = False) -> None:
        """Nothing of this epoch counts any more."""
        assert self.worker is not None
        self.say(f"the core gives up epoch {self.worker.epoch}: {why}")
        self.processes.accuse_worker(self.worker.epoch, why, hung=hung)
        self.worker = None
        self.touched = True
        self.brain.suspend()

    def worker_closed(self, worker: SimWorker) -> None:
        """The end of a worker's link."""
        if self.core_up and self.worker is worker:
            self._lose_worker("peer closed the link")

    def worker_says(self, epoch: int, kind: Kind, frame: bytes) -> None:
        """A frame of the worker of an epoch, if its link leads to this core."""
        if self.core_up and self.processes.core_of(epoch) == self.core_life:
            self.core_link.deliver(epoch, kind, frame)
            self.tick()

    def _new_api(self, index: int, process: int, *, fresh: bool) -> None:
        if fresh:
            self._lose_api(index)
        self.peers[index] = process
        self._known.add(process)
        unread = [one for one in self._unread if one[2] == process]
        self._unread = [one for one in self._unread if one[2] != process]
        for api, frame, _ in unread:
            self._receive(api, frame)

    def _lose_api(self, index: int) -> None:
        self._flush()
        self.peers.pop(index, None)
        self.witness.dropped(one for one in self.brain.requests if one >> 48 == index)
        self.brain.drop_api(index, self.now_s)

    def api_closed(self, index: int, process: int, life: int) -> None:
        """The end of an api process's link."""
        if self.core_up and life == self.core_life and self.peers.get(index) == process:
            self._lose_api(index)
            self.processes.accuse_api(process, "peer closed the link")
            self.tick()

    def core_receives(self, api: int, frame: bytes, life: int, process: int) -> None:
        """A frame of an api process arrives at the core that it was sent to."""
        if life != self.core_life:
            return  # sent to a core that has died
        if process not in self._known:
            self._unread.append((api, frame, process))
        elif self.core_up and self.peers.get(api) == process:
            self._receive(api, frame)
            self.tick()

    def _receive(self, api: int, frame: bytes) -> None:
        message = decode_to_core(frame)
        running = self.brain.scheduler.running
        lives = (self.core_life, self.apis[api].life)
        self.witness.to_core(message, lives, self.brain.requests.values(), running.active)
        self.brain.receive(api, message, self.now_s)

    def tick(self) -> None:
        """What follows any input: results, deadlines, plans, output."""
        if not self.core_up:
            return
        self.touched = True
        if self.chance("api_death"):
            self.processes.kill_api(self.rng.randrange(self.limits.api_processes))
        for kind, payload in self.core_link.drain():
            if kind == Kind.COPIES:
                self.copies.acknowledge(payload)
                continue
            assert kind == Kind.RESULT
            result = StepResult.decode(payload)
            before = self.brain.in_flight
            try:
                self.brain.commit(result, self.now_s)
            except WorkerFault as fault:
                self._flush()
                if self.worker is not None:
                    self._lose_worker(f"refused: {fault}")
                return
            if self.brain.in_flight < before:
                self.watch.acknowledge(result)
        try:
            self.brain.expire(self.now_s)
        except WorkerFault as fault:
            self._flush()
            self.copies.check_given_up()
            if self.worker is not None:
                self._lose_worker(f"given up: {fault}")
        if self.chance("core_death"):
            self.processes.kill_core()
            return
        while self.worker is not None and (plan := self.brain.plan(self.now_s)) is not None:
            self.steps += 1
            self.watch.launch(plan, self._tenant_of, self._handle_of)
            requests = self.brain.scheduler.running.ids[plan.rows].tolist()
            self.witness.plan((self.epoch, plan.step), requests, self.now, self._linked_since)
            self.flights[plan.step] = self._computes(plan)
            self.copies.launch(plan)
            self._send_plan(plan, self.worker)
        self.copies.pump()
        self._flush()
        if self._draining and self.brain.live == 0:
            self._draining = False
            self.processes.core_says(Event.DRAINED)
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline < 1e5:
            self.at(max(self.now + 1, int(deadline * 1e6) + 1), self._wake, "core wakes")

    def _computes(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """(request, first, last) for each row of a plan that was launched: positions computed."""
        ids = self.brain.scheduler.running.ids[plan.rows].tolist()
        ends = self.watch.rows.length[plan.rows].tolist()
        return [
            (one, end - count, end - 1)
            for one, end, count in zip(ids, ends, plan.query_lens.tolist(), strict=True)
        ]

    def poisoned(self, step: int) -> int | None:
        """The request whose poison this step computes."""
        for request, first, last in self.flights.get(step, ()) if self.witness.poison else ():
            if first <= self.witness.poison.get(request, -1) <= last:
                return request
        return None

    def _tenant_of(self, row: int) -> str:
        request = self.brain.scheduler.running.requests[row]
        if request is None:
            raise Violation(f"row {row} is launched for nobody")
        return request.admission.tenant

    def _handle_of(self, group: int, row: int, column: int) -> int:
        return int(self.brain.scheduler.running.handles[group, row, column])

    def _linked_since(self, api: int) -> int | None:
        found = self.apis[api]
        return found.linked_at if found.linked == self.core_life else None

    def _wake(self) -> None:
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline <= self.now_s:
            self.tick()

    def _flush(self) -> None:
        life = self.core_life
        for api, kind, payload in self.brain.take_output():
            if kind == Kind.MESSAGE:
                self._check_message(payload)
            if kind == Kind.TOKENS:
                batch = TokenBatch.decode(payload)
                self.witness.tokens(life, api, batch, self.now)
                # Not an end, nor an answer to a Resume: what follows shows that it is missing.
                plain = batch.step and not batch.ends.any() and self.core_life == 1
                if plain and self.chance("output_lost"):
                    self.witness.gapped.update(batch.requests.tolist())
                    continue
            else:
                self.witness.to_api(decode_to_api(payload))
            if api not in self.peers:
                continue
            link = (life, self.peers[api])
            for _ in range(2 if self.chance("output_twice") else 1):
                self.after(
                    self.world.channel_time,
                    lambda api=api, kind=kind, payload=payload, link=link: self.apis[api].receive(
                        kind, payload, link
                    ),
                    f"api {api} receives",
                )

    def _check_message(self, payload: bytes) -> None:
        message = decode_to_api(payload)
        if isinstance(message, Ended) and message.message == POISON_MESSAGE:
            self.suspects.ended(message.id)

    def _send_plan(self, plan: StepPlan, worker: SimWorker) -> None:
        frame, key = plan.encode(), f"{plan.epoch}:{plan.step}"
        self.after(
            self.world.channel_time,
            lambda: worker.receives(frame),
            f"worker receives plan {key}",
        )
        self.after(
            HANG_STEPS * self.world.step_time + 100 * self.world.channel_time,
            lambda: self._watchdog(worker, plan.step),
            f"watchdog of plan {key}",
        )

    def _watchdog(self, worker: SimWorker, step: int) -> None:
        if self.core_up and self.worker is worker and step > self.watch.acknowledged:
            self._lose_worker(f"no result of step {step} in time", hung=True)

    def _take_suspects(self) -> None:
        in_flight = {
            request
            for step, computed in self.flights.items()
            if step > self.watch.acknowledged
            for request, _, _ in computed
        }
        live = [self.brain.requests.get(one) for one in sorted(in_flight)]
        known = {one.id: int(self.brain._tokens_of(one).size) for one in live if one is not None}
        self.suspects.fault(in_flight, known)

    # --- for api ---

    def answer_to(self, job: Job, choice: int) -> Answer:
        """The oracle's answer, computed once."""
        key = (job.number, choice)
        if key not in self._answers:
            self._answers[key] = answer_to(job, choice, self.limits)
        return self._answers[key]

    # --- checks ---

    def _check(self) -> None:
        if not self.touched or not self.core_up:
            return  # Nothing but the virtual time has changed for the core.
        self.touched = False
        self.brain.verify()
        self.checks += 1
        if self.checks % SCRUB_EVERY == 0 and not self.pages_void:
            check_sums(self.brain.ledger, self.memory, self.limits)
        self.copies.check()
        admission = self.brain.admission
        check_bounds(
            self.limits, self.brain.in_flight, admission.live_requests, admission.live_tokens
        )

    def _check_end(self) -> None:
        """Liveness: everything ended, and everything is home."""
        for view in self.witness.views.values():
            if view.how is None:
                raise view.wrong(f"never ended ({view.tokens} of {len(view.answer.tokens)} tokens)")
        if self.processes.gave_up:
            self.processes.check_over()
            return
        if self.brain.live:
            raise Violation(f"{self.brain.live} requests live after the last client has gone")
        self.copies.check_end()
        ledger = self.brain.ledger
        if ledger.held() or ledger.retiring:
            raise Violation(f"{ledger.held()} pages held, {ledger.retiring} leases at the end")


def simulate(world: World, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run one world to its end."""
    return Simulation(world, trace).run()
