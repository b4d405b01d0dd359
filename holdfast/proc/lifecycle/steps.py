"""Steps: the state of the server's processes, and what each step of the table does to it.

The verbs of `table.Step` are methods here, `_` before their name in small letters; a fact of
`joints.Fact` is answered by `_is`. Nothing here decides when: that is `machine.Lifecycle`, which
alone makes one. Pure: steps append actions for others to do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from holdfast.errors import InvariantError
from holdfast.proc.lifecycle.actions import (
    Action,
    ClosePort,
    Count,
    Happened,
    Introduce,
    Kill,
    Lost,
    Notice,
    Promote,
    Spawn,
    Tell,
)
from holdfast.proc.lifecycle.joints import Fact
from holdfast.proc.lifecycle.policy import Policy
from holdfast.proc.lifecycle.slot import Slot
from holdfast.proc.lifecycle.states import LIVE, Event, Phase, Role, Standby, State, Turn, Wait
from holdfast.wire.messages import End, Memory

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_OPERATOR = 2


class Steps:
    """Slots, phase, epoch, and the actions of the event that is being handled.

    weights_held: the keeper knows the sum of what was loaded. memory: what became of the pages
    since the last promotion. deadline_s: of the phase.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.phase = Phase.STARTING
        self.epoch = 0
        self.exit_code = 0
        self.operator_error = ""
        self.weights_held = False
        self.memory = Memory.LOST
        self.core_was_ready = False
        self.deadline_s: float | None = None
        self.keeper = Slot(Role.KEEPER)
        self.core = Slot(Role.CORE)
        self.worker = Slot(Role.WORKER)
        self.standby = Slot(Role.STANDBY)
        self.apis = [Slot(Role.API, index) for index in range(policy.apis)]
        self._processes = 0
        self._now_s = 0.0
        self._actions: list[Action] = []

    @property
    def slots(self) -> list[Slot]:
        """In the order of starts."""
        return [self.keeper, self.core, *self.apis, self.worker, self.standby]

    @property
    def all_ready(self) -> bool:
        """Everything that serves is there; a standby only helps."""
        return all(slot.state is State.READY for slot in self.slots if slot is not self.standby)

    def _turn(self, turn: Turn, message: str = "", number: int = 0) -> None:
        """Tell the server's own table."""
        raise NotImplementedError

    def _enter(self, slot: Slot, state: State | None, within: Wait | None, reason: str) -> None:
        if state is None:
            return
        if state is State.KILLED:
            slot.reason = slot.reason or self._in_words(reason)
            if slot.alive:
                slot.cause = "worker_stuck"
            self._actions.append(Kill(self._process(slot)))
        seconds = None if within is None else self.policy.seconds(within)
        slot.enter(state, self._now_s, None if seconds is None else self._now_s + seconds)

    def _in_words(self, reason: str) -> str:
        for wait in (Wait.START, Wait.VERIFY, Wait.HEARTBEAT):
            reason = reason.replace(f"{{{wait}}}", f"{self.policy.seconds(wait):g}")
        return reason

    def _is(self, fact: Fact) -> bool:
        match fact:
            case Fact.HELD:
                return self.weights_held
            case Fact.UNHELD:
                return not self.weights_held
            case Fact.MAY_START:
                return self.weights_held or self.standby.process is None
            case Fact.WARM:
                return self.policy.standby is Standby.WARM
            case Fact.WANTED:
                return self.policy.standby is not Standby.NONE
            case Fact.AT_ONCE:
                ends = len(self.worker.recent(self._now_s)) + (not self.worker.blameless)
                paces = self.policy.restart_s(ends), len(self.standby.recent(self._now_s))
                return paces == (0, 0)
            case Fact.ALL_READY:
                return self.all_ready
            case Fact.NO_API:
                return all(slot.process is None for slot in self.apis)
            case Fact.EMPTY:
                return all(slot.process is None for slot in self.slots)

    # --- steps of a process ---

    def _start(self, slot: Slot, _: Happened | None) -> None:
        self._processes += 1
        slot.filled(self._processes)
        self._enter(slot, State.STARTING, Wait.START, "")
        spawn = Spawn(self._processes, slot.role, slot.index)
        if slot.role in (Role.WORKER, Role.STANDBY):
            slot.loaded = self.weights_held
            spawn = replace(spawn, loaded=slot.loaded)
        elif slot.role is Role.CORE:
            spawn = replace(spawn, epoch=max(1, self.epoch), recover=self.core_was_ready)
        elif slot.role is Role.API:
            spawn = replace(spawn, linked=self.core.alive)
        self._actions.append(spawn)
        self._notice("starting", slot.title, "starting")
        if slot.role is Role.CORE:
            for api in self.apis:
                if api.alive:
                    link = Introduce(self._process(api), api.index, self._process(slot))
                    self._actions.append(link)
        elif slot.role is Role.API and self.phase is Phase.DRAINING:
            self._tell(slot, "drain")

    def _come_up(self, slot: Slot, happened: Happened) -> None:
        if slot is self.standby:
            self._notice("prepared", slot.title)
            return
        if slot is self.core:
            self.core_was_ready = True
            if self.phase is Phase.DRAINING:
                self._tell(slot, "drain")
        self._show_up(slot, dict(happened.facts))

    def _show_up(self, slot: Slot, facts: dict[str, Any]) -> None:
        if self.phase is not Phase.STARTING:
            self._notice("restarted", slot.title, slot.detail, facts=facts)

    def _extend(self, slot: Slot, _: Happened) -> None:
        wait = Wait.START if slot.state is State.STARTING else Wait.VERIFY
        slot.deadline_s = self._now_s + self.policy.seconds(wait)

    def _note(self, slot: Slot, happened: Happened) -> None:
        slot.fault, slot.operator = happened.detail, happened.operator
        slot.cause = slot.cause or "worker_fault"
        if slot.word_s is None:
            slot.word_s = happened.since_s

    def _keep_hung(self, slot: Slot, happened: Happened) -> None:
        slot.hung, slot.word_s = happened.hung, happened.since_s
        slot.cause = "worker_hang" if happened.hung else "worker_rejected"
        if happened.closed:
            slot.cause = ""  # It was ending already: its exit status says more.

    def _verify(self, slot: Slot, _: None) -> None:
        self._tell(slot, "verify")

    def _compare(self, slot: Slot, happened: Happened) -> None:
        # One that serves loaded nothing since its sum was compared: a scrub must find the same.
        loaded = slot.loaded or slot.epoch > 0
        found = {"process": slot.process, "sum": happened.weights_sum, "step": happened.step}
        self._tell(self.keeper, "weights_sum", **found, loaded=loaded)

    def _hold(self, slot: Slot, _: Happened) -> None:
        self.weights_held = True

    def _forget(self, slot: Slot, _: Happened) -> None:
        slot.cause = "weights"
        self.weights_held = False
        if self.memory is Memory.KEPT:
            self.memory = Memory.RELOADED
        self._tell(self.keeper, "weights_forget")

    def _tell_good(self, slot: Slot, happened: Happened) -> None:
        self._tell(self.core, "weights_good", epoch=slot.epoch, step=happened.step)

    def _kill_keeper(self, slot: Slot, _: Happened) -> None:
        if self.keeper.alive or self.keeper.state is State.ENDING:
            reason = "it did not compare the weights' sum in time"
            self._enter(self.keeper, State.KILLED, Wait.FENCE, reason)

    def _promote(self, slot: Slot, _: None) -> None:
        self.epoch += 1
        slot.epoch = self.epoch
        process, core = self._process(slot), self._process(self.core)
        self._actions.append(Promote(process, self.epoch, core, self.memory))
        self.memory = Memory.KEPT
        self._show_up(slot, {"epoch": self.epoch})

    def _take(self, slot: Slot, _: None) -> None:
        self.worker.move_from(slot)

    def _plan(self, slot: Slot, _: None) -> None:
        ends = [len(one.recent(self._now_s)) for one in (self.worker, slot)]
        slot.deadline_s = self._now_s + self.policy.standby_s(*ends)

    def _kill(self, slot: Slot, _: None) -> None:
        slot.blameless = True

    def _stop(self, slot: Slot, _: None) -> None:
        self._tell(slot, "stop")

    # --- ends of a process ---

    def _lose(self, slot: Slot, happened: Happened) -> None:
        if self.phase is Phase.STOPPING:
            return  # It was told to.
        if slot.operator and slot is not self.standby and self.phase is Phase.STARTING:
            self._turn(Turn.OPERATOR, slot.fault)
            return
        self._notice("lost", slot.title, slot.detail)
        if not slot.blameless:
            made = happened.event is Event.EXITED
            self._actions.append(self._lost(slot, happened.code if made else None))

    def _lost(self, slot: Slot, status: int | None) -> Lost:
        noticed_s = self._now_s if slot.noticed_s is None else slot.noticed_s
        return Lost(
            title=slot.title,
            role=slot.role,
            kind=slot.kind(status),
            detail=slot.detail,
            noticed_at_s=noticed_s,
            noticed_s=None if slot.word_s is None else max(0.0, noticed_s - slot.word_s),
            fenced_s=None if status is None else self._now_s - noticed_s,
        )

    def _lose_memory(self, slot: Slot, _: Happened) -> None:
        self.weights_held, self.memory = False, Memory.LOST
        for other in (self.worker, self.standby):
            if other.alive:
                other.blameless = True
                self._enter(other, State.KILLED, Wait.FENCE, "its memory ended with the keeper")

    def _lose_core(self, slot: Slot, _: Happened) -> None:
        for api in self.apis:
            self._tell(api, "core_lost", detail=slot.detail)
        if self.worker.state is State.READY:
            # What it has in flight belongs to a brain that is gone.
            self.worker.blameless = self.worker.orphan = True
            self._enter(self.worker, State.KILLED, Wait.FENCE, "its core ended")

    def _lose_worker(self, slot: Slot, happened: Happened) -> None:
        if slot.epoch:
            lost = {"epoch": slot.epoch, "detail": slot.detail}
            self._tell(self.core, "worker_lost", **lost, implicates=slot.faulted(happened.code))

    def _lose_api(self, slot: Slot, _: Happened) -> None:
        self._tell(self.core, "api_lost", index=slot.index)

    def _replace(self, slot: Slot, _: Happened) -> None:
        if self.phase not in LIVE:
            return
        ends = len(slot.recent(self._now_s))
        pause_s = self.policy.restart_s(ends)
        if pause_s is None:
            what = f"{slot.title} ended {ends} times in a minute; last: {slot.detail}"
            self._turn(Turn.CANNOT, what)
            return
        slot.restarts += 1
        self._actions.append(Count(slot.role))
        slot.enter(State.PAUSED, self._now_s, self._now_s + pause_s)

    def _unfenced(self, slot: Slot, _: Happened) -> None:
        seconds = self.policy.seconds(Wait.FENCE)
        late = f"SIGKILL did not end {slot.title} within {seconds:g} s"
        if slot is self.standby and self.phase in LIVE and self.weights_held:
            # It never had an epoch: the server does without another standby until it is gone.
            self._notice("warning", slot.title, late)
            slot.deadline_s = self._now_s + seconds
        else:
            self._turn(Turn.UNFENCED, late)

    # --- steps of the server ---

    def _announce(self, message: str, number: int) -> None:
        self._notice("ready", "holdfast serve")

    def _drain(self, message: str, number: int) -> None:
        seconds = f"{self.policy.drain_timeout_s:g} s"
        text = f"{message}: streams have {seconds} to end"
        self._notice("draining", "holdfast serve", text)
        for slot in (*self.apis, self.core):
            self._tell(slot, "drain")

    def _refuse(self, message: str, number: int) -> None:
        for slot in self.apis:
            self._tell(slot, "drain")

    def _fail(self, message: str, number: int) -> None:
        self.exit_code = EXIT_FAULT
        self._notice("failed", "holdfast serve", message)

    def _fail_operator(self, message: str, number: int) -> None:
        self.exit_code, self.operator_error = EXIT_OPERATOR, message

    def _exit_signal(self, message: str, number: int) -> None:
        self.exit_code = 128 + number

    def _end_shutdown(self, message: str, number: int) -> None:
        seconds = f"{self.policy.drain_timeout_s:g} s"
        self._end_streams(End.SHUTDOWN, f"the server shut down after {seconds}")

    def _end_fault(self, message: str, number: int) -> None:
        self._end_streams(End.ENGINE_FAULT, f"the server cannot go on: {message}")

    def _end_streams(self, end: End, message: str) -> None:
        # After drain the core says `drained` once nothing is live.
        self._tell(self.core, "drain")
        self._tell(self.core, "end_all", end=int(end), message=message)

    def _close_port(self, message: str, number: int) -> None:
        self._actions.append(ClosePort())

    def _out_of_turn(self, message: str, number: int) -> None:
        self._enter(self.core, State.KILLED, Wait.FENCE, "it says drained, and was not told to")

    # --- helpers ---

    def _drained(self, slot: Slot, _: Happened) -> None:
        self._turn(Turn.DRAINED)

    def _tell(self, slot: Slot, kind: str, **fields: Any) -> None:
        """To a process that is there; one that ends hears nothing more, except that it shall."""
        if slot.process is not None and (slot.alive or kind == "stop"):
            self._actions.append(Tell(slot.process, {"type": kind, **fields}))

    def _notice(
        self, kind: str, title: str, message: str = "", facts: dict[str, Any] | None = None
    ) -> None:
        self._actions.append(Notice(kind, title, message, facts=facts or {}))

    def _process(self, slot: Slot) -> int:
        if slot.process is None:
            raise InvariantError(f"no process in {slot.title}, {slot.state}")
        return slot.process
