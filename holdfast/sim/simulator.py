"""The simulator: the production brain, journal, links and rows under one seeded order of events.

    clients -> api (SimApi) -> channel -> core (Brain) -> channel -> worker (FakeWorker)
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

from holdfast.core.brain import Brain
from holdfast.core.journal import Journal, recover
from holdfast.core.metrics import Metrics
from holdfast.errors import HoldfastError, WorkerFault
from holdfast.sim.checkers import ClientView, PageWatch, check_bounds
from holdfast.sim.copy_traffic import CopyTraffic
from holdfast.sim.fake_worker import FakeWorker, memory_of
from holdfast.sim.violation import Violation
from holdfast.sim.world import Job, World, prompt_array
from holdfast.wire.link import Kind, MemoryLink
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Ended,
    Finish,
    Refused,
    Resume,
    Sampling,
    Submit,
    TokenBatch,
    decode_to_api,
    decode_to_core,
    encode,
)
from holdfast.wire.plan import ROW_NOT_FINITE, StepPlan, StepResult

# An event is handled in no virtual time, so a livelock would spin: this many events end the run.
EVENTS_MAX = 200_000
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
        self.steps = 0
        self.faults: dict[str, int] = {}
        self.views: dict[int, ClientView] = {}
        self.cancelled: set[int] = set()  # the core was told
        self.api_lives: dict[int, int] = {}
        self.linked: dict[int, int] = {}  # api -> life of the core that it has a link to
        self.sent_at: dict[tuple[int, int], int] = {}  # when the core made a token
        self.journal = memoryview(bytearray(Journal.size(self.limits)))
        self.metrics = Metrics(memoryview(bytearray(Metrics.size(1))), 0)
        self.memory = memory_of(self.limits)
        self.copies = CopyTraffic(self)
        self.epoch = 1
        self.brain = self._new_brain()
        self.worker: FakeWorker | None = None
        self.worker_free = 0  # when the worker has done what it has
        self.zombies: list[tuple[FakeWorker, list[StepPlan]]] = []
        self.old_results: list[tuple[int, bytes]] = []
        self._start_worker()
        for job in world.jobs:
            self.at(job.at, lambda job=job: self._client(job), f"client {job.ids[0]:#x} arrives")

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
        except (Violation, HoldfastError, AssertionError, IndexError, ValueError) as error:
            violation = f"{type(error).__name__}: {error}"
            self.say(f"VIOLATION {violation}")
        ends: dict[str, int] = {}
        for view in self.views.values():
            name = view.end.name if view.end is not None else "none"
            ends[name] = ends.get(name, 0) + 1
        tokens = sum(view.tokens for view in self.views.values())
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
        self.watch = PageWatch(self.limits, self.copies.watch)
        self.launched: dict[int, int] = {}
        return brain

    def _core_receives(self, api: int, frame: bytes, life: int) -> None:
        if life != self.core_life:
            return  # sent to a core that has died: api resends what matters
        message = decode_to_core(frame)
        self.brain.receive(api, message, self.now_s)
        if isinstance(message, Cancel):
            self.cancelled.update(message.ids)
        elif isinstance(message, Finish):
            self.cancelled.add(message.id)
        self.tick()

    def tick(self) -> None:
        """What core.loop does after any input: results, deadlines, plans, output."""
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
                self.watch.acknowledge(result.step)
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
            self.copies.launch(plan)
            self._send_plan(plan)
        self.copies.pump()
        self._flush()
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline < 1e5:
            self.at(max(self.now + 1, int(deadline * 1e6) + 1), self._wake, "core wakes")

    def _tenant_of(self, row: int) -> str:
        request = self.brain.scheduler.running.requests[row]
        if request is None:
            raise Violation(f"row {row} is launched for nobody")
        return request.admission.tenant

    def _handle_of(self, row: int, column: int) -> int:
        return int(self.brain.scheduler.running.handles[row, column])

    def _wake(self) -> None:
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline <= self.now_s:
            self.tick()

    def _flush(self) -> None:
        for api, kind, payload in self.brain.take_output():
            self._no_token_after_cancel(kind, payload)
            self.after(
                self.world.channel_time,
                lambda api=api, kind=kind, payload=payload: self._api_receives(api, kind, payload),
                f"api {api} receives",
            )

    def _no_token_after_cancel(self, kind: int, payload: bytes) -> None:
        if kind != Kind.TOKENS:
            return
        batch = TokenBatch.decode(payload)
        for request, index in zip(batch.requests.tolist(), batch.indexes.tolist(), strict=True):
            if request in self.cancelled:
                raise Violation(f"request {request:#x}: a token after its cancel or finish")
            if batch.step:  # 0 = made earlier, and sent to a client that resumes
                self.sent_at.setdefault((request, index), self.now)

    def _api_dies(self, api: int) -> None:
        """Its connections are gone, and what it had sent is too; the next one starts afresh."""
        self._flush()
        self.api_lives[api] = self.api_lives.get(api, 0) + 1
        for request, view in self.views.items():
            if request >> 48 == api and view.end is None:
                view.abandoned, view.end = True, End.CANCELLED
        self.cancelled.update(r for r in self.brain.requests if r >> 48 == api)
        self.brain.drop_api(api, self.now_s)

    def _core_dies(self) -> None:
        """Memory of the core is gone, and what it had not handed to a socket yet."""
        self.epoch += 1
        self._kill_worker()
        self.brain = self._new_brain()
        self.brain.suspend()
        self.brain.restore(recover(self.journal), self.now_s)
        life = self.core_life
        # What it had sent is still in the sockets; api reads that first, then asks for the rest,
        # sooner or later.
        for api in range(self.limits.api_processes):
            delay = self.world.channel_time + 1
            delay += self.rng.choice([0, 3, 100]) * self.world.step_time
            self.after(delay, lambda api=api: self._api_resumes(api, life), f"api {api} resumes")
        self._respawn(self.epoch)

    # --- the worker ---

    def _start_worker(self) -> None:
        self.worker = FakeWorker(self.limits, self.epoch, self.memory)
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
            self._lose_worker(f"no result of step {step} in time")

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
            self._lose_worker("crash")
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
        try:
            result = self.worker.run(plan)
        except (HoldfastError, IndexError) as fault:
            self._lose_worker(f"worker fault: {fault}")
            return
        if plan.rows.size and self.chance("nan_row"):
            row = self.rng.randrange(plan.rows.size)
            result.faults[row] = ROW_NOT_FINITE
            result.tokens[row] = 0
            self.worker.rows.tokens[plan.rows[row], self.worker.rows.length[plan.rows[row]]] = 0
        if self.chance("crash_after"):
            self._lose_worker("crash after a step")
            return
        self._send_result(result.encode(), epoch)
        self._worker_works()

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

    def _lose_worker(self, why: str) -> None:
        """Noticed: nothing of this epoch counts any more; fenced and replaced a while later."""
        if self.worker is None:
            return
        self.say(f"worker {self.epoch} lost: {why}")
        self.brain.suspend()
        self._kill_worker()
        self.epoch += 1
        self._respawn(self.epoch)

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
        self.watch = PageWatch(self.limits, self.copies.watch)
        self.brain.new_epoch(epoch, self.now_s)
        self.tick()

    # --- api and clients ---

    def _client(self, job: Job) -> None:
        for request in job.ids:
            self.views[request] = ClientView(job, request)
        self._submit(job, job.ids)
        if job.abort_after is not None:
            self.after(job.abort_after, lambda: self._abort(job), f"client {job.ids[0]:#x} leaves")

    def _submit(self, job: Job, ids: tuple[int, ...]) -> None:
        message = Submit(
            ids=ids,
            prompt=prompt_array(job).tobytes(),
            seeds=tuple(request & 0xFFFF for request in ids),
            max_tokens=job.max_tokens,
            sampling=Sampling(temperature=0.0, stop_ids=job.stop_ids),
            timeout_s=max(1, job.at + job.timeout - self.now) * 1e-6,
            tenant=job.tenant,
            priority=job.priority,
        )
        self._to_core(job.api, encode(message))

    def _to_core(self, api: int, frame: bytes) -> None:
        life = self.core_life
        if self.linked.get(api, 1) != life:
            return  # No link yet: what matters is in the Resume that comes first over the next one.
        mine = self.api_lives.get(api, 0)

        def arrive() -> None:
            if self.api_lives.get(api, 0) == mine:
                self._core_receives(api, frame, life)

        self.after(self.world.channel_time, arrive, f"core receives from api {api}")

    def _abort(self, job: Job) -> None:
        ids = tuple(request for request in job.ids if self.views[request].end is None)
        for request in ids:
            self.views[request].abandoned = True
            self.views[request].end = End.CANCELLED
        if ids:
            self._to_core(job.api, encode(Cancel(ids)))

    def _api_receives(self, api: int, kind: int, payload: bytes) -> None:
        if kind == Kind.TOKENS:
            self._api_tokens(api, TokenBatch.decode(payload))
            return
        message = decode_to_api(payload)
        if isinstance(message, Accepted):
            for request in message.ids:
                self.views[request].accepted = True
        elif isinstance(message, Refused):
            self._api_refused(message)
        elif isinstance(message, Ended):
            view = self.views[message.id]
            if view.abandoned or view.end is End.STOP:
                return
            if message.end == End.DEADLINE and self.now < view.job.at + view.job.timeout:
                raise Violation(f"request {message.id:#x}: its deadline came too early")
            if message.tokens != view.tokens:
                raise Violation(
                    f"request {message.id:#x} ended with {message.tokens} tokens, saw {view.tokens}"
                )
            view.finish(End(message.end))

    def _api_refused(self, message: Refused) -> None:
        for request in message.ids:
            view = self.views[request]
            if view.abandoned or view.end is not None:
                continue
            if message.status == 0:
                # A core that came back does not know it: it was never admitted there.
                if view.tokens or view.accepted:
                    raise Violation(f"request {request:#x} was admitted and then forgotten")
                self._submit(view.job, (request,))
            else:
                if view.accepted:
                    raise Violation(f"request {request:#x} was refused after it was accepted")
                view.abandoned, view.end = True, End.CANCELLED

    def _api_tokens(self, api: int, batch: TokenBatch) -> None:
        finished = []
        for request, index, token, end in zip(
            batch.requests.tolist(),
            batch.indexes.tolist(),
            batch.tokens.tolist(),
            batch.ends.tolist(),
            strict=True,
        ):
            view = self.views[request]
            if request >> 48 != api:
                raise Violation(f"request {request:#x}: its token went to api process {api}")
            if view.abandoned or view.end is End.STOP:
                continue
            view.token(index, token, End(end), self.limits.vocab_size)
            deadline = view.job.at + view.job.timeout
            if self.sent_at.get((request, index), 0) > deadline + self.world.channel_time:
                raise Violation(f"request {request:#x}: token {index} was made after its deadline")
            after = view.job.finish_after
            if view.end is None and after is not None and view.tokens >= after:
                finished.append(Finish(request, view.tokens))
                view.finish(End.STOP)
        for message in finished:
            self._to_core(api, encode(message))

    def _api_resumes(self, api: int, life: int) -> None:
        if life != self.core_life:
            return
        self.linked[api] = life
        mine = [v for r, v in self.views.items() if r >> 48 == api]
        gone = tuple(v.request for v in mine if v.end is not None)
        if gone:
            self._to_core(api, encode(Cancel(gone)))
        pairs = tuple((v.request, v.tokens) for v in mine if v.end is None)
        if pairs:
            self._to_core(api, encode(Resume(pairs)))

    # --- checks ---

    def _check(self) -> None:
        self.brain.verify()
        self.copies.check()
        admission = self.brain.admission
        check_bounds(
            self.limits, self.brain.in_flight, admission.live_requests, admission.live_tokens
        )

    def _check_end(self) -> None:
        """Liveness: everything ended, and everything is home."""
        for view in self.views.values():
            if view.end is None:
                raise Violation(f"request {view.request:#x} never ended ({view.tokens} tokens)")
        if self.brain.live:
            raise Violation(f"{self.brain.live} requests live after the last client has gone")
        self.copies.check_end()
        ledger = self.brain.ledger
        if ledger.held() or ledger.retiring:
            raise Violation(f"{ledger.held()} pages held, {ledger.retiring} leases at the end")


def simulate(world: World, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run one world to its end."""
    return Simulation(world, trace).run()
