"""Processes: the world's side of proc.lifecycle. The production state machine decides, as it does
in the supervisor; what it says is done here to simulated processes, on virtual time.

Whatever happens to a process is told to the machine as the kernel or the process would: end of
file, then the pidfd once the fence time is over; words over a channel. Faults strike while a
process starts, waits and verifies. Kept here as well is what is true whatever the machine
believes, and each action is held against it: no epoch while an older one may write, no epoch given
twice, no word to a process that is gone, no blame that the world gave no cause for.

A second of the policy is `world.second`, so that its waits are a few steps long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.kv.pages import PageState
from holdfast.proc.lifecycle.actions import (
    Action,
    Happened,
    Introduce,
    Kill,
    Notice,
    Promote,
    Spawn,
    Tell,
)
from holdfast.proc.lifecycle.machine import Lifecycle
from holdfast.proc.lifecycle.states import LIVE, PINGED, Event, Phase, Role
from holdfast.sim.core import SimCore
from holdfast.sim.fake_worker import NOT_FINITE
from holdfast.sim.violation import Violation
from holdfast.sim.worker import EXIT_FAULT, SimWorker
from holdfast.wire.messages import Memory, first_id

if TYPE_CHECKING:
    from holdfast.sim.simulator import Simulation

WORKERS = (Role.WORKER, Role.STANDBY)
_SIGKILL = -9
# From outside, or by its own word: a worker that ends so has not faulted.
_BLAMELESS_CODES = (0, _SIGKILL)


@dataclass(slots=True)
class Process:
    """What is true of a process that is not fenced. loaded: it wrote no weights. core: its life; of
    an api process, that of the core which it was started with a link to. mail: what it
    was told before it could listen. code: how it ends, while it is dying.
    heard: when it hears what it was told last, for a channel keeps order."""

    number: int
    role: Role
    index: int = 0
    loaded: bool = False
    core: int = 0
    up: bool = False
    dying: bool = False
    code: int = 0
    heard: int = 0
    hung: bool = False  # the core's word
    frozen: bool = False  # it does and says nothing any more
    verified: bool = False
    worker: SimWorker | None = None
    mail: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Of a worker, from the moment it is given one."""
        return 0 if self.worker is None else self.worker.epoch


class Processes:
    """Those that run, by the machine's numbers. `blame`: epoch -> whether its worker ended by its
    own fault, None when nobody can tell."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.rng = Random(sim.world.seed * 0x9E37_79B1 + 13)
        self.lifecycle = Lifecycle(sim.world.policy)
        self.running: dict[int, Process] = {}
        self.blame: dict[int, bool | None] = {}
        self.weights_sound = True
        self.memory = Memory.LOST  # what is true of the pages since the last promotion
        self._scrub_rng = Random(sim.world.seed * 0x51ED_270B + 7)
        self._read_sound = True  # what the present pass over the weights has seen
        self._links: dict[int, int] = {}  # epoch -> life of the core it was promoted for
        self._unstarted: set[int] = set()  # numbers of which no process was made
        self._cores = 0
        self._booting = True
        self._timer: int | None = None

    # --- time and chance ---

    @property
    def now_s(self) -> float:
        """The supervisor's clock."""
        return self.sim.now / self.sim.world.second

    @property
    def gave_up(self) -> bool:
        """The machine has found that the server cannot go on."""
        return self.lifecycle.phase not in LIVE

    def boot(self) -> None:
        """Start the server, in no time and without faults."""
        self._act(self.lifecycle.begin(self.now_s))
        self.sim.run_until(lambda: self.lifecycle.phase is not Phase.STARTING)
        self._booting = False

    def _delay(self, time: int) -> int:
        return 0 if self._booting else time

    def _strikes(self, rate: str) -> bool:
        return not self._booting and self.sim.chance(rate, self.rng)

    def _later(self, time: int, action: Any, label: str) -> None:
        self.sim.after(self._delay(time), action, label)

    # --- events ---

    def happened(self, event: Event, number: int, **facts: Any) -> None:
        """Something of this process reaches the supervisor."""
        self._act(self.lifecycle.handle(Happened(event, number, **facts), self.now_s))

    def _say(self, event: Event, process: Process, **facts: Any) -> None:
        """A word of a process goes to the supervisor."""
        if process.frozen:
            return
        self._later(
            self.sim.world.channel_time,
            lambda: self.happened(event, process.number, **facts),
            f"{process.role} {process.number} says {event}",
        )

    def core_says(self, event: Event, **facts: Any) -> None:
        """A word of the core that lives."""
        process = self._core()
        if process is not None:
            self._say(event, process, **facts)

    def kill_core(self) -> None:
        """The world ends the core."""
        process = self._core()
        assert process is not None
        self.dies(process.number, self.rng.choice([_SIGKILL, EXIT_FAULT]))

    def kill_keeper(self, rng: Random) -> None:
        """The world ends the keeper, if one is there."""
        for process in list(self.running.values()):
            if process.role is Role.KEEPER:
                self.dies(process.number, rng.choice([_SIGKILL, EXIT_FAULT]))

    def keeper(self) -> int | None:
        """The number of the keeper that listens, if one does."""
        keepers = (one for one, p in self.running.items() if p.role is Role.KEEPER)
        return next((one for one in keepers if self.answers(one)), None)

    def answers(self, number: int) -> bool:
        """Whether a process hears what it is told and can say something."""
        process = self.running.get(number)
        return process is not None and process.up and not process.dying and not process.frozen

    def may_write(self, number: int) -> bool:
        """Whether a process may still write: it is not fenced, nor does it stand still."""
        process = self.running.get(number)
        return process is not None and not process.frozen

    def freeze(self, rng: Random) -> None:
        """Some process that nobody's deadline watches stops for ever. The supervisor asks it
        whether it is there, and kills it when the answer is late."""
        able = [
            process
            for process in self.running.values()
            if process.role in (Role.CORE, Role.KEEPER, Role.STANDBY) and not process.dying
        ]
        self._freeze(rng.choice(able))

    def freeze_keeper(self, rng: Random) -> None:
        """The keeper stops for ever, if one is there."""
        for process in list(self.running.values()):
            if process.role is Role.KEEPER and not process.dying:
                self._freeze(process)

    def _freeze(self, process: Process) -> None:
        slot = self.lifecycle.slot_of(process.number)
        if process.frozen or slot is None or PINGED.get(slot.role) is not slot.state:
            return
        self.sim.say(f"{process.role} {process.number} freezes")
        process.frozen = True
        if process.role is Role.CORE:
            self.sim.core.up = False
        late = int(self.lifecycle.policy.heartbeat_timeout_s * self.sim.world.second)

        def silent() -> None:
            slot = self.lifecycle.slot_of(process.number)
            if slot is not None and PINGED.get(slot.role) is slot.state:
                self.happened(Event.SILENT, process.number)

        self.sim.after(late, silent, f"{process.role} {process.number} has not answered")

    def scrubbed(self, number: int, step: int) -> None:
        """A worker has read the weights through, from the end of this step on. A byte that changed
        meanwhile may have been read before or after that."""
        process, rng = self.running[number], self._scrub_rng
        seen = self._read_sound and (self.weights_sound or rng.random() < 0.5)
        self._say(Event.SUM, process, weights_sum=int(seen), step=step)
        self._read_sound = self.weights_sound
        if self.sim.chance("weights_rot", rng):
            self.weights_sound = False
            self.sim.core.kept.weights_changed()

    def kill_api(self, index: int) -> None:
        """The world ends an api process, if one is there."""
        for process in list(self.running.values()):
            if process.role is Role.API and process.index == index:
                self.dies(process.number, self.rng.choice([_SIGKILL, EXIT_FAULT]))

    def core_of(self, epoch: int) -> int | None:
        """Life of the core that the worker of an epoch was linked to."""
        return self._links.get(epoch)

    def check_over(self) -> None:
        """The end of a server that could not go on: nobody is left."""
        phase, running = self.lifecycle.phase, [p.role for p in self.running.values()]
        if phase is not Phase.OVER or running or self.lifecycle.exit_code != EXIT_FAULT:
            raise Violation(f"given up, and {phase} with {running}, {self.lifecycle.exit_code}")

    def accuse_worker(self, epoch: int, detail: str, *, hung: bool) -> None:
        """The core's word about the worker of an epoch."""

        def arrives() -> None:
            number = self.lifecycle.worker_of(epoch)
            if number is None:
                return
            self._accused(self.running[number], hung=hung)
            self.happened(Event.ACCUSED, number, detail=detail, hung=hung)

        self._later(self.sim.world.channel_time, arrives, f"epoch {epoch} is accused: {detail}")

    def _blame(self, process: Process) -> None:
        own = process.hung or process.code not in _BLAMELESS_CODES
        # Without its core it is about to be killed: nobody can tell what comes first.
        orphaned = self._links[process.epoch] != self.sim.core.life or not self.sim.core.up
        self.blame[process.epoch] = None if orphaned else own

    def _accused(self, process: Process, *, hung: bool) -> None:
        if hung and process.dying:
            self.blame[process.epoch] = None  # Nobody can tell what came first.
        process.hung |= hung

    def accuse_api(self, number: int, detail: str) -> None:
        """The core's word about an api process."""
        self._later(
            self.sim.world.channel_time,
            lambda: self.happened(Event.ACCUSED, number, detail=detail),
            f"api process {number} is accused: {detail}",
        )

    def dies(self, number: int, code: int, fault: str = "") -> None:
        """A process ends: by itself, from outside (SIGKILL), or killed by us."""
        process = self.running.get(number)
        if process is None or process.dying:
            return
        process.dying, process.code = True, code
        self.sim.say(f"{process.role} {number} dies: {code} {fault}")
        fenced_at = self.sim.now + self.sim.world.fence_time
        if process.epoch:
            self._blame(process)
        if fault:
            self.happened(Event.FAULT, number, detail=fault)
        self.sim.after(0, lambda: self.happened(Event.EOF, number), f"{process.role} {number}: eof")
        self.sim.at(
            fenced_at, lambda: self._exited(process, code), f"{process.role} {number}: exited"
        )
        if process.worker is not None:
            process.worker.begin_to_die(fenced_at)
        elif process.role is Role.CORE and process.core == self.sim.core.life:
            self.sim.core.die()
        elif process.role is Role.API:
            self.sim.apis[process.index].die(number)

    def _exited(self, process: Process, code: int) -> None:
        del self.running[process.number]
        if process.epoch and self._strikes("page_corrupt"):
            self._corrupt()
        if process.role is Role.KEEPER:
            self.memory, self.sim.pages_void = Memory.LOST, True
        self.happened(Event.EXITED, process.number, code=code)

    def _corrupt(self) -> None:
        """Some cells of any pages, sealed and free ones among them, are not what they were. Until
        the core hears of the next worker it believes in them, and must not use them."""
        self.sim.pages_void = True
        for group, pages in enumerate(self.sim.memory):
            sealed: list[int] = []
            if self.sim.core.up:  # Else they are few among many.
                state = self.sim.core.brain.ledger.pools[group].state
                sealed = np.flatnonzero(state == PageState.SEALED).tolist()
            for _ in range(self.rng.randint(1, 6)):
                page, at = self.rng.randrange(1, len(pages)), self.rng.randrange(pages.shape[1])
                if sealed and self.rng.random() < 0.5:
                    page = self.rng.choice(sealed)
                    if self.rng.random() < 0.5:  # Whatever part of it is written anew.
                        pages[page, :] = NOT_FINITE
                        continue
                pages[page, at] = NOT_FINITE if self.rng.random() < 0.5 else pages[page, at] ^ 1

    def _ring(self) -> None:
        """The next deadline of the machine."""
        next_s = self.lifecycle.next_s
        if next_s is None or self.lifecycle.phase is Phase.OVER:
            return
        at = max(self.sim.now, int(next_s * self.sim.world.second) + 1)
        if self._timer is not None and self.sim.now <= self._timer <= at:
            return
        self._timer = at
        self.sim.at(at, self._tick, "supervisor ticks")

    def _tick(self) -> None:
        if self._timer is not None and self._timer <= self.sim.now:
            self._timer = None
        self._act(self.lifecycle.tick(self.now_s))

    # --- actions ---

    def _act(self, actions: list[Action]) -> None:
        queue = deque(actions)
        while queue:
            match queue.popleft():
                case Spawn() as spawn:
                    if (failed := self._spawn(spawn)) is not None:
                        queue.extend(self.lifecycle.handle(failed, self.now_s))
                case Kill(number):
                    if number in self.running:  # Else it could not be started.
                        self.dies(number, _SIGKILL)
                case Tell(number, message):
                    self._tell(number, dict(message))
                case Promote(number, epoch, core, memory):
                    self._promote(number, epoch, core, memory)
                case Introduce(core=core) if core in self._unstarted:
                    pass  # As in the supervisor: the machine was told.
                case Introduce(number, index, core):
                    life = self._running(core).core
                    self._tell(number, {"type": "core", "life": life})
                    self._tell(core, _introduction(number, index))
                case Notice(kind, title, message):
                    self.sim.say(f"supervisor: {kind} {title} {message}")
        if self.gave_up and self.sim.world.immortal:
            raise Violation("the server gave up, and the world gave no cause")
        if self.lifecycle.phase is Phase.OVER:
            for number in list(self.running):
                self.dies(number, _SIGKILL)
        self._ring()

    def _running(self, number: int) -> Process:
        if number not in self.running:
            raise Violation(f"process {number} is spoken to, and gone")
        return self.running[number]

    def _core(self) -> Process | None:
        found = (p for p in self.running.values() if p.role is Role.CORE and not p.dying)
        return next(found, None)

    def _spawn(self, spawn: Spawn) -> Happened | None:
        role, world = spawn.role, self.sim.world
        if self.sim.now > 2 * self.sim.horizon:
            raise Violation(f"a {role} is started long after the last fault")
        if self._strikes("spawn_fails"):
            self._unstarted.add(spawn.process)
            return Happened(Event.UNSTARTED, spawn.process, "no memory")
        process = Process(spawn.process, role, spawn.index, spawn.loaded)
        others = [p for p in self.running.values() if p.role in WORKERS]
        if role is Role.KEEPER and others:
            raise Violation("new memory is made while processes map the old one")
        if role in WORKERS:
            if not spawn.loaded and others:
                raise Violation("weights are loaded while another process maps them")
            process.worker = SimWorker(self.sim, spawn.process)
        elif role is Role.CORE:
            self._cores += 1
            process.core = self._cores
            self.sim.core = SimCore(self.sim, self._cores, spawn.epoch)
        elif spawn.linked and (core := self._core()) is not None:
            process.core = core.core
            self._tell(core.number, _introduction(spawn.process, spawn.index))
        self.running[spawn.process] = process
        time = world.respawn_time
        if role not in WORKERS:
            time = self.rng.choice([1, world.step_time, time])
        if self._strikes("respawn_fault"):
            self._dies_within(process, time)
        elif not self._strikes("never_ready"):
            self._later(time, lambda: self._starts(process), f"{role} {spawn.process} has started")
        return None

    def _dies_within(self, process: Process, time: int) -> None:
        code = self.rng.choice([_SIGKILL, EXIT_FAULT])
        self.sim.after(
            self.rng.randint(0, time),
            lambda: self.dies(process.number, code),
            f"end of {process.role} {process.number}",
        )

    def _starts(self, process: Process) -> None:
        if process.dying:
            return
        process.up = True
        if process.worker is not None and not process.loaded:
            self.weights_sound = self._read_sound = True
            if self.memory is Memory.KEPT:
                self.memory = Memory.RELOADED
        if process.role is Role.KEEPER:
            self.weights_sound = False
            for pages in self.sim.memory:
                pages[:] = 0
            self.sim.copies.new_keeper()
        if process.role is Role.CORE:
            self.sim.core.start()
        elif process.role is Role.API:
            self.sim.apis[process.index].begin(process.number, process.core)
        elif process.role is Role.STANDBY and self._strikes("standby_death"):
            self._dies_within(process, 100 * self.sim.world.step_time)
        self._say(Event.READY, process)
        mail, process.mail = process.mail, []
        for message in mail:
            self._hears(process, message)

    # --- what processes are told ---

    def _tell(self, number: int, message: dict[str, Any]) -> None:
        if number in self._unstarted:
            return
        process, delay = self._running(number), self.sim.world.channel_time
        if process.role is Role.API:
            # It serves clients meanwhile, and reads what it is told when it gets to it.
            delay += self.rng.choice([0, 0, 3, 100, 300]) * self.sim.world.step_time
        arrival = process.heard = max(self.sim.now + self._delay(delay), process.heard)
        self.sim.at(
            arrival,
            lambda: self._hears(process, message),
            f"{process.role} {number} hears {message['type']}",
        )

    def _hears(self, process: Process, message: dict[str, Any]) -> None:
        if process.dying or process.frozen:
            return
        if not process.up:
            process.mail.append(message)
        elif message["type"] == "stop":
            self._stop(process)
        elif process.role is Role.CORE:
            if message["type"] == "worker_lost":
                self._check_blame(message)
            self.sim.core.obey(message)
        elif process.role is Role.API:
            self.sim.apis[process.index].obey(message)
        elif process.role is Role.KEEPER:
            if message["type"] == "weights_sum":
                self._compare(message)
        elif message["type"] == "verify":
            self._verify(process)
        else:
            assert process.worker is not None
            process.worker.promoted()

    def _stop(self, process: Process) -> None:
        """It ends once it has nothing to finish; an api process has its clients."""
        if process.role is Role.API and self.sim.apis[process.index].clients:
            later = self.sim.world.step_time
            self.sim.after(later, lambda: self._hears(process, {"type": "stop"}), "still writing")
        else:
            self.dies(process.number, 0)

    def _check_blame(self, lost: dict[str, Any]) -> None:
        """The core is told whether a worker faulted by itself, as it was."""
        if self._links[lost["epoch"]] != self.sim.core.life:
            return  # It computed for a core that is gone: nobody's rows were in flight.
        own = self.blame[lost["epoch"]]
        if own is not None and lost["implicates"] != own:
            raise Violation(f"epoch {lost['epoch']}: implicates {lost['implicates']}, was {own}")

    def _verify(self, process: Process) -> None:
        if self._strikes("promote_fault"):
            self._dies_within(process, 4 * self.sim.world.channel_time)
        if process.loaded and self._strikes("weights_bad"):
            self.weights_sound = False
        self._say(Event.SUM, process, weights_sum=int(self.weights_sound))

    def _compare(self, message: dict[str, Any]) -> None:
        """The keeper's verdict; it takes what was just loaded for what is right."""
        process = self.running.get(message["process"])
        good = bool(message["sum"]) or not message["loaded"]
        if process is not None:
            process.verified = good
            verdict = Event.GOOD if good else Event.BAD
            self._say(verdict, process, step=message["step"])

    def _promote(self, number: int, epoch: int, core: int, memory: Memory) -> None:
        process, life = self._running(number), self._running(core).core
        assert process.worker is not None
        for other in self.running.values():
            if other.epoch:
                raise Violation(f"epoch {epoch} is given while epoch {other.epoch} may write")
        if epoch <= max(self._links, default=0):
            raise Violation(f"epoch {epoch} is given after epoch {max(self._links)}")
        if not process.verified or not self.weights_sound:
            raise Violation(f"epoch {epoch} is given over weights that were not found good")
        if memory is not self.memory:
            raise Violation(f"epoch {epoch}: memory {memory} is told, it is {self.memory}")
        self.memory, self._read_sound = Memory.KEPT, True
        self._links[epoch] = life
        process.worker.epoch = epoch
        if process.dying:  # Its end of file is on the way.
            self._blame(process)
        self._tell(number, {"type": "promote"})
        if self._strikes("memory_lost"):
            memory = Memory.LOST
            self._corrupt()
        told = {"epoch": epoch, "memory": str(memory), "worker": process.worker}
        self._tell(core, {"type": "worker", **told})
        if process.dying:
            process.worker.close()


def first_request(process: int, index: int) -> int:
    """The first id of the requests of an api process."""
    return first_id(index, process << 32 | 1)


def _introduction(process: int, index: int) -> dict[str, Any]:
    first = first_request(process, index)
    return {"type": "api", "index": index, "process": process, "first_id": first}
