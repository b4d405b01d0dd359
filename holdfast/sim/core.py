"""SimCore: a core process of the simulation. The production Brain, and around it what core.loop
does: links, watchdog, the order of a tick. Every checker of one core's life sits here, where plans
leave and results arrive.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.core.brain import POISON_MESSAGE, Brain
from holdfast.core.clocks import StepClocks
from holdfast.core.journal import Journal, recover
from holdfast.core.replies import framed
from holdfast.errors import WorkerFault
from holdfast.kv.pages import PageState
from holdfast.proc.lifecycle.states import Event
from holdfast.sim.checkers import PageWatch, Suspects, check_bounds, check_sums
from holdfast.sim.kept_pages import KeptPages
from holdfast.sim.page_order import PageOrder
from holdfast.sim.violation import Violation
from holdfast.sim.worker import SimWorker
from holdfast.wire.link import Kind, MemoryLink
from holdfast.wire.messages import (
    ID_MAX,
    End,
    Ended,
    Memory,
    TokenBatch,
    decode_to_api,
    decode_to_core,
)
from holdfast.wire.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from holdfast.sim.simulator import Simulation

# No step takes so many step times, and to a usual one so many are added: a slow step takes 100, and
# its result may be 20 late.
HANG_STEPS = 300
MARGIN_STEPS = 150
# Sealed pages are read again every so many checks.
SCRUB_EVERY = 10


class SimCore:
    """Core number `life`, from 1. Until it has started it reads nothing, and has no brain; once it
    is dead `up` is false again."""

    brain: Brain

    def __init__(self, sim: Simulation, life: int, epoch: int) -> None:
        self.sim = sim
        self.limits = sim.limits
        self.life, self._first_epoch = life, epoch
        self.up = False
        self.checks = 0
        self.worker: SimWorker | None = None
        self.suspects = Suspects(self.limits, sim.witness.poison)
        self.peers: dict[int, int] = {}  # index -> number of the api process that it is linked to
        self._known: set[int] = set()  # numbers of those that it has ever been linked to
        # Of api processes that it will meet: index, frame, process.
        self._unread: list[tuple[int, bytes, int]] = []
        self.flights: dict[int, list[tuple[int, int, int]]] = {}  # step -> what it computes
        self._keeper_rng = Random(sim.world.seed * 0x6C62_272E + life)
        step_s = sim.world.step_time * 1e-6
        self.clocks = StepClocks(
            HANG_STEPS * step_s + 100e-6 * sim.world.channel_time, margin_s=MARGIN_STEPS * step_s
        )
        self._watch_at: int | None = None
        self._rot_rng = Random(sim.world.seed * 0x1656_67B1 + life)
        self._implicates = self._draining = False

    def start(self) -> None:
        """It has read the journal, and listens."""
        journal = Journal(self.sim.journal, self.limits)
        self.brain = Brain(
            self.limits,
            journal,
            self.sim.metrics,
            epoch=self._first_epoch,
            life=self.life,
            wall_ns=lambda: self.sim.now * 1000,
            scrub_pages_s=self.sim.world.scrub_pages_s,
        )
        self.brain.checks.verify_pages = self.sim.world.verify_pages
        self.kept = KeptPages()
        self.link, _ = MemoryLink.pair()
        self.link.epoch = self._first_epoch
        self.order = PageOrder(self.limits)
        self._new_watch()
        self.up = True
        self.brain.suspend()
        if self.life > 1:
            recovered = recover(self.sim.journal)
            faulted = (one for one, entry in recovered.items() if entry.end == End.ENGINE_FAULT)
            self.sim.witness.faulted.update(faulted)
            self.brain.restore(recovered, self.sim.now_s)
        self.tick()

    def die(self) -> None:
        """Memory of the core is gone, and what it had not handed to a socket yet; what it had sent
        is still in the sockets, and read unless the supervisor's word is quicker."""
        self.up, gone = False, self.life
        for api in self.sim.apis:
            api.core_died()
            noticed = self.sim.rng.choice([0, self.sim.world.channel_time])
            self.sim.after(noticed, lambda api=api: api.link_lost(gone), f"api {api.index} lost it")

    def obey(self, message: dict[str, Any]) -> None:
        """A word of the supervisor."""
        kind = message["type"]
        if kind == "worker":
            self._new_worker(message["epoch"], message["worker"], Memory(message["memory"]))
        elif kind == "worker_lost":
            if self.worker is not None and self.worker.epoch <= message["epoch"]:
                self._lose_worker(message["detail"])
            self._implicates = message["implicates"]
        elif kind == "weights_good":
            self.brain.weights_good(message["epoch"], message["step"])
            if message["epoch"] == self.brain.epoch:
                self.kept.weights_good(message["step"])
        elif kind == "api":
            self._new_api(message["index"], message["process"], message["first_id"])
        elif kind == "api_lost":
            self._lose_api(message["index"])
        elif kind == "drain":
            self._draining = True
            self.brain.drain()
        else:
            assert kind == "end_all"
            self.brain.end_all(End(message["end"]), message["message"], self.sim.now_s)
        self.tick()

    def _new_worker(self, epoch: int, worker: SimWorker, memory: Memory) -> None:
        if self.worker is not None:
            raise Violation(f"epoch {epoch} comes to a core that has epoch {self.worker.epoch}")
        if self._implicates:
            self._take_suspects()
        self.worker = worker
        self.clocks.reset()
        self.link.epoch = epoch
        self.sim.copies.watch.fence(epoch)
        self.order.fence()
        self._new_watch()
        self.brain.new_epoch(epoch, self.sim.now_s, implicates=self._implicates, memory=memory)
        self.kept.new_epoch(memory, self.brain.ledger)
        self.sim.pages_void = False
        self._implicates = False

    def _new_watch(self) -> None:
        before = getattr(self, "watch", None)
        self.watch = PageWatch(self.limits, self.sim.copies.watch, self.order, before)
        self.flights = {}

    def _lose_worker(self, why: str, *, hung: bool = False) -> None:
        """Nothing of this epoch counts any more."""
        assert self.worker is not None
        self.sim.say(f"the core gives up epoch {self.worker.epoch}: {why}")
        self.sim.processes.accuse_worker(self.worker.epoch, why, hung=hung)
        self.worker = None
        self.clocks.reset()
        self.sim.touched = True
        self.brain.suspend()

    def worker_closed(self, worker: SimWorker) -> None:
        """The end of a worker's link."""
        if self.up and self.worker is worker:
            self._lose_worker("peer closed the link")

    def worker_says(self, epoch: int, kind: Kind, frame: bytes) -> None:
        """A frame of the worker of an epoch, if its link leads to this core."""
        if self.up and self.sim.processes.core_of(epoch) == self.life:
            self.link.deliver(epoch, kind, frame)
            self.tick()

    def _new_api(self, index: int, process: int, first_id: int) -> None:
        self._lose_api(index, first_id)
        self.peers[index] = process
        self._known.add(process)
        unread = [one for one in self._unread if one[2] == process]
        self._unread = [one for one in self._unread if one[2] != process]
        for api, frame, _ in unread:
            self._take(api, frame)
            self._flush()  # What was made before the next message came is not late.

    def _lose_api(self, index: int, before: int = ID_MAX) -> None:
        self._flush()
        self.peers.pop(index, None)
        known = self.brain.requests
        self.sim.witness.dropped(one for one in known if one >> 48 == index and one < before)
        self.brain.drop_api(index, self.sim.now_s, before)

    def api_closed(self, index: int, process: int, life: int) -> None:
        """The end of an api process's link."""
        if self.up and life == self.life and self.peers.get(index) == process:
            self._lose_api(index)
            self.sim.processes.accuse_api(process, "peer closed the link")
            self.tick()

    def receive(self, api: int, frame: bytes, life: int, process: int) -> None:
        """A frame of an api process arrives at the core that it was sent to."""
        if life != self.life:
            return  # sent to a core that has died
        if process not in self._known:
            self._unread.append((api, frame, process))
        elif self.up and self.peers.get(api) == process:
            self._take(api, frame)
            self.tick()

    def _take(self, api: int, frame: bytes) -> None:
        message = decode_to_core(frame)
        running = self.brain.scheduler.running
        lives = (self.life, self.sim.apis[api].life)
        live = self.brain.requests.values()
        self.sim.witness.to_core(message, lives, live, running.active)
        self.brain.receive(api, message, self.sim.now_s)

    def tick(self) -> None:
        """What follows any input: results, deadlines, plans, output."""
        if not self.up:
            return
        self.sim.touched = True
        if self.sim.now >= self.sim.world.faults_until:
            self.brain.checks.pages_s = 0.0  # or an idle engine would never be over
        if self.sim.chance("api_death"):
            self.sim.processes.kill_api(self.sim.rng.randrange(self.limits.api_processes))
        for kind, payload in self.link.drain():
            if kind == Kind.COPIES:
                self.sim.copies.acknowledge(payload)
                continue
            assert kind == Kind.RESULT
            result = StepResult.decode(payload)
            before = self.brain.in_flight
            try:
                self.brain.commit(result, self.sim.now_s)
            except WorkerFault as fault:
                self._flush()
                if self.worker is not None:
                    self._lose_worker(f"refused: {fault}")
                return
            if self.brain.in_flight < before:
                self.clocks.done(self.sim.now_s)
                self.watch.acknowledge(result)
                self.kept.taken(result, self.brain.ledger)
                self.sim.rot.told((result.epoch, result.step))
        try:
            self.brain.expire(self.sim.now_s)
        except WorkerFault as fault:
            self._flush()
            # One that ends already says nothing more of its copies.
            if self.worker is None or not self.worker.dying:
                self.sim.copies.check_given_up()
            if self.worker is not None:
                self._lose_worker(f"given up: {fault}")
        if self.sim.chance("core_death"):
            self.sim.processes.kill_core()
            return
        if self.sim.chance("keeper_death", self._keeper_rng):
            self.sim.processes.kill_keeper(self._keeper_rng)
        if self.sim.chance("freeze", self._keeper_rng):
            self.sim.processes.freeze(self._keeper_rng)
            if not self.up:
                return
        while self.worker is not None and (plan := self.brain.plan(self.sim.now_s)) is not None:
            self.sim.steps += 1
            self.kept.launch(plan)
            self.watch.launch(plan, self._tenant_of, self._handle_of)
            requests = self.brain.scheduler.running.ids[plan.rows].tolist()
            key = (plan.epoch, plan.step)
            self.sim.witness.plan(key, requests, self.sim.now, self._linked_since)
            self.flights[plan.step] = self._computes(plan)
            self.sim.copies.launch(plan)
            self._rot()
            self.clocks.sent(plan, self.brain.context_tokens(plan), self.sim.now_s)
            self._send_plan(plan, self.worker)
        self.sim.copies.pump()
        self._flush()
        self._set_watch()
        if self._draining and self.brain.live == 0:
            self._draining = False
            self.sim.processes.core_says(Event.DRAINED)
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline < 1e5:
            self.sim.at(max(self.sim.now + 1, int(deadline * 1e6) + 1), self._wake, "core wakes")

    def _rot(self) -> None:
        """At the pace of steps, a cell of some sealed page changes while everything runs."""
        if self.kept.waiting or not self.sim.chance("page_rot", self._rot_rng):
            return
        ledger = self.brain.ledger
        sealed = np.flatnonzero(ledger.pools[0].state == PageState.SEALED).tolist()
        if sealed:
            # Those that a copy reads are few.
            lent = [page for page in sealed if ledger.lent[page]]
            page = self._rot_rng.choice(lent if self._rot_rng.random() < 0.5 and lent else sealed)
            self.sim.rot.strike(page, self._rot_rng.randrange(self.limits.page_tokens))

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
        for request, first, last in self.flights.get(step, ()) if self.sim.witness.poison else ():
            if first <= self.sim.witness.poison.get(request, -1) <= last:
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
        found = self.sim.apis[api]
        return found.linked_at if found.linked == self.life else None

    def _wake(self) -> None:
        deadline = self.brain.next_deadline_s
        if deadline is not None and deadline <= self.sim.now_s:
            self.tick()

    def _flush(self) -> None:
        for api, message in self.brain.take_output():
            kind, payload = framed(message)
            if kind == Kind.MESSAGE:
                self._check_message(payload)
            if kind == Kind.TOKENS:
                batch = TokenBatch.decode(payload)
                self.sim.witness.tokens(self.life, api, batch, self.sim.now)
                # Not an end, nor an answer to a Resume: what follows shows that it is missing.
                plain = batch.step and not batch.ends.any() and self.life == 1
                if plain and self.sim.chance("output_lost"):
                    self.sim.witness.gapped.update(batch.requests.tolist())
                    continue
            else:
                self.sim.witness.to_api(decode_to_api(payload))
            if api not in self.peers:
                continue
            for _ in range(2 if self.sim.chance("output_twice") else 1):
                self._send(api, kind, payload)

    def _send(self, api: int, kind: Kind, payload: bytes) -> None:
        reader, link = self.sim.apis[api], (self.life, self.peers[api])
        self.sim.after(
            self.sim.world.channel_time,
            lambda: reader.receive(kind, payload, link),
            f"api {api} receives",
        )

    def _check_message(self, payload: bytes) -> None:
        message = decode_to_api(payload)
        if isinstance(message, Ended) and message.message == POISON_MESSAGE:
            self.suspects.ended(message.id)

    def _send_plan(self, plan: StepPlan, worker: SimWorker) -> None:
        frame, key = plan.encode(), f"{plan.epoch}:{plan.step}"
        self.sim.after(
            self.sim.world.channel_time,
            lambda: worker.receives(frame),
            f"worker receives plan {key}",
        )

    def _set_watch(self) -> None:
        """Wake when the present step has taken too long, as the production clock says."""
        deadline_s = self.clocks.deadline_s
        if deadline_s is None:
            return
        at = max(self.sim.now + 1, int(deadline_s * 1e6) + 1)
        if self._watch_at is None or not self.sim.now < self._watch_at <= at:
            self._watch_at = at
            self.sim.at(at, self._watch_step, "watchdog of the worker's step")

    def _watch_step(self) -> None:
        if self._watch_at is not None and self._watch_at <= self.sim.now:
            self._watch_at = None
        worker = self.worker
        if not self.up or worker is None:
            return
        if self.clocks.hung(self.sim.now_s):
            if not (worker.hung or worker.dying):
                raise Violation(f"the worker of epoch {worker.epoch} is taken for hung, and is not")
            self._lose_worker("no result in time", hung=True)
        self._set_watch()

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

    # --- checks ---

    def check(self) -> None:
        """After every event that reached it."""
        self.brain.verify()
        self.checks += 1
        void = self.sim.pages_void or self.kept.waiting
        if self.checks % SCRUB_EVERY == 0 and not void:
            rotten = {page for page, _ in self.sim.rot.cells}
            check_sums(self.brain.ledger, self.sim.memory, self.limits, rotten)
        self.sim.copies.check()
        admission = self.brain.admission
        check_bounds(
            self.limits, self.brain.in_flight, admission.live_requests, admission.live_tokens
        )

    def check_end(self) -> None:
        """Everything ended, and everything is home."""
        if self.brain.live:
            raise Violation(f"{self.brain.live} requests live after the last client has gone")
        ledger = self.brain.ledger
        if ledger.held() or ledger.retiring:
            raise Violation(f"{ledger.held()} pages held, {ledger.retiring} leases at the end")
