"""The supervisor: the `serve` parent. It starts every process, watches, fences and replaces them.

What must outlive the others lies in its Estate; besides, it owns every Child and the ends of links
on their way to a new process. Home of the invariant "nothing of the old epoch
writes any more": a worker's epoch is over when its pidfd has fired, and only then is the next
worker started. Everything happens in one thread, in one select over pidfds, control channels and
signals; every state that waits has a deadline. Loads no torch.

    worker ends   core: worker_lost -> new worker over the keeper's memory, epoch + 1 -> its weights
                  verified by the keeper -> core: worker. Streams wait and go on.
    core ends     api: core_lost; the worker is ended too -> new core recovers from the journal
                  -> api: core; a new worker, epoch + 1.
    api ends      core: api_lost; its listening socket stays open -> new api process.
    keeper ends   the memory is gone: every stream ends with an engine fault, exit code 70.

    serving -> draining -> ending -> stopping -> over        (first signal; a second one: over)
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import LinkClosed, LinkError, OperatorError, require
from holdfast.proc import status
from holdfast.proc.child import Child, spawn
from holdfast.proc.control import Message
from holdfast.proc.estate import Estate
from holdfast.proc.options import ServeOptions
from holdfast.proc.slot import Slot, SlotState
from holdfast.wire.messages import End

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
_SLEEP_S_MAX = 1.0
# SIGKILL takes a process in milliseconds, one that holds tens of GiB in seconds. After this it
# hangs in the kernel and cannot be fenced.
FENCE_S = 20.0
# Between end of file on the control channel and SIGKILL: a process that exits by itself does it in
# milliseconds, and its own exit status says more.
DYING_S = 0.25
# After the last token: api processes send what clients have not taken; then the others have
# nothing to finish and only give back memory.
API_STOP_S = 10.0
STOP_S = 5.0
# The core ends what is live in one tick.
ENDING_S = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """What the CLI shows. kind: starting | progress | ready | lost | restarted | draining |
    stopped | warning | failed. done, total: bytes of `message` (progress only)."""

    kind: str
    title: str
    message: str = ""
    done: int = 0
    total: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


class Phase(enum.IntEnum):
    SERVING = 0
    DRAINING = 1
    ENDING = 2
    STOPPING = 3
    OVER = 4


class Supervisor:
    """`run` once, in the main thread. `modules` replaces the module of a role (tests)."""

    def __init__(
        self,
        options: ServeOptions,
        *,
        on_event: Callable[[Event], None] = lambda event: None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options
        self.port = options.port
        self.phase = Phase.SERVING
        self.epoch = 0
        self._on_event = on_event
        self._modules = dict(modules or {})
        self._keeper = Slot("keeper")
        self._core = Slot("core")
        self._worker = Slot("worker")
        self._apis = [Slot("api", index) for index in range(options.limits.api_processes)]
        self._slots = [self._keeper, self._core, *self._apis, self._worker]
        self._selector = selectors.DefaultSelector()
        self._core_link: socket.socket | None = None  # the core's end of the worker's link
        self._weights_held = False
        self._was_ready = False
        self._core_was_ready = False
        self._phase_deadline_s: float | None = None
        self._exit_code = 0
        self._error: OperatorError | None = None
        self._started_s = time.monotonic()

    def run(self) -> int:
        """Serve until a signal or the end of what can be served. Returns the exit code.

        Raises OperatorError (code 2: the options, the model, the memory) when it cannot start.
        """
        require(threading.current_thread() is threading.main_thread(), "run in the main thread")
        self._estate = Estate(self.options)
        self.port = self._estate.port
        try:
            self._watch(self._estate.wake, "signal")
            self._watch(self._estate.status, "status")
            self._tell("starting", "holdfast serve", f"{self.options.host}:{self.port}")
            self._start_keeper()
            self._start_core()
            for slot in self._apis:
                self._start_api(slot)
            while self.phase is not Phase.OVER:
                self._tick()
        finally:
            self._close()
        if self._error is not None:
            raise self._error
        if self._exit_code == 0:
            self._tell("stopped", "holdfast serve", "stopped")
        return self._exit_code

    def status(self) -> dict[str, Any]:
        """What `ps` shows. Never options: they may hold secrets."""
        now_s = time.monotonic()
        processes = [
            {
                "title": slot.title,
                "pid": None if slot.child is None else slot.child.pid,
                "state": str(slot.state),
                "since_s": round(now_s - slot.since_s, 3),
                "rss_bytes": 0 if slot.child is None else status.memory_bytes(slot.child.pid),
                "restarts": slot.restarts,
                "last_end": slot.detail,
                **({"epoch": self.epoch} if slot is self._worker else {}),
            }
            for slot in self._slots
        ]
        facts: dict[str, Any] = {
            "pid": os.getpid(),
            "title": self._estate.title,
            "host": self.options.host,
            "port": self.port,
            "model": self.options.served_name,
            "phase": self.phase.name.lower(),
            "ready": self._all_ready(),
            "epoch": self.epoch,
            "uptime_s": round(now_s - self._started_s, 3),
            "rss_bytes": status.memory_bytes(os.getpid()),
            "processes": processes,
        }
        if (copy := self._estate.copy) is not None:
            facts["journal_copy"] = {"bytes": copy.bytes_written, "errors": copy.errors}
        return facts

    # --- start ---

    def _start(
        self,
        slot: Slot,
        config: dict[str, Any],
        fds: dict[str, int],
        env: dict[str, str] | None = None,
    ) -> None:
        module = self._modules.get(slot.role, f"holdfast.proc.{slot.role}")
        try:
            child = spawn(slot.role, slot.index, module=module, config=config, fds=fds, env=env)
        except OSError as error:
            self._give_up(f"{slot.title} cannot be started: {error.strerror}")
            return
        now_s = time.monotonic()
        slot.started(child, now_s, now_s + self.options.start_timeout_s)
        self._watch(child.control, "control", slot)
        self._watch(child.pidfd, "pidfd", slot)
        self._tell("starting", slot.title, "starting")

    def _watch(self, source: Any, kind: str, slot: Slot | None = None) -> None:
        child = None if slot is None else slot.child
        self._selector.register(source, selectors.EVENT_READ, (kind, slot, child))

    def _start_keeper(self) -> None:
        self._start(self._keeper, self.options.keeper_config(), {})

    def _start_worker(self) -> None:
        """A worker of the next epoch. The pidfd of the one before has fired: it is fenced."""
        require(self._worker.child is None, "a worker is started beside another")
        self.epoch += 1
        self._estate.metrics.set("worker_epoch", self.epoch)
        self._drop_core_link()
        self._core_link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            config = self.options.worker_config(self.epoch, loaded=self._weights_held)
            fds = {name: self._estate.fds[name] for name in ("weights", "pool")}
            threads = str(self.options.threads)
            env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
            self._start(self._worker, config, {**fds, "core": theirs.fileno()}, env)

    def _start_core(self) -> None:
        config = self.options.core_config(max(1, self.epoch), recover=self._core_was_ready)
        fds = {name: self._estate.fds[name] for name in ("journal", "metrics")}
        self._start(self._core, config, fds)
        for slot in self._apis:
            if slot.alive:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                with ours, theirs:
                    self._introduce(slot, ours)
                    self._say(slot, {"type": "core"}, [theirs.fileno()])
        self._connect_worker()

    def _start_api(self, slot: Slot) -> None:
        """An api process with its link to the core; without a core that link is closed at once."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            fds = {
                "core": theirs.fileno(),
                "listen": self._estate.listeners[slot.index].fileno(),
                "metrics": self._estate.fds["metrics"],
            }
            slot.fresh = True
            self._start(slot, self.options.api_config(), fds)
            self._introduce(slot, ours)
        if self.phase is Phase.DRAINING:
            self._say(slot, {"type": "drain"})

    def _introduce(self, slot: Slot, link: socket.socket) -> None:
        """Give the core its end of the link to this api process."""
        message = {"type": "api", "index": slot.index, "fresh": slot.fresh}
        self._say(self._core, message, [link.fileno()])
        if self._core.state is SlotState.READY:
            slot.fresh = False

    def _connect_worker(self) -> None:
        """Give the core its end of the worker's link, once both are there."""
        if self._core_link is None or self._worker.state is not SlotState.READY:
            return
        if self._core.alive:
            message = {"type": "worker", "epoch": self.epoch}
            self._say(self._core, message, [self._core_link.fileno()])
            self._drop_core_link()

    def _drop_core_link(self) -> None:
        if self._core_link is not None:
            self._core_link.close()
            self._core_link = None

    # --- the loop ---

    def _tick(self) -> None:
        events = [(key.data, mask) for key, mask in self._selector.select(self._sleep_s())]
        # Words before deaths: a process's last message says why it ended.
        order = ("signal", "status", "control", "pidfd")
        events.sort(key=lambda event: order.index(event[0][0]))
        for (kind, slot, child), mask in events:
            if kind == "status":
                self._estate.status.answer(self.status())
            elif kind == "signal":
                with contextlib.suppress(BlockingIOError):
                    self._estate.wake.recv(4096)
            elif slot.child is not child:
                continue  # Replaced by an earlier event of this tick.
            elif kind == "control":
                self._control(slot, mask)
            else:
                self._exited(slot)
        while self._estate.signals:
            self._signalled(self._estate.signals.popleft())
        while self._estate.warnings:
            self._tell("warning", "holdfast serve", self._estate.warnings.popleft())
        self._look_at_clock()

    def _sleep_s(self) -> float:
        times = [at for slot in self._slots if (at := slot.next_s()) is not None]
        if self._phase_deadline_s is not None:
            times.append(self._phase_deadline_s)
        until_s = min(times) - time.monotonic() if times else _SLEEP_S_MAX
        return min(_SLEEP_S_MAX, max(0.0, until_s))

    def _look_at_clock(self) -> None:
        now_s = time.monotonic()
        for slot in self._slots:
            if slot.deadline_s is not None and now_s >= slot.deadline_s:
                self._too_late(slot)
            if slot.spawn_s is not None and now_s >= slot.spawn_s:
                self._respawn(slot)
        if self._phase_deadline_s is not None and now_s >= self._phase_deadline_s:
            self._phase_deadline_s = None
            if self.phase is Phase.DRAINING:
                seconds = f"{self.options.drain_timeout_s:g} s"
                self._end_streams(End.SHUTDOWN, f"the server shut down after {seconds}")
            elif self.phase is Phase.ENDING:
                self._stop()

    def _too_late(self, slot: Slot) -> None:
        if slot.state is SlotState.STARTING:
            seconds = f"{self.options.start_timeout_s:g} s"
            self._end_process(slot, f"it said nothing for {seconds} while starting")
        elif not slot.killed:
            self._end_process(slot, "it did not end in time")
        else:
            # A process that SIGKILL does not end may still write: nothing may be started over it.
            slot.deadline_s = None
            self._exit_code = EXIT_FAULT
            self._tell("failed", slot.title, f"SIGKILL did not end it within {FENCE_S:g} s")
            self.phase = Phase.OVER

    def _respawn(self, slot: Slot) -> None:
        slot.spawn_s = None
        if self.phase > Phase.DRAINING:
            slot.enter(SlotState.GONE, time.monotonic())
        elif slot is self._worker:
            self._start_worker()
        elif slot is self._core:
            self._start_core()
        else:
            self._start_api(slot)

    # --- what children say ---

    def _say(self, slot: Slot, message: Message, fds: list[int] | None = None) -> None:
        """Send to a child that is there; one that does not read its control channel is ended."""
        if slot.child is None or slot.state not in (SlotState.STARTING, SlotState.READY):
            return
        try:
            slot.child.control.send(message, fds or [])
        except LinkError as error:
            self._end_process(slot, str(error))
            return
        self._watch_writing(slot)

    def _watch_writing(self, slot: Slot) -> None:
        assert slot.child is not None
        control = slot.child.control
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if control.unsent_bytes else 0)
        self._selector.modify(control, mask, ("control", slot, slot.child))

    def _control(self, slot: Slot, mask: int) -> None:
        child = slot.child
        assert child is not None
        try:
            if mask & selectors.EVENT_WRITE:
                child.control.flush()
                self._watch_writing(slot)
            if mask & selectors.EVENT_READ:
                for message, fds in child.control.receive():
                    self._heard(slot, message, fds)
        except (LinkError, LookupError, TypeError, ValueError) as error:
            self._selector.unregister(child.control)
            if slot.alive and isinstance(error, LinkClosed):
                # It is dying: its pidfd fires in a moment, with how it ended.
                slot.reason = str(error)
                now_s = time.monotonic()
                slot.enter(SlotState.ENDING, now_s, now_s + DYING_S)
            elif slot.alive:
                self._end_process(slot, f"it speaks nonsense: {error!r}")

    def _heard(self, slot: Slot, message: Message, fds: list[int]) -> None:
        kind = message["type"]
        if kind == "ready":
            self._ready(slot, message, fds)
        elif kind == "progress":
            if slot.state is SlotState.STARTING:
                slot.deadline_s = time.monotonic() + self.options.start_timeout_s
            facts = {"done": message["done"], "total": message["total"]}
            self._on_event(Event("progress", slot.title, message["what"], **facts))
        elif kind == "fault":
            slot.fault, slot.operator = message["message"], message["operator"]
            # It exits now, or is made to.
            slot.enter(SlotState.ENDING, time.monotonic(), time.monotonic() + STOP_S)
        elif kind == "weights" and slot is self._keeper:
            self._judged(message["epoch"], held=message["ok"])
        elif kind == "drained" and slot is self._core:
            if self.phase in (Phase.DRAINING, Phase.ENDING):
                self._stop()
        elif kind == "worker_fault" and slot is self._core:
            if message["epoch"] == self.epoch and self._worker.alive:
                self._end_process(self._worker, message["detail"])
        elif kind == "api_fault" and slot is self._core:
            self._end_process(self._apis[message["index"]], message["detail"])
        else:
            raise LinkError(f"unknown message {kind!r}")

    def _ready(self, slot: Slot, message: Message, fds: list[int]) -> None:
        if slot.state is not SlotState.STARTING:
            return  # It is being ended.
        if slot is self._worker:
            # Not ready before the keeper has compared what it found in the slab.
            loaded = self._weights_held
            facts = {"epoch": self.epoch, "sum": message["weights_sum"], "loaded": loaded}
            self._say(self._keeper, {"type": "weights_sum", **facts})
            return
        slot.enter(SlotState.READY, time.monotonic())
        if slot is self._keeper:
            self._estate.take(dict(zip(("weights", "pool"), fds, strict=True)))
            self._start_worker()
        elif slot is self._core:
            self._core_was_ready = True
            for api in self._apis:
                api.fresh = api.fresh and not api.alive
            if self.phase is Phase.DRAINING:
                self._say(slot, {"type": "drain"})
        self._came_up(slot, {k: v for k, v in message.items() if k != "type"})

    def _judged(self, epoch: int, *, held: bool) -> None:
        """The keeper has compared the weights that the worker of `epoch` found."""
        if epoch != self.epoch or self._worker.state is not SlotState.STARTING:
            return
        self._weights_held = held
        if not held:
            self._say(self._keeper, {"type": "weights_forget"})
            self._end_process(self._worker, "the weights are not the bytes that were loaded")
            return
        self._worker.enter(SlotState.READY, time.monotonic())
        self._connect_worker()
        self._came_up(self._worker, {"epoch": epoch})

    def _came_up(self, slot: Slot, facts: dict[str, Any]) -> None:
        if self._was_ready:
            self._on_event(Event("restarted", slot.title, slot.detail, facts=facts))
        elif self._all_ready():
            self._was_ready = True
            facts = {"host": self.options.host, "port": self.port}
            self._on_event(Event("ready", "holdfast serve", facts=facts))

    def _all_ready(self) -> bool:
        return all(slot.state is SlotState.READY for slot in self._slots)

    # --- ends of processes ---

    def _end_process(self, slot: Slot, reason: str, *, blameless: bool = False) -> None:
        """SIGKILL; what follows happens when its pidfd fires (`_exited`), the fence."""
        if slot.child is None:
            return
        slot.reason = slot.reason or reason
        slot.killed = True
        slot.blameless = slot.blameless or blameless
        slot.child.kill()
        now_s = time.monotonic()
        slot.enter(SlotState.ENDING, now_s, now_s + FENCE_S)

    def _exited(self, slot: Slot) -> None:
        child = slot.child
        assert child is not None
        code = child.wait(1.0)
        if code is None:
            return  # Not gone after all: the pidfd stays readable and is looked at again.
        self._last_words(slot, child)
        self._forget(child)
        slot.ended(code, time.monotonic())
        if self.phase >= Phase.STOPPING:
            self._stop_next()
            return
        if slot.operator and not self._was_ready:
            self._error = OperatorError(slot.fault)
            self.phase = Phase.OVER
            return
        self._tell("lost", slot.title, slot.detail)
        if slot is self._keeper:
            self._give_up(f"the keeper ended ({slot.detail}) and its memory with it")
            return
        if slot is self._worker:
            self._drop_core_link()
            lost = {"type": "worker_lost", "epoch": self.epoch, "detail": slot.detail}
            self._say(self._core, lost)
        elif slot is self._core:
            for api in self._apis:
                self._say(api, {"type": "core_lost", "detail": slot.detail})
            if self.phase is Phase.ENDING:
                self._stop()
                return
            if self._core_link is None:
                # What the worker has in flight belongs to a brain that is gone.
                self._end_process(self._worker, "its core ended", blameless=True)
        else:
            self._say(self._core, {"type": "api_lost", "index": slot.index})
        self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        if self.phase > Phase.DRAINING:
            return
        limit = self.options.restarts_per_minute
        if slot.may_restart(time.monotonic(), limit):
            self._estate.metrics.add("process_restarts_total", labels=(slot.role,))
        else:
            self._give_up(f"{slot.title} ended {limit + 1} times in a minute; last: {slot.detail}")

    def _last_words(self, slot: Slot, child: Child) -> None:
        """A fault that was sent just before the end."""
        with contextlib.suppress(LinkError, KeyError):
            for message, fds in child.control.receive():
                for fd in fds:
                    os.close(fd)
                if message["type"] == "fault":
                    slot.fault, slot.operator = message["message"], message["operator"]

    def _forget(self, child: Child) -> None:
        for source in (child.control, child.pidfd):
            with contextlib.suppress(KeyError):
                self._selector.unregister(source)
        child.close()

    # --- the end ---

    def _signalled(self, number: int) -> None:
        if self.phase is not Phase.SERVING or not self._was_ready:
            self._exit_code = 128 + number
            self.phase = Phase.OVER
        else:
            self._drain(signal.Signals(number).name)

    def _drain(self, why: str) -> None:
        self.phase = Phase.DRAINING
        self._phase_deadline_s = time.monotonic() + self.options.drain_timeout_s
        message = f"{why}: streams have {self.options.drain_timeout_s:g} s to end"
        self._tell("draining", "holdfast serve", message)
        for slot in (*self._apis, self._core):
            self._say(slot, {"type": "drain"})

    def _end_streams(self, end: End, message: str) -> None:
        """End what is live with `end`, then stop; without a core there is nobody to end it."""
        self.phase = Phase.ENDING
        if not self._core.alive:
            self._stop()
            return
        self._phase_deadline_s = time.monotonic() + ENDING_S
        # After drain the core says `drained` once nothing is live.
        self._say(self._core, {"type": "drain"})
        self._say(self._core, {"type": "end_all", "end": int(end), "message": message})

    def _give_up(self, message: str) -> None:
        if self.phase >= Phase.ENDING:
            return
        self._exit_code = EXIT_FAULT
        self._tell("failed", "holdfast serve", message)
        if not self._was_ready:
            self.phase = Phase.OVER
            return
        for slot in self._apis:
            self._say(slot, {"type": "drain"})
        self._end_streams(End.ENGINE_FAULT, f"the server cannot go on: {message}")

    def _stop(self) -> None:
        """Stop processes, api first: they still send; the others then have nobody to serve."""
        self.phase = Phase.STOPPING
        self._phase_deadline_s = None
        self._estate.stop_listening()
        for slot in self._slots:
            slot.spawn_s = None
        self._stop_next()

    def _stop_next(self) -> None:
        """Tell the next ones to stop, or be over; called again at each end of a process."""
        now_s = time.monotonic()
        others = [self._core, self._worker, self._keeper]
        for group, seconds in ((self._apis, API_STOP_S), (others, STOP_S)):
            for slot in group:
                if slot.alive:
                    self._say(slot, {"type": "stop"})
                if slot.alive:
                    slot.enter(SlotState.ENDING, now_s, now_s + seconds)
            if any(slot.child is not None for slot in group):
                return
        self.phase = Phase.OVER

    def _close(self) -> None:
        """Whatever happened: no process of ours is left, no descriptor, no handler."""
        children = [slot.child for slot in self._slots if slot.child is not None]
        for child in children:
            child.kill()
        for child in children:
            if child.wait(FENCE_S) is None:
                print(f"holdfast: {child.title} (pid {child.pid}) cannot be ended", file=sys.stderr)
            else:
                self._forget(child)
        for slot in self._slots:
            slot.child = None
        self._drop_core_link()
        self._selector.close()
        self._estate.close()

    def _tell(self, kind: str, title: str, message: str) -> None:
        self._on_event(Event(kind, title, message))
