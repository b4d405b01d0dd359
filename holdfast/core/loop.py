"""CoreLoop: the one thread that carries frames between the brain and its peers.

Owns the core's links (one worker, one an api process, the supervisor's control channel) and the
order of a tick; decides nothing about requests, which is the brain's. Invariants: results reach the
brain in the order the worker sent them; output leaves only after the brain returned it, hence after
the journal has it; a peer that breaks the protocol or does not read loses its own link and nobody
else's. It sleeps in one `select` until an event or the brain's next deadline.

Run by proc.core. It knows frames and clocks; it must not know processes, rows or pages.

    tick:  select -> control -> results (commit) -> plan, send -> api messages -> expire
           -> plan, send -> output -> state
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from holdfast.errors import LinkClosed, LinkError, WorkerFault
from holdfast.wire.copies import CopyAcks
from holdfast.wire.link import Frame, Kind, Link
from holdfast.wire.messages import End, State, ToCore, decode_to_core, encode
from holdfast.wire.plan import StepPlan, StepResult

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h; the supervisor starts a new core from the journal
# Messages taken from one api process in one tick. A Submit costs the brain some tens of
# microseconds, so a burst of thousands delays a running step by at most one or two milliseconds.
API_MESSAGES_A_TICK = 32
# Upper bound of one sleep, so that a missed wake-up costs a second and not the server.
SLEEP_S_MAX = 1.0
# A step that is not back after so long makes the server not ready (a CPU step of a large model
# takes seconds); whether it is hung is the supervisor's to decide.
STEP_S_READY = 30.0


class BrainLike(Protocol):
    """What the loop needs of core.brain.Brain."""

    epoch: int

    @property
    def in_flight(self) -> int: ...
    @property
    def live(self) -> int: ...
    @property
    def next_deadline_s(self) -> float | None: ...
    def receive(self, api: int, message: ToCore, now_s: float) -> None: ...
    def plan(self, now_s: float) -> StepPlan | None: ...
    def commit(self, result: StepResult, now_s: float) -> None: ...
    def copied(self, acks: CopyAcks, now_s: float) -> None: ...
    def take_output(self) -> list[tuple[int, int, bytes]]: ...
    def new_epoch(self, epoch: int, now_s: float, *, implicates: bool = False) -> None: ...
    def suspend(self) -> None: ...
    def drop_api(self, api: int, now_s: float) -> None: ...
    def drain(self) -> None: ...
    def expire(self, now_s: float) -> None: ...
    def end_all(self, end: End, message: str, now_s: float) -> None: ...


class ReportsLike(Protocol):
    """What the loop needs of core.report.FaultReports."""

    def lost(self, epoch: int, detail: str, now_s: float, *, hung: bool = False) -> None: ...
    def ended(self, detail: str, *, implicates: bool) -> None: ...
    def renewed(self, epoch: int) -> None: ...
    def take(self, now_s: float, *, last: bool = False) -> list[dict[str, Any]]: ...


class ControlLike(Protocol):
    """What the loop needs of proc.control.Control."""

    @property
    def unsent_bytes(self) -> int: ...
    def fileno(self) -> int: ...
    def send(self, message: dict[str, Any]) -> None: ...
    def flush(self) -> bool: ...
    def receive(self) -> list[tuple[dict[str, Any], list[int]]]: ...


@dataclass(slots=True)
class _Peer:
    """A link under the selector. `inbox`: frames read and not yet handled (api links only).
    process: the supervisor's number of an api process, so that a fault is not laid to the next."""

    link: Link
    key: tuple[str, int]
    process: int = 0
    writing: bool = False
    inbox: deque[Frame] = field(default_factory=deque)


class CoreLoop:
    """`run` returns the exit code of the core process."""

    def __init__(
        self,
        brain: BrainLike,
        control: ControlLike,
        *,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[float], None] = lambda seconds: None,
        reports: ReportsLike | None = None,
    ) -> None:
        """`spent` is told the seconds from a result read to the next plan sent."""
        self.brain = brain
        self._spent = spent
        self._reports = reports
        self._control = control
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, ("control", 0))
        self._control_writing = False
        self._worker: _Peer | None = None
        self._apis: dict[int, _Peer] = {}
        self._state = State(ready=False, detail="the worker is starting")
        self._worker_detail = "the worker is starting"
        self._implicates = False
        self._step_s = clock()
        self._draining = False
        self._drained = False
        self._stopping = False

    def run(self) -> int:
        """Tick until the supervisor says stop (0), is gone, or a tick fails (70)."""
        try:
            while not self._stopping:
                self.tick(self._sleep_s())
            return 0
        except LinkClosed:
            return EXIT_FAULT  # Control only: the supervisor is gone, and we with it.
        except Exception as error:
            # Never continue after a failed tick: the brain may be half changed. The journal is not.
            traceback.print_exc()
            print(f"holdfast core: {self._dump()}", file=sys.stderr, flush=True)
            self._report({"type": "fault", "operator": False, "message": f"core: {error!r}"})
            return EXIT_FAULT
        finally:
            self._close()

    def tick(self, timeout_s: float) -> None:
        """Wait for events at most `timeout_s`, then handle all that is there, in a fixed order."""
        events = {key.data: mask for key, mask in self._selector.select(timeout_s)}
        read = {data for data, mask in events.items() if mask & selectors.EVENT_READ}
        for data, mask in sorted(events.items()):
            if mask & selectors.EVENT_WRITE:
                self._flush(data)
        if ("control", 0) in read:
            for message, fds in self._control.receive():
                self._obey(message, fds)
        if ("worker", 0) in read and self._worker is not None:
            started_s = self._clock()
            self._commit(self._worker)
            self._launch()
            self._spent(self._clock() - started_s)
        for index in sorted(self._apis):
            self._listen(index, ("api", index) in read)
        try:
            self.brain.expire(self._clock())
        except WorkerFault as error:
            self._lose_worker(str(error))
        self._launch()
        self._send_output()
        self._update_state()
        self._tell_faults()
        self._watch_control()

    # --- the worker ---

    def _commit(self, worker: _Peer) -> None:
        try:
            for kind, payload in worker.link.drain():
                now_s = self._clock()
                if kind == Kind.COPIES:
                    self.brain.copied(CopyAcks.decode(payload), now_s)
                    continue
                if kind != Kind.RESULT:
                    raise LinkError(f"frame of kind {kind} from the worker")
                self.brain.commit(StepResult.decode(payload), now_s)
                self._step_s = now_s
        except (LinkError, WorkerFault) as error:
            self._lose_worker(str(error))

    def _launch(self) -> None:
        """Send every plan that the brain gives: it stops at `steps_ahead` plans in flight."""
        while self._worker is not None:
            if self.brain.in_flight == 0:
                self._step_s = self._clock()
            plan = self.brain.plan(self._clock())
            if plan is None:
                return
            try:
                self._worker.link.send(Kind.PLAN, plan.encode())
            except LinkError as error:
                self._lose_worker(str(error))
                return
            self._watch(self._worker)

    def _lose_worker(self, detail: str) -> None:
        """The epoch is over for us; the supervisor fences it and brings another worker."""
        if self._worker is None:
            return
        epoch = self._worker.link.epoch
        self._unwatch(self._worker)
        self._worker = None
        self._worker_detail = f"the worker is being replaced: {detail}"
        self.brain.suspend()
        self._report({"type": "worker_fault", "epoch": epoch, "detail": detail})
        if self._reports is not None:
            # Milliseconds at 256 rows, while the supervisor kills and fences.
            self._reports.lost(epoch, detail, self._clock())

    # --- api processes ---

    def _listen(self, index: int, readable: bool) -> None:
        peer = self._apis[index]
        try:
            # Not before the last read is used up: the socket's buffer bounds what waits here.
            if readable and not peer.inbox:
                peer.inbox.extend(peer.link.drain())
            for _ in range(min(API_MESSAGES_A_TICK, len(peer.inbox))):
                kind, payload = peer.inbox.popleft()
                if kind != Kind.MESSAGE:
                    raise LinkError(f"frame of kind {kind} from an api process")
                self.brain.receive(index, decode_to_core(payload), self._clock())
        except (LinkError, msgspec.DecodeError) as error:
            self._lose_api(index, str(error))

    def _lose_api(self, index: int, detail: str) -> None:
        """Its requests have no reader any more; the supervisor replaces the process."""
        peer = self._apis.pop(index)
        self._unwatch(peer)
        self.brain.drop_api(index, self._clock())
        fault = {"type": "api_fault", "index": index, "process": peer.process, "detail": detail}
        self._report(fault)

    def _send_output(self) -> None:
        for index, kind, payload in self.brain.take_output():
            self._send(index, kind, payload)

    def _send(self, index: int, kind: int, payload: bytes) -> None:
        peer = self._apis.get(index)
        if peer is None:
            return  # It died in this tick; its requests are dropped.
        try:
            peer.link.send(kind, payload)
        except LinkError as error:
            self._lose_api(index, str(error))
            return
        self._watch(peer)

    def _update_state(self) -> None:
        ready, detail = True, "ready"
        if self._worker is None:
            ready, detail = False, self._worker_detail
        elif self._draining:
            ready, detail = False, "the server is shutting down"
        elif self.brain.in_flight and self._clock() - self._step_s > STEP_S_READY:
            ready, detail = False, f"no step finished for {STEP_S_READY:.0f} s"
        if self._state != (state := State(ready=ready, detail=detail)):
            self._state = state
            for index in sorted(self._apis):
                self._send(index, Kind.MESSAGE, encode(state))
        if self._draining and not self._drained and self.brain.live == 0:
            self._drained = True
            self._report({"type": "drained"})

    # --- the supervisor ---

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        """One control message; the table is in proc.child. Unknown ones are a protocol error."""
        kind, now_s = message.get("type"), self._clock()
        if kind == "worker":
            self._new_worker(message["epoch"], fds)
        elif kind == "worker_lost":
            if self._worker is not None and self._worker.link.epoch <= message["epoch"]:
                self._lose_worker(message["detail"])
            self._worker_detail = f"the worker is being replaced: {message['detail']}"
            self._implicates = _implicates(message)
            if self._reports is not None:
                self._reports.ended(message["detail"], implicates=self._implicates)
        elif kind == "api":
            self._new_api(message["index"], message["process"], fresh=message["fresh"], fds=fds)
        elif kind == "api_lost":
            if message["index"] in self._apis:
                self._lose_api(message["index"], "the process ended")
            else:
                self.brain.drop_api(message["index"], now_s)
        elif kind == "drain":
            self._draining = True
            self.brain.drain()
        elif kind == "end_all":
            self.brain.end_all(End(message["end"]), message["message"], now_s)
        elif kind == "stop":
            self._stopping = True
            self._tell_faults(last=True)
        else:
            raise LinkError(f"control message {kind!r} from the supervisor")

    def _new_worker(self, epoch: int, fds: list[int]) -> None:
        if self._worker is not None:
            raise LinkError(f"worker of epoch {epoch} while {self._worker.link.epoch} is here")
        link = Link(_socket_of(fds), epoch=epoch)
        self.brain.new_epoch(epoch, self._clock(), implicates=self._implicates)
        self._implicates = False
        if self._reports is not None:
            self._reports.renewed(epoch)
        self._worker = self._register(link, ("worker", 0))
        self._step_s = self._clock()

    def _new_api(self, index: int, process: int, *, fresh: bool, fds: list[int]) -> None:
        if index in self._apis:
            self._unwatch(self._apis.pop(index))
        if fresh:
            # Nobody reads what an earlier process of this index asked for.
            self.brain.drop_api(index, self._clock())
        self._apis[index] = self._register(Link(_socket_of(fds)), ("api", index))
        self._apis[index].process = process
        self._send(index, Kind.MESSAGE, encode(self._state))

    def _tell_faults(self, *, last: bool = False) -> None:
        """Hand over what is to be told of faults; the supervisor writes it."""
        if self._reports is not None:
            for report in self._reports.take(self._clock(), last=last):
                self._report({"type": "fault_report", "report": report})

    def _report(self, message: dict[str, Any]) -> None:
        """To the supervisor; a dead one is noticed when control is next read."""
        try:
            self._control.send(message)
        except LinkError as error:
            print(f"holdfast core: cannot report {str(message)[:500]}: {error}", file=sys.stderr)

    # --- the selector ---

    def _sleep_s(self) -> float:
        """Until the next deadline of the brain; zero while an inbox still holds messages."""
        if any(peer.inbox for peer in self._apis.values()):
            return 0.0
        deadline_s = self.brain.next_deadline_s
        if deadline_s is None:
            return SLEEP_S_MAX
        return min(SLEEP_S_MAX, max(0.0, deadline_s - self._clock()))

    def _register(self, link: Link, key: tuple[str, int]) -> _Peer:
        self._selector.register(link, selectors.EVENT_READ, key)
        return _Peer(link, key)

    def _watch(self, peer: _Peer) -> None:
        """Ask for writability while, and only while, bytes wait that the peer has not taken."""
        writing = peer.link.unsent_bytes > 0
        if writing != peer.writing:
            peer.writing = writing
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(peer.link, mask, peer.key)

    def _unwatch(self, peer: _Peer) -> None:
        self._selector.unregister(peer.link)
        peer.link.close()

    def _watch_control(self) -> None:
        writing = self._control.unsent_bytes > 0
        if writing != self._control_writing:
            self._control_writing = writing
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(self._control, mask, ("control", 0))

    def _flush(self, key: tuple[str, int]) -> None:
        role, index = key
        if role == "control":
            self._control.flush()
            return
        peer = self._worker if role == "worker" else self._apis.get(index)
        if peer is None:
            return
        try:
            peer.link.flush()
        except LinkClosed as error:
            if role == "worker":
                self._lose_worker(str(error))
            else:
                self._lose_api(index, str(error))
            return
        self._watch(peer)

    def _dump(self) -> str:
        facts = {
            "epoch": self.brain.epoch,
            "in_flight": self.brain.in_flight,
            "live": self.brain.live,
            "apis": sorted(self._apis),
            "worker": None if self._worker is None else self._worker.link.epoch,
            "draining": self._draining,
        }
        return ", ".join(f"{name}={value}" for name, value in facts.items())

    def _close(self) -> None:
        """Send what can be sent at once, then give up every link: to the peers that is our end."""
        for peer in [*self._apis.values(), *([self._worker] if self._worker else [])]:
            try:
                peer.link.flush_until(1.0)
            except LinkError as error:
                print(f"holdfast core: {peer.key}: {error}", file=sys.stderr)
            peer.link.close()
        self._selector.close()


def _implicates(lost: dict[str, Any]) -> bool:
    """Whether a lost worker faulted by itself, so that what it computed may be the cause.

    The supervisor says so when it knows. Else SIGKILL is somebody's hand: a human's, the kernel's
    for want of memory, or the supervisor's own, because we could not believe the worker.
    """
    return lost.get("implicates", not lost["detail"].startswith("killed by SIGKILL"))


def _socket_of(fds: list[int]) -> socket.socket:
    if len(fds) != 1:
        for fd in fds:
            socket.close(fd)
        raise LinkError(f"{len(fds)} descriptors with a new link")
    return socket.socket(fileno=fds[0])
