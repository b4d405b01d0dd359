"""Lifecycle: which process is in which state, and what must be done on each event.

It interprets the tables of `table` and has no process, clock or socket: events with their time go
in, actions come out, to be done in order. The supervisor drives it with processes, the simulator
with its own. Home of two invariants:

    nothing of the old epoch writes any more    a worker is given an epoch when its place is empty,
                                                which it is once the pidfd of the one before fired
    epochs rise                                 by one a promotion, never otherwise
"""

from __future__ import annotations

import copy

from holdfast.errors import InvariantError, LinkError
from holdfast.proc.lifecycle.actions import Action, Happened
from holdfast.proc.lifecycle.joints import JOINTS, Joint
from holdfast.proc.lifecycle.policy import Policy
from holdfast.proc.lifecycle.slot import Slot, how_it_ended
from holdfast.proc.lifecycle.states import WORDS, Event, Phase, State, Turn
from holdfast.proc.lifecycle.steps import Steps
from holdfast.proc.lifecycle.table import TABLE, Step, Table
from holdfast.proc.lifecycle.turns import TURNS, Change

# Joint rules applied after one event: a server's start applies some ten.
_SETTLE_MAX = 1000


class Lifecycle(Steps):
    """`begin` once, then `handle`, `tick`, `signal` until `phase` is OVER; each returns actions.

    An action that fails is told as an event: a process that cannot be made is UNSTARTED, one that
    takes no message BROKEN. exit_code, operator_error: what to end with. The tables are arguments
    for tests that break them.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        table: Table = TABLE,
        joints: tuple[Joint, ...] = JOINTS,
        turns: dict[tuple[Phase, Turn], Change] = TURNS,
    ) -> None:
        super().__init__(policy)
        self._table, self._joints, self._turns = table, joints, turns

    @property
    def next_s(self) -> float | None:
        """When `tick` has something to do."""
        times = [slot.deadline_s for slot in self.slots] + [self.deadline_s]
        return min((at for at in times if at is not None), default=None)

    def copy(self) -> Lifecycle:
        """An equal one of its own."""
        twin = copy.copy(self)
        twin.keeper, twin.core = self.keeper.copy(), self.core.copy()
        twin.worker, twin.standby = self.worker.copy(), self.standby.copy()
        twin.apis = [slot.copy() for slot in self.apis]
        twin._actions = []
        return twin

    def slot_of(self, process: int) -> Slot | None:
        """Where the process is; None when its end was handled."""
        return next((slot for slot in self.slots if slot.process == process), None)

    def worker_of(self, epoch: int) -> int | None:
        """The process that has this epoch; None when it is gone."""
        worker = self.worker
        return worker.process if worker.process is not None and worker.epoch == epoch else None

    # --- what happens ---

    def begin(self, now_s: float) -> list[Action]:
        """The first processes."""
        self._now_s = now_s
        return self._settled()

    def handle(self, happened: Happened, now_s: float) -> list[Action]:
        """What to do about an event; nothing about a process whose end was handled.

        Raises LinkError, having changed nothing, at a word that cannot come now: its speaker is
        broken. Raises InvariantError at any other event that cannot be.
        """
        slot = self.slot_of(happened.process)
        if slot is None or self.phase is Phase.OVER:
            return []
        return self._handle(slot, happened, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """What to do about all deadlines and pauses that are over by now."""
        actions: list[Action] = []
        for slot in self.slots:
            if slot.deadline_s is not None and now_s >= slot.deadline_s:
                actions += self.elapse(slot, now_s)
        if self.deadline_s is not None and now_s >= self.deadline_s:
            actions += self.time_up(now_s)
        return actions

    def elapse(self, slot: Slot, now_s: float) -> list[Action]:
        """The deadline or the pause of this slot is over."""
        if self.phase is Phase.OVER:
            return []
        event = Event.DUE if slot.state is State.PAUSED else Event.DEADLINE
        return self._handle(slot, Happened(event, slot.process or 0), now_s)

    def time_up(self, now_s: float) -> list[Action]:
        """The deadline of the phase is over."""
        self._now_s, self.deadline_s = now_s, None
        if self.phase is not Phase.OVER:
            self._turn(Turn.TIME_UP)
        return self._settled()

    def signal(self, number: int, name: str, now_s: float) -> list[Action]:
        """SIGTERM and its like were sent to the server."""
        self._now_s = now_s
        if self.phase is not Phase.OVER:
            self._turn(Turn.SIGNAL, name, number)
        return self._settled()

    def _handle(self, slot: Slot, happened: Happened, now_s: float) -> list[Action]:
        rule = self._table[slot.role, slot.state, happened.event]
        if rule.never:
            cell = f"{slot.title}, {slot.state}: {happened.event}: {rule.why}"
            raise (LinkError if happened.event in WORDS else InvariantError)(cell)
        self._now_s = now_s
        if slot.process is not None and rule.then is State.GONE:
            unstarted = happened.event is Event.UNSTARTED
            how = "cannot be started" if unstarted else how_it_ended(happened.code)
            slot.ended(f"{how}: {happened.detail}" if unstarted else how, now_s)
        self._enter(slot, rule.then, rule.within, rule.reason or happened.detail)
        for step in rule.do:
            if self.phase is not Phase.OVER:
                self._do(step, slot, happened)
        return self._settled()

    def _settled(self) -> list[Action]:
        """Apply joint rules until none does, and hand out what is to be done."""
        for _ in range(_SETTLE_MAX):
            if self.phase is Phase.OVER or not any(self._join(joint) for joint in self._joints):
                actions, self._actions = self._actions, []
                return actions
        raise InvariantError(f"joint rules never end: {[str(slot.state) for slot in self.slots]}")

    def _join(self, joint: Joint) -> bool:
        """Apply a joint rule where it holds; whether it did."""
        if self.phase not in joint.phases:
            return False
        slots = [s for s in self.slots if s.role in joint.roles and s.state in joint.states]
        if joint.roles and not slots:
            return False
        for slot in self.slots if joint.also else ():
            if slot.role in joint.also and slot.state not in joint.also[slot.role]:
                return False
        if not all(self._is(fact) for fact in joint.facts):
            return False
        if joint.turn is not None:
            self._turn(joint.turn)
            return True
        for slot in slots:
            self._enter(slot, joint.then, joint.within, joint.reason)
            for step in joint.do:
                self._do(step, slot, None)
        return bool(slots)

    def _turn(self, turn: Turn, message: str = "", number: int = 0) -> None:
        change = self._turns[self.phase, turn]
        if change.never:
            raise InvariantError(f"server, {self.phase}: {turn}: {change.why}")
        if change.then is not None:
            self.phase = change.then
            within = None if change.within is None else self.policy.seconds(change.within)
            self.deadline_s = None if within is None else self._now_s + within
        for step in change.do:
            getattr(self, "_" + step.name.lower())(message, number)

    def _do(self, step: Step, slot: Slot, happened: Happened | None) -> None:
        getattr(self, "_" + step.name.lower())(slot, happened)
