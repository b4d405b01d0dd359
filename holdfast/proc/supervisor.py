"""The supervisor: the `serve` parent. It starts every process, watches, kills and links them.

What to do it is told by proc.lifecycle, a state table without IO (docs/processes.md): this module
turns what the kernel and the children say into events, and actions into processes, sockets and
signals. It owns every Child, and in its Estate what must outlive them. Everything happens in one
thread, in one select over pidfds, control channels and signals. Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from holdfast.errors import InvariantError, LinkClosed, LinkError, OperatorError, require
from holdfast.proc import status
from holdfast.proc.child import Child, spawn
from holdfast.proc.control import Message
from holdfast.proc.estate import Estate
from holdfast.proc.fault_clocks import FaultClocks
from holdfast.proc.graph_steps import GraphSteps
from holdfast.proc.heartbeat import Heartbeat
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
from holdfast.proc.lifecycle.machine import Lifecycle
from holdfast.proc.lifecycle.policy import FENCE_S, Policy
from holdfast.proc.lifecycle.states import PINGED, Event, Phase, Role, Standby, State
from holdfast.proc.options import ServeOptions
from holdfast.proc.pace import Unwatched
from holdfast.proc.provoker import REFUSAL, Provoker
from holdfast.wire.messages import Memory, first_id

# At least so often does it look whom to ask whether it is there (proc.heartbeat).
_SLEEP_S_MAX = 1.0
# What the keeper gives, in its order, and what ends with it.
_MEMORY = ("weights", "pool")


class Supervisor:
    """`run` once, in the main thread. `modules` replaces the module of a role (tests)."""

    def __init__(
        self,
        options: ServeOptions,
        *,
        on_event: Callable[[Notice], None] = lambda notice: None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options
        self.port = options.port
        self.lifecycle = Lifecycle(
            Policy(
                apis=options.limits.api_processes,
                standby=Standby(options.standby),
                restarts_per_minute=options.restarts_per_minute,
                start_timeout_s=options.start_timeout_s,
                drain_timeout_s=options.drain_timeout_s,
                heartbeat_timeout_s=options.heartbeat_timeout_s,
            )
        )
        self._heartbeat = Heartbeat(options.heartbeat_timeout_s, time.monotonic())
        self._on_event = on_event
        self._modules = dict(modules or {})
        self._children: dict[int, Child] = {}
        self._first_ids: dict[int, int] = {}  # of the requests of each api process
        # Ids of requests rise with the processes that give them, also when the wall clock is set
        # back: it is looked at once, so that another server's ids are others.
        self._began_ns = time.time_ns() - time.monotonic_ns()
        self._hurried: int | None = None
        self._unshared = ""
        self._provoker: Provoker | None = None
        if options.drills:
            self._provoker = Provoker(
                self.lifecycle,
                self._children,
                self._order,
                device=options.device,
                weights_bytes=options.weights_bytes,
            )
        self._selector = selectors.DefaultSelector()
        self._started_s = time.monotonic()

    def run(self) -> int:
        """Serve until a signal or the end of what can be served. Returns the exit code.

        Raises OperatorError (code 2: the options, the model, the memory) when it cannot start.
        """
        require(threading.current_thread() is threading.main_thread(), "run in the main thread")
        self._estate = Estate(self.options)
        self.port = self._estate.port
        self._fault_clocks = FaultClocks(self._estate.metrics)
        self._graph_steps = GraphSteps(self._estate.metrics)
        self._unwatched = Unwatched()
        try:
            self._selector.register(self._estate.wake, selectors.EVENT_READ, ("signal", 0))
            self._selector.register(self._estate.status, selectors.EVENT_READ, ("status", 0))
            address = f"{self.options.host}:{self.port}"
            self._on_event(Notice("starting", "holdfast serve", address))
            if self._provoker is not None:
                warning = "--drills: any process of this user may break this server on purpose"
                self._on_event(Notice("warning", "holdfast serve", warning))
            self._act(self.lifecycle.begin(time.monotonic()))
            while self.lifecycle.phase is not Phase.OVER:
                self._tick()
        finally:
            self._close()
        if self.lifecycle.operator_error:
            raise OperatorError(self.lifecycle.operator_error)
        if self.lifecycle.exit_code == 0:
            self._on_event(Notice("stopped", "holdfast serve", "stopped"))
        return self.lifecycle.exit_code

    def status(self) -> dict[str, Any]:
        """What `ps` shows. Never options: they may hold secrets."""
        now_s = time.monotonic()
        lifecycle = self.lifecycle
        processes = []
        for slot in lifecycle.slots:
            if slot.role is Role.STANDBY and lifecycle.policy.standby is Standby.NONE:
                continue
            child = self._children.get(slot.process or 0)
            facts: dict[str, Any] = {
                "title": slot.title,
                "pid": None if child is None else child.pid,
                "state": str(slot.state),
                "since_s": round(now_s - (slot.since_s or self._started_s), 3),
                "rss_bytes": 0 if child is None else status.memory_bytes(child.pid),
                "restarts": slot.restarts,
                "last_end": slot.detail,
            }
            if slot.role is Role.WORKER:
                facts["epoch"] = slot.epoch
            processes.append(facts)
        facts = {
            "pid": os.getpid(),
            "title": self._estate.title,
            "host": self.options.host,
            "port": self.port,
            "model": self.options.served_name,
            "phase": str(lifecycle.phase),
            "ready": lifecycle.all_ready,
            "standby": str(lifecycle.policy.standby),
            "epoch": lifecycle.epoch,
            "uptime_s": round(now_s - self._started_s, 3),
            "rss_bytes": status.memory_bytes(os.getpid()),
            "processes": processes,
        }
        if (copy := self._estate.copy) is not None:
            facts["journal_copy"] = {"bytes": copy.bytes_written, "errors": copy.errors}
        if self._provoker is not None:
            facts["drills"] = self._provoker.moments
        return facts

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a peer of the status socket is answered."""
        if not request:
            return self.status()
        if set(request) != {"provoke"}:
            return {"error": f"unknown request: {', '.join(sorted(request))}"}
        if self._provoker is None:
            return {"error": REFUSAL}
        return self._provoker.obey(request["provoke"], self._estate.fds.get("weights"))

    # --- events ---

    def _tick(self) -> None:
        ready = [(*key.data, mask) for key, mask in self._selector.select(self._sleep_s())]
        # Words before deaths: a process's last message says why it ended.
        order = ("signal", "status", "control", "pidfd")
        for kind, process, mask in sorted(ready, key=lambda event: order.index(event[0])):
            if kind == "status":
                self._estate.status.answer(self.respond)
            elif kind == "signal":
                with contextlib.suppress(BlockingIOError):
                    self._estate.wake.recv(4096)
            elif process not in self._children:
                continue  # Its end was handled earlier in this tick.
            elif kind == "control":
                self._converse(process, mask)
            else:
                self._exited(process)
        while self._estate.signals:
            number = self._estate.signals.popleft()
            name = signal.Signals(number).name
            self._act(self.lifecycle.signal(number, name, time.monotonic()))
        while self._estate.warnings:
            self._on_event(Notice("warning", "holdfast serve", self._estate.warnings.popleft()))
        self._act(self.lifecycle.tick(time.monotonic()))
        self._ask()
        self._tell_unwatched()

    def _tell_unwatched(self) -> None:
        """A standby that prepares itself on a GPU, as long as nobody streams beside it."""
        slot = self.lifecycle.standby
        paced = self.options.device != "cpu" and slot.state is State.STARTING
        if paced and slot.process is not None:
            running = self._estate.board.total("rows_running")
            until_s = self._unwatched.until_s(slot.process, running, time.monotonic())
            if until_s is not None:
                told = self._say(slot.process, {"type": "unwatched", "until_s": until_s})
                if told is not None:
                    self._happened(told)

    def _ask(self) -> None:
        """Whether those are there that nothing else watches."""
        slots = self.lifecycle.slots
        watched = [s.process for s in slots if s.process and PINGED.get(s.role) is s.state]
        ask, silent = self._heartbeat.tick(watched, time.monotonic())
        for process in silent:
            self._happened(Happened(Event.SILENT, process))
        for process in ask:
            if (failed := self._say(process, {"type": "ping"})) is not None:
                self._happened(failed)

    def _sleep_s(self) -> float:
        next_s = self.lifecycle.next_s
        if next_s is None:
            return _SLEEP_S_MAX
        return min(_SLEEP_S_MAX, max(0.0, next_s - time.monotonic()))

    def _happened(self, happened: Happened) -> None:
        if self._provoker is not None:
            self._provoker.saw(happened.event, happened.process)
        self._act(self.lifecycle.handle(happened, time.monotonic()))

    def _converse(self, process: int, mask: int) -> None:
        """Send what waits, hear what was said."""
        control = self._children[process].control
        try:
            if mask & selectors.EVENT_WRITE:
                control.flush()
                self._watch_writing(process)
            if mask & selectors.EVENT_READ:
                for message, fds in control.receive():
                    self._heard(process, message, fds)
        except LinkClosed as error:
            self._selector.unregister(control)
            self._happened(Happened(Event.EOF, process, str(error)))
        except InvariantError:
            raise  # Ours, not the child's.
        except (LinkError, LookupError, TypeError, ValueError) as error:
            self._selector.unregister(control)
            self._happened(Happened(Event.BROKEN, process, f"it speaks nonsense: {error!r}"))

    def _heard(self, process: int, message: Message, fds: list[int]) -> None:
        """One control message; the table is in proc.child. Raises LinkError on nonsense."""
        kind, slot = message["type"], self.lifecycle.slot_of(process)
        role = None if slot is None else slot.role
        if kind == "ready" and role is Role.KEEPER:
            self._take_memory(message.get("unshared", ""), fds)
        else:
            for fd in fds:
                os.close(fd)
        happened: Happened | None = None
        if kind == "ready":
            facts = {name: value for name, value in message.items() if name != "type"}
            happened = Happened(Event.READY, process, facts=facts)
        elif kind == "progress":
            happened = Happened(Event.PROGRESS, process)
            if slot is not None:
                facts = {"done": message["done"], "total": message["total"]}
                self._on_event(Notice("progress", slot.title, message["what"], **facts))
        elif kind == "fault":
            said, operator = message["message"], message["operator"]
            since_s = message.get("at_s")
            happened = Happened(Event.FAULT, process, said, operator=operator, since_s=since_s)
        elif kind == "compiled" and role is Role.WORKER:
            self._estate.metrics.add("compiles_after_ready_total", message["count"])
            self._on_event(Notice("warning", "worker", f"compiled in a step: {message['what']}"))
        elif kind == "steps" and role is Role.WORKER:
            for notice in self._graph_steps.told(message):
                self._on_event(notice)
        elif kind == "weights_sum" and role in (Role.WORKER, Role.STANDBY):
            found = {"weights_sum": message["sum"], "step": message.get("step", 0)}
            happened = Happened(Event.SUM, process, **found)
        elif kind == "weights" and role is Role.KEEPER:
            verdict = Event.GOOD if message["ok"] else Event.BAD
            happened = Happened(verdict, message["process"], step=message["step"])
        elif kind == "provoked" and self._provoker is not None:
            self._provoker.provoked(process, message)
        elif kind == "drained" and role is Role.CORE:
            happened = Happened(Event.DRAINED, process)
        elif kind == "worker_fault" and role is Role.CORE:
            accused = self.lifecycle.worker_of(message["epoch"])
            how = {name: message.get(name, False) for name in ("hung", "closed")}
            how["since_s"] = message.get("since_s")
            happened = accused and Happened(Event.ACCUSED, accused, message["detail"], **how)
        elif kind == "fault_report" and role is Role.CORE:
            self._estate.tell_fault(message["report"])
        elif kind == "api_fault" and role is Role.CORE:
            happened = Happened(Event.ACCUSED, message["process"], message["detail"])
        elif kind == "resumed" and role is Role.CORE:
            for notice in self._fault_clocks.resumed(message["streams"], message["at_s"]):
                self._on_event(notice)
        elif kind == "pong":
            self._heartbeat.answered(process)
        else:
            raise LinkError(f"unknown message {kind!r}")
        if happened:
            self._happened(happened)

    def _take_memory(self, unshared: str, fds: list[int]) -> None:
        """The keeper's slabs; or why it has none, and each worker must make its own.

        Then a standby would need the memory a second time, and a worker finds nothing of the last
        one's: each loads the weights, one after another.
        """
        names = () if unshared else _MEMORY
        self._estate.take(dict(zip(names, fds, strict=True)))
        self._unshared = unshared
        if unshared:
            policy = self.lifecycle.policy
            self.lifecycle.policy = dataclasses.replace(policy, standby=Standby.NONE)
            what = "a fault will cost a load of the weights, and there is no standby"
            text = f"GPU memory cannot be shared between processes here ({unshared}): {what}"
            self._on_event(Notice("warning", "keeper", text))

    def _exited(self, process: int) -> None:
        """Its pidfd fired: nothing of it runs any more."""
        child = self._children[process]
        if child.control in self._selector.get_map():
            self._converse(process, selectors.EVENT_READ)  # Its last words.
        code = child.wait(1.0)
        if code is None:
            return  # Not gone after all: the pidfd stays readable and is looked at again.
        self._forget(process)
        if process == self.lifecycle.keeper.process:
            self._estate.drop(*_MEMORY)
        self._happened(Happened(Event.EXITED, process, code=code))

    # --- actions ---

    def _act(self, actions: Iterable[Action]) -> None:
        """Do them in order; what fails is an event, whose actions follow."""
        queue = deque(actions)
        while queue:
            failed = self._try(queue.popleft())
            if failed is not None:
                queue.extend(self.lifecycle.handle(failed, time.monotonic()))
        self._hurry()
        self._count()

    def _try(self, action: Action) -> Happened | None:
        match action:
            case Spawn():
                return self._spawn(action)
            case Kill(process):
                if process in self._children:  # Else it could not be started.
                    self._children[process].kill()
            case Tell(process, message):
                return self._say(process, dict(message))
            case Promote(process, epoch, core, memory):
                self._estate.metrics.set("worker_epoch", epoch)
                if self._provoker is not None:
                    for order in self._provoker.promoting(process):
                        self._order(process, order)
                child = self._children.get(process)
                pid = None if child is None else child.pid
                told = str(Memory.LOST if self._unshared else memory)
                ours = {"type": "worker", "epoch": epoch, "memory": told, "pid": pid}
                return self._link(process, {"type": "promote", "epoch": epoch}, core, ours)
            case Introduce(process, index, core):
                ours = self._introduction(process, index)
                return self._link(process, {"type": "core"}, core, ours)
            case ClosePort():
                self._estate.stop_listening()
            case Count(role):
                self._estate.metrics.add("process_restarts_total", labels=(str(role),))
            case Lost():
                self._fault_clocks.lost(action)
            case Notice("ready", title):
                facts = {"host": self.options.host, "port": self.port}
                self._on_event(Notice("ready", title, facts=facts))
            case Notice():
                self._on_event(action)
        return None

    def _spawn(self, action: Spawn) -> Happened | None:
        fds = self._estate.fds
        match action.role:
            case Role.KEEPER:
                return self._start(action, self.options.keeper_config(), {})
            case Role.CORE:
                config = self.options.core_config(action.epoch, recover=action.recover)
                return self._start(action, config, {n: fds[n] for n in ("journal", "metrics")})
            case Role.WORKER | Role.STANDBY:
                # The keeper still compares: what is loaded anew must be the same bytes again.
                config = self.options.worker_config(loaded=action.loaded and not self._unshared)
                if self._provoker is not None:
                    config |= self._provoker.config(action.role)
                return self._start(action, config, {n: fds[n] for n in _MEMORY if n in fds})
            case Role.API:
                return self._spawn_api(action)

    def _spawn_api(self, action: Spawn) -> Happened | None:
        """With its link to the core; without a core that link is closed at once."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            given = {
                "core": theirs.fileno(),
                "listen": self._estate.listeners[action.index].fileno(),
                "metrics": self._estate.fds["metrics"],
            }
            first = first_id(action.index, (self._began_ns + time.monotonic_ns()) // 1000)
            config = self.options.api_config() | {"first_id": first}
            failed = self._start(action, config, given)
            if failed is not None:
                return failed
            self._first_ids[action.process] = first
            if not action.linked:
                return None
            core = self.lifecycle.core.process or 0
            message = self._introduction(action.process, action.index)
            return self._say(core, message, [ours.fileno()])

    def _introduction(self, process: int, index: int) -> Message:
        """Of an api process to the core."""
        first = self._first_ids[process]
        return {"type": "api", "index": index, "process": process, "first_id": first}

    def _start(self, action: Spawn, config: dict[str, Any], fds: dict[str, int]) -> Happened | None:
        # A standby is a worker that has not been told so yet.
        code = "worker" if action.role is Role.STANDBY else str(action.role)
        module = self._modules.get(code, f"holdfast.proc.{code}")
        env = self.options.worker_environment() if code == "worker" else None
        role = str(action.role)
        try:
            child = spawn(role, action.index, module=module, config=config, fds=fds, env=env)
        except OSError as error:
            return Happened(Event.UNSTARTED, action.process, error.strerror or str(error))
        self._children[action.process] = child
        for kind, source in (("control", child.control), ("pidfd", child.pidfd)):
            self._selector.register(source, selectors.EVENT_READ, (kind, action.process))
        return None

    def _link(
        self, process: int, message: Message, core: int, core_message: Message
    ) -> Happened | None:
        """A new link, one end to `process` and the other to the core."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            failed = self._say(process, message, [theirs.fileno()])
            # Also when that failed: the core then sees the end of file.
            return self._say(core, core_message, [ours.fileno()]) or failed

    def _say(self, process: int, message: Message, fds: list[int] | None = None) -> Happened | None:
        child = self._children.get(process)
        if child is None:
            return None  # It could not be started; the machine was told.
        try:
            child.control.send(message, fds or [])
        except LinkClosed as error:
            return Happened(Event.EOF, process, str(error))
        except LinkError as error:
            return Happened(Event.BROKEN, process, str(error))
        self._watch_writing(process)
        return None

    def _order(self, process: int, message: Message) -> None:
        """A drill's word to a child, outside the actions of the lifecycle."""
        if failed := self._say(process, message):
            self._happened(failed)

    def _watch_writing(self, process: int) -> None:
        control = self._children[process].control
        if control in self._selector.get_map():
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if control.unsent_bytes else 0)
            self._selector.modify(control, mask, ("control", process))

    def _hurry(self) -> None:
        """Tell a standby that has taken the worker's place before it was prepared."""
        slot = self.lifecycle.worker
        child = self._children.get(slot.process or 0)
        waits = child is not None and child.role == "standby" and slot.state is State.STARTING
        if waits and slot.process != self._hurried:
            self._hurried = slot.process
            self._say(slot.process, {"type": "hurry"})

    def _count(self) -> None:
        """How many processes of each role are up, for /metrics."""
        for role in Role:
            up = State.PREPARED if role is Role.STANDBY else State.READY
            count = sum(s.role is role and s.state is up for s in self.lifecycle.slots)
            self._estate.metrics.set("processes_ready", count, labels=(str(role),))

    # --- the end ---

    def _forget(self, process: int) -> None:
        child = self._children.pop(process)
        self._first_ids.pop(process, None)
        for source in (child.control, child.pidfd):
            with contextlib.suppress(KeyError):
                self._selector.unregister(source)
        child.close()

    def _close(self) -> None:
        """Whatever happened: no process of ours is left, no descriptor, no handler."""
        for child in self._children.values():
            child.kill()
        for process, child in list(self._children.items()):
            if child.wait(FENCE_S) is None:
                print(f"holdfast: {child.title} (pid {child.pid}) cannot be ended", file=sys.stderr)
            else:
                self._forget(process)
        self._selector.close()
        self._estate.close()
