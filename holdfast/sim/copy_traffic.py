"""The tiers' part of a simulation: copies of workers and moves of the mover, in virtual time.

Every copy reads at one event and writes at a later one; its acknowledgement is a third. A killed
worker's copies go on until its fence, and a killed keeper's moves; those of one that is frozen
stand still. What the core orders while no keeper listens is lost. All choices come from Randoms of
their own, so that a world without tiers runs as if this were not there.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from holdfast.core.request import Phase
from holdfast.kv.slots import SlotState
from holdfast.sim.copy_watch import CopyWatch
from holdfast.sim.fake_mover import FakeMover, TierMemory, Transfer
from holdfast.sim.rot import Cell
from holdfast.sim.violation import Violation
from holdfast.wire.copies import COPY_FAILED, COPY_OK, FETCH, LOAD, STORE, CopyAcks, MoveOrders
from holdfast.wire.link import Kind
from holdfast.wire.plan import StepPlan

if TYPE_CHECKING:
    from holdfast.sim.simulator import Simulation

# How late is late, in time-outs: in time after all, or not.
LATE_TIMEOUTS = (0.5, 1.2, 3.0)


class CopyTraffic:
    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.rng = Random(sim.world.seed * 0xC2B2_AE35 + 11)
        self.memory = TierMemory(sim.limits, sim.memory)
        self.mover = FakeMover(self.memory)
        self.watch = CopyWatch()
        self._said: list[CopyAcks] = []  # by all workers
        # (epoch, ticket) of a store -> rotten cells that it read
        self._rotten: dict[tuple[int, int], set[Cell]] = {}
        self._keeper_rng = Random(sim.world.seed * 0x85EB_CA77 + 23)
        self._leave_rng = Random(sim.world.seed * 0xC4CE_B9FF + 5)
        self.fences: dict[int, int] = {}  # epoch -> when nothing of it writes any more

    # --- copies of the worker ---

    def launch(self, plan: StepPlan) -> None:
        """A plan leaves the core. Corruption strikes here, at the pace of steps."""
        if not self.sim.limits.host_pages:
            return
        sim, page_watch = self.sim, self.sim.core.watch
        for handles, writes in ((plan.zeros, True), (plan.seals, False)):
            for page in (handles & 0xFF_FFFF).tolist():
                self.watch.step_touches(plan.step, page, writes=writes)
        for page in self.watch.launch(plan, sim.now, page_watch.tenants):
            page_watch.copy_writes(page)
        for rate, slots, cells in (
            ("host_corrupt", sim.core.brain.tiers.host, self.memory.host),
            ("disk_corrupt", sim.core.brain.tiers.disk, self.memory.disk),
        ):
            held = [at for at, state in enumerate(slots.state) if state is SlotState.HELD]
            if held and sim.chance(rate, self.rng):
                cells[self.rng.choice(held), 0] ^= 1

        if (plan.copies["kind"] == LOAD).any():
            self._waiter_leaves(self.sim.world.copy_time)

    def _waiter_leaves(self, time: int) -> None:
        """Pages are brought: somebody who waits for any may not wait till they are there."""
        if not self.sim.chance("waiter_leaves", self._leave_rng):
            return
        live = self.sim.core.brain.requests.values()
        waiting = [request.id for request in live if request.phase is Phase.LOADING]
        clients = [
            client
            for api in self.sim.apis
            for client in api.clients
            if any(view.request in waiting for view in client.views)
        ]
        if clients:
            client = self._leave_rng.choice(clients)
            delay = self._leave_rng.randint(0, time)
            self.sim.after(delay, client.leave, f"{client.name} leaves")

    def worker_receives(self, plan: StepPlan) -> None:
        time = self.sim.world.copy_time
        for transfer, copy in zip(self.memory.copies_of(plan), plan.copies, strict=True):
            page = int(copy["handle"]) & 0xFF_FFFF if copy["kind"] == STORE else None
            self._run(transfer, time, "copy", "copy_late", "copy_failed", page)

    def kill(self, epoch: int, fenced_at: int) -> None:
        self.fences[epoch] = fenced_at

    def new_keeper(self) -> None:
        """A keeper has started: new memory, and a mover without orders."""
        self.memory.begin_anew()
        self.mover = FakeMover(self.memory)

    def _alive(self, transfer: Transfer, keeper: int | None) -> bool:
        if keeper is not None:
            return self.sim.processes.may_write(keeper)
        return self.sim.now < self.fences.get(transfer.epoch, self.sim.now + 1)

    def _run(
        self,
        transfer: Transfer,
        time: int,
        kind: str,
        late: str,
        failed: str,
        page: int | None = None,
        keeper: int | None = None,
    ) -> None:
        """Schedule both halves and the end of a transfer; `page`: of the device, which it reads;
        `keeper`: whose mover moves it."""
        fails = self.sim.chance(failed, self.rng)
        name = f"{kind} {transfer.epoch}:{transfer.ticket}"
        read_after, write_after = self.rng.randint(0, time), self.rng.randint(1, time)
        if self.sim.chance(late, self.rng):
            write_after += int(
                self.rng.choice(LATE_TIMEOUTS) * 1e6 * self.sim.limits.copy_timeout_s
            )

        def read() -> None:
            if self._alive(transfer, keeper):
                transfer.read()
                if page is not None:
                    key = (transfer.epoch, transfer.ticket)
                    self._rotten[key] = self.sim.rot.among([page])
                self.sim.after(write_after, write, f"{name} writes")

        def write() -> None:
            if not self._alive(transfer, keeper):
                return
            if fails:
                transfer.fail()
            else:
                transfer.write()
            if keeper is None or self.sim.processes.answers(keeper):
                self._over(transfer, kind, transfer.ack(COPY_FAILED if fails else COPY_OK))

        self.sim.after(read_after, read, f"{name} reads")

    def _over(self, transfer: Transfer, kind: str, acks: CopyAcks) -> None:
        answered = self.mover.over(transfer) if kind == "move" else []
        if kind == "move" or not self.sim.chance("ack_withheld", self.rng):
            self._send(kind, acks)
        if kind == "copy":
            self._said.append(acks)
            old = [one for one in self._said if one.epoch < acks.epoch]
            if old and self.sim.chance("result_old_epoch", self.rng):
                self._send(kind, self.rng.choice(old))
        for reset in answered:
            self._send("move", reset)

    def _send(self, kind: str, acks: CopyAcks) -> None:
        frame, epoch = acks.encode(), acks.epoch
        what = f"core receives {kind} {epoch}:{int(acks.tickets[0])}"
        arrive = self._copied if kind == "copy" else self._moved
        self.sim.after(self.sim.world.channel_time, lambda: arrive(frame, epoch), what)

    def _copied(self, frame: bytes, epoch: int) -> None:
        self.sim.core.worker_says(epoch, Kind.COPIES, frame)

    def acknowledge(self, payload: bytes) -> None:
        """An acknowledgement of this epoch has come through the core's link."""
        acks = CopyAcks.decode(payload)
        for ticket in acks.tickets.tolist():
            self.watch.close("worker", acks.epoch, ticket)
            self.sim.core.order.copied(ticket)
        for ticket, status in zip(acks.tickets.tolist(), acks.status.tolist(), strict=True):
            cells = self._rotten.pop((acks.epoch, ticket), set())
            if status == COPY_OK and not self.sim.core.brain.suspended:
                self.sim.rot.known(cells)
        self.sim.core.brain.copied(acks, self.sim.now_s)

    # --- the mover ---

    def pump(self) -> None:
        """The core's orders for the mover leave."""
        orders = self.sim.core.brain.take_moves(self.sim.now_s)
        if orders is None:
            return
        self.watch.order(orders, self.sim.now)
        self.sim.core.kept.order(orders)
        self.sim.core.order.order(orders)
        if (orders.moves["kind"] == FETCH).any():
            self._waiter_leaves(self.sim.world.disk_time)
        frame, keeper = orders.encode(), self.sim.processes.keeper()
        if keeper is None:
            self.sim.say("no keeper hears the orders")
            return
        self.sim.after(
            self.sim.world.channel_time, lambda: self._mover_receives(frame, keeper), "orders"
        )

    def _mover_receives(self, frame: bytes, keeper: int) -> None:
        if not self.sim.processes.answers(keeper):
            return
        for transfer in self.mover.begin(MoveOrders.decode(frame)):
            time = self.sim.world.disk_time
            fetch = transfer.source.base is self.memory.disk
            late = "fetch_late" if fetch else "disk_late"
            self._run(transfer, time, "move", late, "disk_error", keeper=keeper)
        if self.sim.chance("keeper_lost", self._keeper_rng):
            rng, processes = self._keeper_rng, self.sim.processes
            end = processes.kill_keeper if rng.random() < 0.7 else processes.freeze_keeper
            delay = rng.randint(0, self.sim.world.disk_time)
            self.sim.after(delay, lambda: end(rng), "keeper is lost among moves")
        for reset in self.mover.over():
            self._send("move", reset)

    def _moved(self, frame: bytes, life: int) -> None:
        if not self.sim.core.up:
            return
        acks = CopyAcks.decode(frame)
        for ticket in acks.tickets.tolist():
            self.watch.close("mover", life, ticket)
            if life == self.sim.core.life:
                self.sim.core.order.moved(ticket)
        ready = self.sim.core.brain.tiers.ready
        self.sim.core.brain.moved(acks, self.sim.now_s)
        if self.sim.core.brain.tiers.ready and not ready:
            # Whether the mover really has nothing older, it says itself.
            if life != self.sim.core.life:
                raise Violation(f"core {self.sim.core.life} took an answer to core {life}")
            # The mover answers one order at a time, and this was a RESET.
            self.watch.reset(life, int(acks.tickets[0]))
            self.sim.core.order.reset()
        self.sim.core.tick()

    # --- checks ---

    def check(self) -> None:
        """No copy is older than its bound."""
        sim = self.sim
        oldest = self.watch.oldest(sim.core.brain.epoch)
        if oldest is None or sim.core.brain.suspended:
            return
        if sim.now > oldest + sim.limits.copy_timeout_s * 1e6 + 10:
            raise Violation(f"a copy of epoch {sim.core.brain.epoch} is open since {oldest}")

    def check_given_up(self) -> None:
        """The core gives a worker up for a late copy: one that the core was told of is not."""
        if not {"copy_late", "ack_withheld"} & set(self.sim.faults):
            raise Violation("a worker was given up for a late copy, and none was late")

    def check_end(self) -> None:
        """Everything was acknowledged or fenced, so nothing may wait for it."""
        tiers = self.sim.core.brain.tiers
        if tiers is None:
            return
        if not tiers.ready:
            raise Violation("the mover's answer to a RESET is waited for at the end")
        for name, slots in (("host", tiers.host), ("disk", tiers.disk)):
            if slots.free + slots.held != slots.count or any(slots.leases):
                raise Violation(f"{name} slots in motion at the end: {slots.counts()}")
