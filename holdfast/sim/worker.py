"""SimWorker: a worker process of the simulation. Plans in, results out, one step at a time.

Faults of the process and of its channel strike here, at the world's rates. Between the moment it
begins to die and its fence it goes on writing what it had queued, as a GPU does whose process is
being torn down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError
from holdfast.sim.fake_worker import FakeWorker
from holdfast.wire.link import Kind
from holdfast.wire.plan import StepPlan

if TYPE_CHECKING:
    from holdfast.sim.simulator import Simulation

EXIT_CRASH = -11
EXIT_FAULT = 70


class SimWorker:
    """Process `number`; computes once it has an epoch."""

    def __init__(self, sim: Simulation, number: int) -> None:
        self.sim = sim
        self.number = number
        self.epoch = 0  # as soon as it is given one
        self.device: FakeWorker | None = None  # as soon as it hears of it
        self.queue: list[StepPlan] = []
        self.busy = False
        self.dying = False
        self.hung = False  # a step or a result of it will never be over
        self._steps = 0
        self._pass_step = 0  # after which the present pass over the weights began
        self._arrival = 0  # of its last result: a stream socket keeps order

    def promoted(self) -> None:
        """It hears of its epoch and gets the core's link."""
        sim = self.sim
        self.device = FakeWorker(sim.limits, self.epoch, sim.memory, sim.captures, sim.rot)
        sim.captures = list(self.device.graphs.captures.values())

    def receives(self, frame: bytes) -> None:
        """A plan arrives."""
        if self.dying:
            return
        self.queue.append(StepPlan.decode(frame))
        self.sim.copies.worker_receives(self.queue[-1])
        self._works()

    def _works(self) -> None:
        if self.busy or not self.queue:
            return
        sim = self.sim
        if sim.chance("crash"):
            self._dies(EXIT_CRASH)
            return
        if sim.chance("killed"):
            self._dies(-9)
            return
        self.busy = True
        if sim.chance("hang"):
            self.hung = True
            return
        time = sim.world.step_time * (100 if sim.chance("slow") else 1)
        sim.after(time, self._done, f"worker {self.epoch} ends a step")

    def _done(self) -> None:
        if self.dying:
            return
        sim, self.busy = self.sim, False
        assert self.device is not None
        plan = self._tampered(self.device, self.queue.pop(0))
        if (poisoned := sim.core.poisoned(plan.step)) is not None:
            sim.faults["poison"] = sim.faults.get("poison", 0) + 1
            self._dies(EXIT_CRASH)
            sim.core.suspects.killed_by(poisoned)
            return
        spoils = bool(plan.rows.size) and sim.chance("nan_row")
        spoil = sim.rng.randrange(plan.rows.size) if spoils else None
        try:
            result = self.device.run(plan, spoil)
        except (HoldfastError, IndexError) as fault:
            sim.processes.dies(self.number, EXIT_FAULT, fault=str(fault))
            return
        if spoil is not None:
            sim.witness.spoil((self.epoch, plan.step), spoil)
        for place, position, cells in self.device.misread:
            sim.witness.misread((self.epoch, plan.step), place, position, cells)
        if sim.chance("crash_after"):
            self._dies(EXIT_CRASH)
            return
        self._send(result.encode())
        self._steps += 1
        if sim.world.scrub_steps and self._steps % sim.world.scrub_steps == 0:
            sim.processes.scrubbed(self.number, self._pass_step)
            self._pass_step = plan.step
        self._works()

    def _dies(self, code: int) -> None:
        self.sim.processes.dies(self.number, code)

    def _tampered(self, device: FakeWorker, plan: StepPlan) -> StepPlan:
        if plan.page_writes.size and self.sim.chance("delta_lost"):
            plan.page_writes = plan.page_writes[:0]
        if plan.rows.size and self.sim.chance("delta_twice"):
            device.rows.length[plan.rows[0]] += 1
        return plan

    def _send(self, frame: bytes) -> None:
        sim, epoch = self.sim, self.epoch
        if sim.chance("result_lost"):
            self.hung = True
            return
        delay = sim.world.channel_time
        if sim.chance("result_late"):
            delay += 20 * sim.world.step_time
        arrival = self._arrival = max(sim.now + delay, self._arrival)
        copies = 2 if sim.chance("result_twice") else 1
        for _ in range(copies):
            sim.at(
                arrival,
                lambda: sim.core.worker_says(epoch, Kind.RESULT, frame),
                "core receives a result",
            )
        sim.old_results.append((epoch, frame))
        if sim.chance("result_old_epoch"):
            old_epoch, old = sim.rng.choice(sim.old_results)
            sim.at(
                arrival,
                lambda: sim.core.worker_says(old_epoch, Kind.RESULT, old),
                "an old result again",
            )

    # --- the end ---

    def begin_to_die(self, fenced_at: int) -> None:
        """Nothing more is begun; what was queued and is being copied may still be written."""
        sim, self.dying = self.sim, True
        if not self.epoch:
            return
        for number, plan in enumerate(self.queue):
            late = min(fenced_at - 1, sim.now + (number + 1) * sim.world.step_time)
            sim.at(late, lambda plan=plan: self._writes_late(plan), "zombie writes")
        sim.copies.kill(self.epoch, fenced_at)
        self.close()

    def close(self) -> None:
        """Its end of the link closes, after its last result."""
        closed = max(self.sim.now + self.sim.world.channel_time, self._arrival)
        name = f"link of epoch {self.epoch} closes"
        self.sim.at(closed, lambda: self.sim.core.worker_closed(self), name)

    def _writes_late(self, plan: StepPlan) -> None:
        assert self.device is not None
        try:
            result = self.device.run(plan)
        except (HoldfastError, IndexError):
            return
        self._send(result.encode())
