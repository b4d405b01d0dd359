"""The simulator: the production api, brain, journal and rows under one seeded order of events.

    clients, api (sim.api) -> channel -> core (Brain) -> channel -> worker (FakeWorker)
                                   supervisor: notices, fences, replaces

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

from holdfast.core.brain import POISON_MESSAGE, Brain
from holdfast.core.journal import Journal, recover
from holdfast.core.metrics import Metrics
from holdfast.errors import HoldfastError, WorkerFault
from holdfast.sim.api import SimApi
from holdfast.sim.checkers import PageWatch, Suspects, check_bounds, check_sums
from holdfast.sim.copy_traffic import CopyTraffic
from holdfast.sim.fake_graphs import Capture
from holdfast.sim.fake_worker import FakeWorker, memory_of
from holdfast.sim.oracle import Answer, answer_to
from holdfast.sim.page_order import PageOrder
from holdfast.sim.violation import Violation
from holdfast.sim.witness import Witness
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
        self.implicates = False  # the last worker ended by its own fault
        self.memory = memory_of(self.limits)
        self.captures: list[Capture] = []  # graphs of the worker before
        self.copies = CopyTraffic(self)
        self.epoch = 1
        self.brain = self._new_brain()
        self.worker: FakeWorker | None = None
        self.worker_free = 0  # when the worker has done what it has
        self.zombies: list[tuple[FakeWorker, list[StepPlan]]] = []
        self.old_results: list[tuple[int, bytes]] = []
        self._start_worker()
        self.apis = [SimApi(self, index) for index in range(self.limits.api_processes)]
        for api in self.apis:
            api.link_up(self.core_life)
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
        while self._events:
            self.now, _, action, label = heapq.heappop(self._events)
            self.handled += 1
            if self.handled > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events: {self.brain.live} live")
            self.say(label)
            action()
            self._check()
        self._check_end()

    # --- the core ---

    def _new_brain(self) -> Brain:
        journal = Journal(self.journal, self.limits)
        self.core_life = getattr(self, "core_life", 0) + 1
        brain = Brain(
            self.limits,
            journal,
            self.metrics,
            epoch=self.epoch,
            life=self.core_life,
            wall_ns=lambda: self.now * 1000,
        )
        self.core_link, self.worker_link = MemoryLink.pair()
        self.core_link.epoch = self.worker_link.epoch = self.epoch
        self.order = PageOrder(self.limits)
        self.watch = PageWatch(self.limits, self.copies.watch, self.order)
        self.launched: dict[int, int] = {}
        self.suspects = Suspects(self.limits, self.witness.poison)
        self.flights: dict[int, list[tuple[int, int, int]]] = {}
        return brain

    def core_receives(self, api: int, frame: bytes, life: int) -> None:
        """A frame of api process `api` arrives at the core that it was sent to."""
        if life != self.core_life:
            return  # sent to a core that has died
        message = decode_to_core(frame)
        running = self.brain.scheduler.running
        lives = (life, self.apis[api].life)
        self.witness.to_core(message, lives, self.brain.requests.values(), running.active)
        self.brain.receive(api, message, self.now_s)
        self.tick()

    def tick(self) -> None:
        """What core.loop does after any input: results, deadlines, plans, output."""
        self.touched = True
        if self.chance("api_death"):
            self._api_dies(self.rng.randrange(self.limits.api_processes))
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
                self._lose_worker(f"refused: {fault}")
                return
            if self.brain.in_flight < before:
                self.watch.acknowledge(result)
        try:
            self.brain.expire(self.now_s)
        except WorkerFault as fault:
            self._flush()
            self.copies.check_given_up()
            self._lose_worker(f"given up: {fault}")
        if self.chance("core_death"):
            self._core_dies()
            return
        while (plan := self.brain.plan(self.now_s)) is not None:
            self.steps += 1
            self.watch.launch(plan, self._tenant_of, self._handle_of)
            requests = self.brain.scheduler.running.ids[plan.rows].tolist()
            self.witness.plan((self.epoch, plan.step), requests, self.now, self._linked_since)
            self.flights[plan.step] = self._computes(plan)
            self.copies.launch(plan)
            self._send_plan(plan)
        self.copies.pump()
        self._flush()
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

    def _poisoned(self, step: int) -> int | None:
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
            for _ in range(2 if self.chance("output_twice") else 1):
                self.after(
                    self.world.channel_time,
                    lambda api=api, kind=kind, payload=payload: self.apis[api].receive(
                        kind, payload, life
                    ),
                    f"api {api} receives",
                )

    def _check_message(self, payload: bytes) -> None:
        message = decode_to_api(payload)
        if isinstance(message, Ended) and message.message == POISON_MESSAGE:
            self.suspects.ended(message.id)

    def _api_dies(self, api: int) -> None:
        """Its connections are gone, and what it had sent is too; the next one starts afresh."""
        self._flush()
        self.apis[api].die()
        self.witness.dropped(one for one in self.brain.requests if one >> 48 == api)
        self.brain.drop_api(api, self.now_s)

    def _core_dies(self) -> None:
        """Memory of the core is gone, and what it had not handed to a socket yet."""
        self.epoch += 1
        self._kill_worker()
        self.implicates = False
        self.brain = self._new_brain()
        self.brain.suspend()
        recovered = recover(self.journal)
        faulted = (one for one, entry in recovered.items() if entry.end == End.ENGINE_FAULT)
        self.witness.faulted.update(faulted)
        self.brain.restore(recovered, self.now_s)
        # What it had sent is still in the sockets, and read unless the supervisor's word is
        # quicker. Each api process gets its new link sooner or later.
        life, gone = self.core_life, self.core_life - 1
        for api in self.apis:
            api.core_died()
            noticed = self.rng.choice([0, self.world.channel_time])
            self.after(noticed, lambda api=api: api.link_lost(gone), f"api {api.index} lost it")
            delay = self.world.channel_time + 1
            delay += self.rng.choice([0, 3, 100]) * self.world.step_time
            self.after(delay, lambda api=api: api.link_up(life), f"api {api.index} has a link")
        self._respawn(self.epoch)

    # --- the worker ---

    def _start_worker(self) -> None:
        self.worker = FakeWorker(self.limits, self.epoch, self.memory, self.captures)
        self.captures = list(self.worker.graphs.captures.values())
        self.queue: list[StepPlan] = []
        self.worker_busy = False

    def _send_plan(self, plan: StepPlan) -> None:
        frame, epoch = plan.encode(), self.epoch
        self.launched[plan.step] = self.now
        self.after(
            self.world.channel_time,
            lambda: self._worker_receives(frame, epoch),
            f"worker receives plan {epoch}:{plan.step}",
        )
        self.after(
            HANG_STEPS * self.world.step_time + 100 * self.world.channel_time,
            lambda step=plan.step: self._watchdog(epoch, step),
            f"watchdog of plan {epoch}:{plan.step}",
        )

    def _watchdog(self, epoch: int, step: int) -> None:
        if epoch == self.epoch and self.worker is not None and step > self.watch.acknowledged:
            self._lose_worker(f"no result of step {step} in time", implicates=True)

    def _worker_receives(self, frame: bytes, epoch: int) -> None:
        if epoch != self.epoch or self.worker is None:
            return
        self.queue.append(StepPlan.decode(frame))
        self.copies.worker_receives(self.queue[-1])
        self._worker_works()

    def _worker_works(self) -> None:
        if self.worker_busy or not self.queue or self.worker is None:
            return
        if self.chance("crash"):
            self._lose_worker("crash", implicates=True)
            return
        self.worker_busy = True
        if self.chance("hang"):
            return
        time = self.world.step_time
        if self.chance("slow"):
            time *= 100
        epoch = self.epoch
        self.after(time, lambda: self._worker_done(epoch), f"worker {epoch} ends a step")

    def _worker_done(self, epoch: int) -> None:
        if epoch != self.epoch or self.worker is None:
            return
        self.worker_busy = False
        plan = self._tampered(self.queue.pop(0))
        if (poisoned := self._poisoned(plan.step)) is not None:
            self.faults["poison"] = self.faults.get("poison", 0) + 1
            self._lose_worker(f"poison of request {poisoned:#x}", implicates=True)
            self.suspects.killed_by(poisoned)
            return
        spoil = self.rng.randrange(plan.rows.size) if self._spoils(plan) else None
        try:
            result = self.worker.run(plan, spoil)
            if spoil is not None:
                self.witness.spoil((epoch, plan.step), spoil)
        except (HoldfastError, IndexError) as fault:
            self._lose_worker(f"worker fault: {fault}", implicates=True)
            return
        if self.chance("crash_after"):
            self._lose_worker("crash after a step", implicates=True)
            return
        self._send_result(result.encode(), epoch)
        self._worker_works()

    def _spoils(self, plan: StepPlan) -> bool:
        return bool(plan.rows.size) and self.chance("nan_row")

    def _tampered(self, plan: StepPlan) -> StepPlan:
        if plan.page_writes.size and self.chance("delta_lost"):
            plan.page_writes = plan.page_writes[:0]
        if plan.rows.size and self.chance("delta_twice"):
            assert self.worker is not None
            self.worker.rows.length[plan.rows[0]] += 1
        return plan

    def _send_result(self, frame: bytes, epoch: int) -> None:
        if self.chance("result_lost"):
            return
        delay = self.world.channel_time
        if self.chance("result_late"):
            delay += 20 * self.world.step_time
        # A stream socket keeps order: a late result holds back those behind it.
        arrival = max(self.now + delay, getattr(self, "_last_arrival", 0))
        self._last_arrival = arrival
        copies = 2 if self.chance("result_twice") else 1
        for _ in range(copies):
            self.at(arrival, lambda: self._core_gets_result(frame, epoch), "core receives a result")
        self.old_results.append((epoch, frame))
        if self.chance("result_old_epoch"):
            old_epoch, old = self.rng.choice(self.old_results)
            self.at(arrival, lambda: self._core_gets_result(old, old_epoch), "an old result again")

    def _core_gets_result(self, frame: bytes, epoch: int) -> None:
        self.core_link.deliver(epoch, Kind.RESULT, frame)
        self.tick()

    # --- the supervisor ---

    def _lose_worker(self, why: str, *, implicates: bool = False) -> None:
        """Noticed: nothing of this epoch counts any more; fenced and replaced a while later.

        implicates: it ended by its own fault, and not because we did not believe it.
        """
        if self.worker is None:
            return
        self.touched = True
        self.say(f"worker {self.epoch} lost: {why}")
        self.implicates = implicates
        if implicates:
            self._take_suspects()
        self.brain.suspend()
        self._kill_worker()
        self.epoch += 1
        self._respawn(self.epoch)

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

    def _kill_worker(self) -> None:
        """The old process may go on writing until the fence: run what it had queued."""
        if self.worker is None:
            return
        zombie, plans = self.worker, list(self.queue)
        self.worker = None
        fenced_at = self.now + self.world.fence_time
        for number, plan in enumerate(plans):
            late = min(fenced_at - 1, self.now + (number + 1) * self.world.step_time)
            self.at(late, lambda plan=plan: self._zombie_writes(zombie, plan), "zombie writes")
        self.fenced_at = fenced_at
        self.copies.kill(zombie.epoch, fenced_at)

    def _zombie_writes(self, zombie: FakeWorker, plan: StepPlan) -> None:
        try:
            result = zombie.run(plan)
        except (HoldfastError, IndexError):
            return
        self._send_result(result.encode(), zombie.epoch)

    def _respawn(self, epoch: int) -> None:
        time = max(self.fenced_at, self.now) + self.world.respawn_time
        self.at(time, lambda: self._promote(epoch), f"worker {epoch} is ready")

    def _promote(self, epoch: int) -> None:
        if epoch != self.epoch:
            return
        if self.chance("respawn_fault"):
            self.epoch += 1
            self._respawn(self.epoch)
            return
        self._start_worker()
        self.core_link.epoch = self.worker_link.epoch = epoch
        self.copies.watch.fence(epoch)
        self.order.fence()
        self.watch = PageWatch(self.limits, self.copies.watch, self.order)
        self.flights = {}
        self.brain.new_epoch(epoch, self.now_s, implicates=self.implicates)
        self.tick()

    # --- for api ---

    def answer_to(self, job: Job, choice: int) -> Answer:
        """The oracle's answer, computed once."""
        key = (job.number, choice)
        if key not in self._answers:
            self._answers[key] = answer_to(job, choice, self.limits)
        return self._answers[key]

    # --- checks ---

    def _check(self) -> None:
        if not self.touched:
            return  # Nothing but the virtual time has changed for the core.
        self.touched = False
        self.brain.verify()
        self.checks += 1
        if self.checks % SCRUB_EVERY == 0:
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
        if self.brain.live:
            raise Violation(f"{self.brain.live} requests live after the last client has gone")
        self.copies.check_end()
        ledger = self.brain.ledger
        if ledger.held() or ledger.retiring:
            raise Violation(f"{ledger.held()} pages held, {ledger.retiring} leases at the end")


def simulate(world: World, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run one world to its end."""
    return Simulation(world, trace).run()
