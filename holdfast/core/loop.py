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

from holdfast.core.clocks import StepClocks
from holdfast.core.replies import Output, framed
from holdfast.errors import LinkClosed, LinkError, WorkerFault
from holdfast.wire.copies import CopyAcks
from holdfast.wire.link import Frame, Kind, Link
from holdfast.wire.messages import ID_MAX, End, Memory, State, ToCore, decode_to_core
from holdfast.wire.plan import StepPlan, StepResult

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h; the supervisor starts a new core from the journal
# Messages taken from one api process in one tick. A Submit costs the brain some tens of
# microseconds, so a burst of thousands delays a running step by at most one or two milliseconds.
API_MESSAGES_A_TICK = 32
# Upper bound of one sleep, so that a missed wake-up costs a second and not the server.
SLEEP_S_MAX = 1.0
# A select that wakes so much later than asked, or a tick that takes so long, is time in which this
# process did not run: no clock of the worker's counts it.
LAPSE_S = 0.1


class BrainLike(Protocol):
    """What the loop needs of core.brain.Brain."""

    epoch: int

    @property
    def in_flight(self) -> int: ...
    @property
    def live(self) -> int: ...
    @property
    def next_deadline_s(self) -> float | None: ...
    @property
    def tokens_generated(self) -> int: ...
    def context_tokens(self, plan: StepPlan) -> int: ...
    def receive(self, api: int, message: ToCore, now_s: float) -> None: ...
    def plan(self, now_s: float) -> StepPlan | None: ...
    def commit(self, result: StepResult, now_s: float) -> None: ...
    def copied(self, acks: CopyAcks, now_s: float) -> None: ...
    def take_output(self) -> list[Output]: ...
    def new_epoch(
        self, epoch: int, now_s: float, *, implicates: bool = False, memory: Memory = Memory.LOST
    ) -> None: ...
    def weights_good(self, epoch: int, step: int) -> None: ...
    def suspend(self) -> None: ...
    def drop_api(self, api: int, now_s: float, before: int = ID_MAX) -> None: ...
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
        clocks: StepClocks | None = None,
        watch: Callable[[int | None], None] = lambda pid: None,
        reports: ReportsLike | None = None,
    ) -> None:
        """`spent` is told the seconds from a result read to the next plan sent, `watch` the pid of
        each new worker."""
        self.brain = brain
        self.clocks = clocks or StepClocks()
        self._watch_worker = watch
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
        self._looked_s = clock()
        # Of the last worker that came: epoch, requests that waited for it, tokens until then.
        self._resuming: tuple[int, int, int] | None = None
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
        events = {key.data: mask for key, mask in self._select(timeout_s)}
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
        self._watch_step()
        for index in sorted(self._apis):
            self._listen(index, ("api", index) in read)
        try:
            self.brain.expire(self._clock())
        except WorkerFault as error:
            self._lose_worker(str(error))
        self._launch()
        self._send_output()
        self._update_state()
        # After the state: who reads that streams go on finds the server ready.
        self._tell_resumed()
        self._tell_faults()
        self._watch_control()

    def _select(self, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """What is there; and how long this process did not run, by the way."""
        asked_s = self._clock()
        events = self._selector.select(timeout_s)
        now_s = self._clock()
        for lapse_s in (asked_s - self._looked_s, now_s - asked_s - timeout_s):
            if lapse_s > LAPSE_S:
                self.clocks.lapse(lapse_s)
        self._looked_s = now_s
        return events

    # --- the worker ---

    def _watch_step(self) -> None:
        """Give up a worker whose step takes too long, unless its result is there by now."""
        worker = self._worker
        if worker is None or not self.clocks.hung(self._clock()):
            return
        self._commit(worker)
        now_s = self._clock()
        if self._worker is worker and self.clocks.hung(now_s):
            seconds = now_s - self.clocks.started_s
            detail = f"no result for {seconds:.2f} s"
            self._lose_worker(detail, hung=True, since_s=self.clocks.started_s)

    def _commit(self, worker: _Peer) -> None:
        now_s = self._clock()
        try:
            for kind, payload in worker.link.drain():
                now_s = self._clock()
                if kind == Kind.COPIES:
                    self.brain.copied(CopyAcks.decode(payload), now_s)
                    continue
                if kind != Kind.RESULT:
                    raise LinkError(f"frame of kind {kind} from the worker")
                before = self.brain.in_flight
                self.brain.commit(StepResult.decode(payload), now_s)
                if self.brain.in_flight < before:
                    self.clocks.done(now_s)
        except LinkClosed as error:
            self._lose_worker(str(error), closed=True)
        except (LinkError, WorkerFault) as error:
            self._lose_worker(str(error), since_s=now_s)

    def _launch(self) -> None:
        """Send every plan that the brain gives: it stops at `steps_ahead` plans in flight."""
        while self._worker is not None:
            plan = self.brain.plan(self._clock())
            if plan is None:
                return
            self.clocks.sent(plan, self.brain.context_tokens(plan), self._clock())
            try:
                self._worker.link.send(Kind.PLAN, plan.encode())
            except LinkError as error:
                self._lose_worker(str(error), closed=isinstance(error, LinkClosed))
                return
            self._watch(self._worker)

    def _lose_worker(
        self,
        detail: str,
        *,
        hung: bool = False,
        closed: bool = False,
        since_s: float | None = None,
    ) -> None:
        """The epoch is over for us; the supervisor fences it and brings another worker. hung: its
        step, begun at `since_s`, took too long. closed: only its link's end was seen."""
        if self._worker is None:
            return
        epoch = self._worker.link.epoch
        self._unwatch(self._worker)
        self._worker = None
        self._worker_detail = f"the worker is being replaced: {detail}"
        self.brain.suspend()
        self.clocks.reset()
        self._resuming = None
        fault = {"type": "worker_fault", "epoch": epoch, "detail": detail, "hung": hung}
        self._report({**fault, "closed": closed, "since_s": since_s})
        if self._reports is not None:
            # Milliseconds at 256 rows, while the supervisor kills and fences.
            self._reports.lost(epoch, detail, self._clock(), hung=hung)

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
        for index, message in self.brain.take_output():
            self._send(index, *framed(message))

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
        elif self.clocks.late(self._clock()):
            ready, detail = False, "the worker takes long for its step"
        if self._state != (state := State(ready=ready, detail=detail)):
            self._state = state
            for index in sorted(self._apis):
                self._send(index, *framed(state))
        if self._draining and not self._drained and self.brain.live == 0:
            self._drained = True
            self._report({"type": "drained"})

    # --- the supervisor ---

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        """One control message; the table is in proc.child. Unknown ones are a protocol error."""
        kind, now_s = message.get("type"), self._clock()
        if kind == "worker":
            # Without a word of it nothing may be believed of the pages.
            memory = Memory(message.get("memory", Memory.LOST))
            self._new_worker(message["epoch"], memory, message.get("pid"), fds)
        elif kind == "weights_good":
            self.brain.weights_good(message["epoch"], message["step"])
        elif kind == "ping":
            self._report({"type": "pong"})
        elif kind == "worker_lost":
            if self._worker is not None and self._worker.link.epoch <= message["epoch"]:
                self._lose_worker(message["detail"])
            self._worker_detail = f"the worker is being replaced: {message['detail']}"
            self._implicates = message["implicates"]
            if self._reports is not None:
                self._reports.ended(message["detail"], implicates=self._implicates)
        elif kind == "api":
            self._new_api(message["index"], message["process"], message["first_id"], fds)
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

    def _new_worker(self, epoch: int, memory: Memory, pid: int | None, fds: list[int]) -> None:
        if self._worker is not None:
            raise LinkError(f"worker of epoch {epoch} while {self._worker.link.epoch} is here")
        link = Link(_socket_of(fds), epoch=epoch)
        self.clocks.reset()
        self._watch_worker(pid)
        now_s = self._clock()
        self.brain.new_epoch(epoch, now_s, implicates=self._implicates, memory=memory)
        self._implicates = False
        if self._reports is not None:
            self._reports.renewed(epoch)
        self._worker = self._register(link, ("worker", 0))
        self._resuming = (epoch, self.brain.live, self.brain.tokens_generated)

    def _tell_resumed(self) -> None:
        """The first new token of an epoch, or that nobody waits for one."""
        if self._resuming is None:
            return
        epoch, streams, tokens = self._resuming
        if self.brain.live and self.brain.tokens_generated == tokens:
            return
        self._resuming = None
        resumed = {"type": "resumed", "epoch": epoch, "streams": streams, "at_s": self._clock()}
        self._report(resumed)

    def _new_api(self, index: int, process: int, first_id: int, fds: list[int]) -> None:
        if index in self._apis:
            self._unwatch(self._apis.pop(index))
        # Nobody reads what an earlier process of this index asked for.
        self.brain.drop_api(index, self._clock(), first_id)
        self._apis[index] = self._register(Link(_socket_of(fds)), ("api", index))
        self._apis[index].process = process
        self._send(index, *framed(self._state))

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
        deadlines = (self.brain.next_deadline_s, self.clocks.deadline_s)
        deadline_s = min((at for at in deadlines if at is not None), default=None)
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


def _socket_of(fds: list[int]) -> socket.socket:
    if len(fds) != 1:
        for fd in fds:
            socket.close(fd)
        raise LinkError(f"{len(fds)} descriptors with a new link")
    return socket.socket(fileno=fds[0])
