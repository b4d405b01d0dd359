"""What the world may do to the state machine, and what must hold whatever it does. Not a test.

`World` knows facts that the machine does not: which processes really run, what each has said, what
each was asked. It says which events can come next (`moves`), carries one out, and raises Violation
when the machine's answer breaks a property. `walk` visits every state that can be reached.

Time is abstract: each deadline and each pause is a move of its own, in any order, and each end of a
process comes with and without a history that reaches the limit of restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from holdfast.core.metrics import FAULTS
from holdfast.errors import HoldfastError
from holdfast.proc.lifecycle.actions import (
    Action,
    Happened,
    Introduce,
    Kill,
    Lost,
    Notice,
    Promote,
    Spawn,
    Tell,
)
from holdfast.proc.lifecycle.machine import Lifecycle
from holdfast.proc.lifecycle.policy import Policy
from holdfast.proc.lifecycle.slot import Slot
from holdfast.proc.lifecycle.states import DYING, EVENTS, LIVE, PINGED, Event, Phase, Role, State
from holdfast.proc.lifecycle.table import RESTS, TABLE, WAITS_FOR
from holdfast.wire.messages import Memory

NOW_S = 1000.0
WORKERS = (Role.WORKER, Role.STANDBY)
# Ends in the last minute, set before a move and forgotten after it: none, one (so that the next
# costs a pause), or so many that the next is one too many.
HISTORIES = {"fresh": (), "paced": (NOW_S,), "limit": (NOW_S,) * 5}


class Violation(AssertionError):
    """The machine's answer breaks a property."""


@dataclass(frozen=True, slots=True)
class Move:
    """One thing that can happen. fault: it does not, once faults have stopped."""

    name: str
    role: Role | None = None
    index: int = 0
    event: Event | None = None
    history: str = "fresh"
    fault: bool = True

    def __str__(self) -> str:
        who = "server" if self.role is None else f"{self.role} {self.index}"
        return f"{who}: {self.name}" + (f" ({self.history})" if self.history != "fresh" else "")


@dataclass(slots=True)
class Process:
    """What is true of a process that runs. loaded: it writes no weights. asked: a sum.
    core: whose link it has. Of one
    that ends only loaded and epoch are kept: any word of it may still come."""

    role: Role
    loaded: bool = False
    ready: bool = False
    epoch: int = 0
    asked: bool = False
    verified: bool = False
    core: int = 0


_truths = attrgetter(*(field.name for field in fields(Process)))


@dataclass(slots=True)
class World:
    """The machine and the truth. judging: whose sum the keeper has been given and not judged.
    sound: roles that do nothing but what they should, unless they are told to end. memory: what
    became of the pages since the last promotion."""

    machine: Lifecycle
    sound: tuple[Role, ...] = ()
    processes: dict[int, Process] = field(default_factory=dict)
    judging: int | None = None
    memory: Memory = Memory.LOST
    epoch: int = 0
    drained: bool = False
    drain_told: bool = False
    blameless: bool = False
    actions: list[Action] = field(default_factory=list)

    def copy(self) -> World:
        processes = {number: Process(*_truths(one)) for number, one in self.processes.items()}
        return replace(self, machine=self.machine.copy(), processes=processes, actions=[])

    def key(self) -> tuple[Any, ...]:
        """Equal for worlds that go on alike: numbers of processes and of epochs do not matter."""
        machine = self.machine
        slots: list[Any] = []
        for slot in machine.slots:
            slots += (slot.state, slot.deadline_s is None)
            truth = self.processes.get(slot.process or 0)
            if truth is not None:
                slots += (truth.ready, truth.epoch > 0, truth.asked, truth.verified)
                slots += (slot.fresh, slot.operator, slot.blameless, truth.loaded, slot.loaded)
        flags = (machine.weights_held, machine.core_was_ready, machine.deadline_s is None)
        flags = (*flags, machine.memory, self.memory)
        truth = (self.judging is None, self.drained, self.drain_told)
        return (machine.phase, *flags, *truth, *slots)

    # --- what can happen ---

    def moves(self) -> Iterator[Move]:
        """All that the world can do next; not what the table says."""
        machine = self.machine
        if machine.phase is Phase.OVER:
            return
        for slot in machine.slots:
            for move in self._moves_of(slot):
                if not move.fault or slot.role not in self.sound:
                    yield move
        if machine.deadline_s is not None:
            yield Move("time up", fault=False)
        yield Move("signal")

    def _moves_of(self, slot: Slot) -> Iterator[Move]:
        role, index = slot.role, slot.index
        if slot.deadline_s is not None:
            # While nothing is broken, a deadline is met, but by what must end.
            ending = slot.state in (State.PAUSED, State.ENDING)
            yield Move("clock", role, index, fault=not ending)
        if slot.process is None:
            return
        truth = self.processes[slot.process]
        dying = slot.state in DYING
        for event in self._words(slot, truth, dying):
            usual = event in (Event.READY, Event.SUM) and not dying and not truth.epoch
            yield Move(event, role, index, event, fault=not usual)
        for history in ("fresh", "paced") if role is Role.WORKER and not dying else ("fresh",):
            yield Move(Event.EOF, role, index, Event.EOF, history)
        asked = role is Role.WORKER and (dying or self.judging == slot.process)
        if asked and self.machine.keeper.process is not None:
            yield Move(Event.GOOD, role, index, Event.GOOD, fault=dying)
            yield Move(Event.BAD, role, index, Event.BAD)
        accused = (role is Role.WORKER and truth.epoch) or role is Role.API
        if accused and self.machine.core.process is not None:
            yield Move(Event.ACCUSED, role, index, Event.ACCUSED)
        histories = ("fresh",) if role is Role.STANDBY else ("fresh", "limit")
        for history in histories:
            usual = dying and history == "fresh"
            yield Move(Event.EXITED, role, index, Event.EXITED, history, fault=not usual)
        if slot.state is State.STARTING:
            for history in histories:
                yield Move(Event.UNSTARTED, role, index, Event.UNSTARTED, history)
        if PINGED.get(role) is slot.state:
            yield Move(Event.SILENT, role, index, Event.SILENT)

    def _words(self, slot: Slot, truth: Process, dying: bool) -> Iterator[Event]:
        if dying or not truth.ready:
            yield Event.READY
        yield Event.PROGRESS
        yield Event.FAULT
        yield Event.BROKEN
        # One that serves scrubs, and says its sum unasked: it may, and need not.
        if slot.role in WORKERS and (dying or truth.asked or truth.epoch):
            yield Event.SUM
        if slot.role is Role.CORE and (
            dying or (truth.ready and self.drain_told and not self.drained)
        ):
            yield Event.DRAINED

    # --- one step ---

    def step(self, move: Move) -> None:
        """Do the move to the machine, the machine's actions to the world, and check both."""
        machine = self.machine
        live = machine.phase in LIVE
        if move.role is None:
            if move.name == "signal":
                self._apply(machine.signal(15, "SIGTERM", NOW_S))
            else:
                self._apply(machine.time_up(NOW_S))
        else:
            slot = self._slot(move)
            self.blameless = slot.blameless
            self._truth(slot, move)
            if move.event is None:
                self._apply(machine.elapse(slot, NOW_S))
            else:
                slot.ends = HISTORIES[move.history]
                happened = Happened(move.event, slot.process or 0, "told so", code=1)
                self._apply(machine.handle(happened, NOW_S))
        if live and move.event in (Event.EXITED, Event.UNSTARTED):
            self._check_restart(move)
        self._check()
        self._forget()

    def begin(self) -> None:
        self._apply(self.machine.begin(NOW_S))
        self._check()

    def _forget(self) -> None:
        """What does not matter any more, so that few states are different ones."""
        machine = self.machine
        for slot in machine.slots:
            slot.ends = ()
            if slot.role is not Role.WORKER:
                slot.blameless = False  # Only the pace of restarts asks, and time is abstract.
            if machine.phase is not Phase.STARTING:
                slot.operator = False
            truth = self.processes.get(slot.process or 0)
            if truth is not None and slot.state in DYING:
                truth.ready = truth.asked = truth.verified = slot.fresh = False
                truth.loaded = truth.loaded or slot.state is State.READY
                if self.judging == slot.process:
                    self.judging = None

    def _slot(self, move: Move) -> Slot:
        return next(s for s in self.machine.slots if s.role is move.role and s.index == move.index)

    def _truth(self, slot: Slot, move: Move) -> None:
        """What the event means before the machine hears of it."""
        number = slot.process or 0
        truth = self.processes.get(number)
        match move.event:
            case Event.READY:
                truth.ready = True
            case Event.SUM:
                truth.asked = False
            case Event.GOOD | Event.BAD:
                judged = self.judging == number
                truth.verified = move.event is Event.GOOD and judged
                if move.event is Event.BAD and judged and self.memory is Memory.KEPT:
                    self.memory = Memory.RELOADED
                self.judging = None
            case Event.DRAINED:
                self.drained = True
            case Event.EXITED | Event.UNSTARTED:
                del self.processes[number]
                if self.judging == number:
                    self.judging = None
                if slot.role is Role.KEEPER and move.event is Event.EXITED:
                    self.judging, self.memory = None, Memory.LOST
                if slot.role is Role.CORE:
                    self.drained = self.drain_told = False

    def _apply(self, actions: list[Action]) -> None:
        self.actions = actions
        for action in actions:
            match action:
                case Spawn():
                    self._spawn(action)
                case Kill(process):
                    self._running(process, action)
                case Tell(process, message):
                    self._told(process, dict(message), action)
                case Promote(process, epoch, core, memory):
                    if memory is not self.memory:
                        raise Violation(f"memory {memory} is told, it was {self.memory}")
                    self._promote(process, epoch, core, action)
                    self.memory = Memory.KEPT
                case Lost(kind=kind):
                    if kind not in FAULTS:
                        raise Violation(f"a fault of kind {kind}, which no metric has")
                case Introduce(process, _, core, _):
                    for number in (process, core):
                        self._running(number, action)
                case Notice():
                    if not action.title:
                        raise Violation(f"a notice of nobody: {action}")

    def _running(self, process: int, action: Action) -> Process:
        if process not in self.processes:
            raise Violation(f"to a process that is gone: {action}")
        return self.processes[process]

    def _spawn(self, spawn: Spawn) -> None:
        if spawn.process in self.processes:
            raise Violation(f"a number is used twice: {spawn}")
        workers = [p for p in self.processes.values() if p.role in WORKERS]
        if spawn.role is Role.KEEPER and workers:
            raise Violation("new memory is made while processes map the old one")
        if spawn.role in WORKERS:
            if not spawn.loaded and workers:
                raise Violation("weights are to be loaded while another process maps them")
            if spawn.role is Role.WORKER and any(p.epoch for p in workers):
                raise Violation("a worker is started while an old epoch may write")
            if len(workers) >= 2:
                raise Violation("a third process of workers")
        elif sum(p.role is spawn.role for p in self.processes.values()) >= (
            self.machine.policy.apis if spawn.role is Role.API else 1
        ):
            raise Violation(f"one {spawn.role} too many")
        self.processes[spawn.process] = Process(spawn.role, spawn.loaded)

    def _told(self, process: int, message: dict[str, Any], action: Action) -> None:
        truth = self._running(process, action)
        match message["type"]:
            case "verify":
                if any(p.epoch for p in self.processes.values()):
                    raise Violation("weights are summed for a promotion before the fence")
                truth.asked, truth.verified = True, False
            case "weights_sum":
                self.judging = message["process"]
            case "drain" if truth.role is Role.CORE:
                self.drain_told = True

    def _promote(self, process: int, epoch: int, core: int, action: Action) -> None:
        truth = self._running(process, action)
        if any(p.epoch for p in self.processes.values()):
            raise Violation("an epoch is given before the old one is fenced: two may write")
        if epoch <= self.epoch:
            raise Violation(f"epoch {epoch} after {self.epoch}")
        if not truth.verified:
            raise Violation("an epoch is given before the weights were found good")
        if not self._running(core, action).ready:
            raise Violation("a worker for a core that is not there")
        truth.epoch = self.epoch = epoch
        truth.core = core

    def _check(self) -> None:
        """What holds between events."""
        machine = self.machine
        here = {slot.process for slot in machine.slots if slot.process is not None}
        if machine.phase is not Phase.OVER and here != set(self.processes):
            raise Violation(f"processes {set(self.processes) - here} are forgotten")
        if machine.epoch != self.epoch:
            raise Violation(f"epoch {machine.epoch} without a promotion")
        if machine.phase is Phase.OVER:
            return
        for slot in machine.slots:
            self._check_wait(slot)
        worker = self.processes.get(machine.worker.process or 0)
        if machine.worker.alive and worker and worker.epoch and worker.core not in self.processes:
            raise Violation("a worker is kept whose core is gone")
        if machine.phase in (Phase.DRAINING, Phase.ENDING) and machine.deadline_s is None:
            raise Violation(f"{machine.phase} without a deadline")
        if machine.phase is Phase.STOPPING and not here:
            raise Violation("stopping, and nobody is left")

    def _check_restart(self, move: Move) -> None:
        """After an end, the next process comes after a pause, and not at all beyond the limit."""
        if any(isinstance(action, Spawn) and action.role is move.role for action in self.actions):
            raise Violation(f"a {move.role} is started again without a pause")
        limited = move.history == "limit" and not self.blameless
        if limited and self.machine.phase in LIVE:
            raise Violation(f"a {move.role} is replaced beyond the limit of restarts")

    def _check_wait(self, slot: Slot) -> None:
        """A state has a deadline, or rests, or waits for a process that has one or rests."""
        machine = self.machine
        if slot.deadline_s is not None or slot.state in RESTS[slot.role]:
            return
        if slot.state is State.GONE:
            live = machine.phase in LIVE
            if slot.role in (Role.CORE, Role.API) and live:
                raise Violation(f"no {slot.role}, and none is planned")
            waits = (machine.worker, machine.standby)
            if slot.role is Role.KEEPER and live and all(s.deadline_s is None for s in waits):
                raise Violation("no keeper, none is planned and nothing is awaited")
            if slot.role is Role.WORKER and live:
                waits = (machine.keeper, machine.standby)
                if all(s.deadline_s is None for s in waits):
                    raise Violation("no worker, none is planned and nothing is awaited")
            return
        if slot.role is Role.WORKER and slot.state in WAITS_FOR:
            other = {Role.KEEPER: machine.keeper, Role.CORE: machine.core}[WAITS_FOR[slot.state]]
            if other.deadline_s is not None or machine.deadline_s is not None:
                return
            if machine.phase is Phase.STOPPING:
                return  # Api processes stop first, each with a deadline.
        raise Violation(f"{slot.title} is {slot.state} without a deadline")

    @property
    def at_home(self) -> bool:
        """Serving, or over."""
        return self.machine.phase is Phase.OVER or (
            self.machine.phase is Phase.SERVING and self.machine.all_ready
        )


@dataclass
class Walk:
    """How much was visited. cells: (role, state, event) that happened."""

    states: int = 0
    moves: int = 0
    cells: set[tuple[Role, State, Event]] = field(default_factory=set)


def walk(policy: Policy, *, sound: tuple[Role, ...] = (), **tables: Any) -> Walk:
    """Visit every state breadth first. Raises Violation with the way to the first bad one."""
    world = World(Lifecycle(policy, **tables), sound)
    _guard(world, None, lambda: "the start")
    keys = {world.key(): 0}
    worlds = [world]
    came: list[tuple[int, Move] | None] = [None]
    healing: list[list[int]] = []
    result = Walk()

    def path(at: int, last: Move) -> str:
        moves = [str(last)]
        while came[at] is not None:
            at, move = came[at]
            moves.append(str(move))
        return " -> ".join(reversed(moves))

    queue = deque([0])
    while queue:
        at = queue.popleft()
        world = worlds[at]
        heals: list[int] = []
        for move in world.moves():
            result.moves += 1
            if move.role is not None:
                slot = world._slot(move)
                clock = Event.DUE if slot.state is State.PAUSED else Event.DEADLINE
                cell = (slot.role, slot.state, move.event or clock)
                if cell in result.cells and _does_nothing(world.machine, cell):
                    continue  # Done once, and the machine was at rest.
                result.cells.add(cell)
            after = world.copy()
            _guard(after, move, lambda at=at, move=move: path(at, move))
            key = after.key()
            there = keys.get(key)
            if there is None:
                there = keys[key] = len(worlds)
                worlds.append(after)
                came.append((at, move))
                queue.append(there)
            if not move.fault and there != at:
                heals.append(there)
        healing.append(heals)
        worlds[at].actions = []
    result.states = len(worlds)
    homes = [world.at_home for world in worlds]
    stuck = _stuck(healing, homes)
    if stuck is not None:
        world, origin = worlds[stuck], came[stuck]
        way = path(*origin) if origin else "the start"
        raise Violation(f"{_seen(world)} never heals, after: {way}")
    return result


def _does_nothing(machine: Lifecycle, cell: tuple[Role, State, Event]) -> bool:
    rule = machine._table.get(cell)
    return rule is not None and rule.then is None and not rule.do and not rule.never


def _guard(world: World, move: Move | None, way: Any) -> None:
    """One step; a violation says how it came to that."""
    before = _seen(world)
    try:
        world.begin() if move is None else world.step(move)
    except (Violation, HoldfastError, KeyError) as error:
        raise Violation(f"{type(error).__name__}: {error}; after: {way()}; in {before}") from error


def _seen(world: World) -> str:
    states = ", ".join(f"{slot.role} {slot.state}" for slot in world.machine.slots)
    return f"{world.machine.phase}: {states}"


def _stuck(healing: list[list[int]], homes: list[bool]) -> int | None:
    """A state from which, without faults, the server need not come home: one that nothing follows,
    or one on a circle. Depth first, colours as usual."""
    colour = bytearray(len(healing))  # 0 not seen, 1 on the way, 2 done
    for root in range(len(healing)):
        if colour[root]:
            continue
        stack = [(root, iter(() if homes[root] else healing[root]))]
        colour[root] = 1
        while stack:
            at, following = stack[-1]
            if not homes[at] and not healing[at]:
                return at
            for then in following:
                if colour[then] == 1:
                    return then
                if colour[then] == 0:
                    colour[then] = 1
                    stack.append((then, iter(() if homes[then] else healing[then])))
                    break
            else:
                colour[at] = 2
                stack.pop()
    return None


def all_cells() -> set[tuple[Role, State, Event]]:
    """Those that the table says can be."""
    return {cell for cell, rule in TABLE.items() if not rule.never and cell[2] in EVENTS[cell[0]]}
