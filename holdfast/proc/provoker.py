"""Provoker: how a drill breaks a server that was started with `--drills`. Nothing else may.

Orders come over the supervisor's status socket, hence from its own user, never over HTTP. What is a
signal or a changed byte the supervisor does itself, by its own children's pidfds; what must happen
inside a step goes to the worker (device.provoke). Owns the orders that outlive a worker and the
moments of what happened since. It decides nothing about recovery. No torch.

    {"do": "signal", "signal": "SIGKILL", "roles": ["worker 0", ...]}
    {"do": "fault", "to": "worker" | "standby", "kind": KIND, "phase": PHASE, ...}
        "standing": true: also to every worker that is promoted later
    {"do": "fault", "to": "next", ...}      to the next worker or standby that is started
    {"do": "corrupt-weights", "kill": true | false}
    {"do": "hurry"}                         a standby that prepares itself rests no more
    {"do": "tell"}                          the worker says what it has counted: the moment `told`
    {"do": "forget"}                        no order stands any more

The answer has "at_s" of the monotonic clock, or "error".
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from holdfast.cuda_driver import parse_device
from holdfast.proc.child import Child, module_command, module_environment
from holdfast.proc.control import Message
from holdfast.proc.lifecycle.machine import Lifecycle
from holdfast.proc.lifecycle.states import Event, Role

MOMENTS_MAX = 512
STANDING_MAX = 16
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGCONT", "SIGSEGV", "SIGILL")
REFUSAL = "this server was not started with --drills: nothing can be provoked in it"
# The sign of one number in every eight bytes: half of all in float32, a quarter in bfloat16. Every
# number stays finite, and nearly every token is another one. (One in a page of 4,096 bytes moved no
# answer in bfloat16: at most one of 48 tokens lay beyond rounding.)
_FLIP_EVERY_BYTES = 8
_SIGN_FLIPPED = bytes(byte ^ 0x80 for byte in range(256))
# A context, and two copies of the weights over the bus.
_FLIP_S = 60.0

# What a watch over pages says beside the moment (device.provoke_graphs).
_SEEN = ("rows", "free", "stray")

Say = Callable[[int, Message], None]


class Provoker:
    """`children` are the supervisor's, by number; `say` sends a control message to one of them."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        children: Mapping[int, Child],
        say: Say,
        *,
        device: str = "cpu",
        weights_bytes: int = 0,
    ) -> None:
        """device, weights_bytes: where the weights lie, and how many bytes they are."""
        self._lifecycle = lifecycle
        self._device = device
        self._weights_bytes = weights_bytes
        self._children = children
        self._say = say
        self._standing: list[Message] = []
        self._next: Message | None = None
        self._moments: deque[dict[str, Any]] = deque(maxlen=MOMENTS_MAX)

    def obey(self, order: Any, weights_fd: int | None) -> dict[str, Any]:
        """Do what a drill asks. An order that makes no sense changes nothing and is told so."""
        try:
            match order["do"]:
                case "signal":
                    self._signal(order["signal"], order["roles"])
                case "fault":
                    self._fault(dict(order))
                case "corrupt-weights":
                    self._corrupt_weights(weights_fd, kill=order["kill"])
                case "hurry":
                    self._say(self._number("standby 0"), {"type": "hurry"})
                case "tell":
                    self._say(self._number("worker 0"), {"type": "tell"})
                case "forget":
                    self._standing.clear()
                    self._next = None
                case other:
                    raise ValueError(f"nothing is called {other!r}")
        except (KeyError, TypeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"at_s": time.monotonic()}

    @property
    def moments(self) -> list[dict[str, Any]]:
        """What happened to processes, oldest first: event, title, at_s of the monotonic clock."""
        return list(self._moments)

    def saw(self, event: Event, process: int) -> None:
        """An event of a process, before anything is done about it."""
        slot = self._lifecycle.slot_of(process)
        if slot is not None and event in (Event.FAULT, Event.EOF, Event.EXITED, Event.ACCUSED):
            self._note(str(event), slot.title)

    def provoked(self, process: int, message: Message) -> None:
        """A worker's word: it does it now, or this is what it saw."""
        slot = self._lifecycle.slot_of(process)
        title = "" if slot is None else slot.title
        seen = {name: message[name] for name in _SEEN if name in message}
        self._note("provoked", title, at_s=message["at_s"], kind=message["kind"], **seen)

    def promoting(self, process: int) -> list[Message]:
        """Orders that a worker gets before it is promoted."""
        self._note("promoted", "worker", process=process)
        return list(self._standing)

    def config(self, role: Role) -> dict[str, Any]:
        """What a process that is being started is told besides its config."""
        if role not in (Role.WORKER, Role.STANDBY):
            return {}
        order, self._next = self._next, None
        return {"drills": True} if order is None else {"drills": True, "provoke": order}

    def _note(self, event: str, title: str, **facts: Any) -> None:
        self._moments.append({"event": event, "title": title, "at_s": time.monotonic(), **facts})

    def _signal(self, name: str, roles: list[str]) -> None:
        if name not in SIGNALS:
            raise ValueError(f"{name!r} is none of {', '.join(SIGNALS)}")
        children = [self._child(role) for role in roles]
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.Signals[name])

    def _fault(self, order: dict[str, Any]) -> None:
        to, standing = order.pop("to"), order.pop("standing", False)
        order.pop("do")
        message = {"type": "provoke", **order}
        if to == "next":
            self._next = message
            return
        number = self._number(f"{to} 0")
        if standing:
            if len(self._standing) >= STANDING_MAX:
                raise ValueError(f"{STANDING_MAX} orders stand already")
            self._standing.append(message)
        self._say(number, message)

    def _corrupt_weights(self, fd: int | None, *, kill: bool) -> None:
        if fd is None:
            raise ValueError("there are no weights in memory that the supervisor can write")
        if kill:
            # First: what it computes with wrong weights must not leave it.
            self._child("worker 0").kill()
        if self._device != "cpu":
            self._flip_on_gpu(fd)
            return
        with mmap.mmap(fd, os.fstat(fd).st_size) as slab:
            flip_signs(slab)

    def _flip_on_gpu(self, fd: int) -> None:
        """By a process of its own: this one has no context, and must not make one."""
        ordinal = parse_device(self._device)[1]
        numbers = (ordinal, fd, self._weights_bytes, _FLIP_EVERY_BYTES)
        done = subprocess.run(
            module_command("holdfast.proc.cuda_flip", *map(str, numbers)),
            env=module_environment(),
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FLIP_S,
            check=False,
        )
        if done.returncode:
            raise ValueError(f"the weights could not be changed: {done.stderr[-300:]}")

    def _child(self, role: str) -> Child:
        return self._children[self._number(role)]

    def _number(self, role: str) -> int:
        """The process in a place such as `worker 0`; the core's is `core`."""
        for slot in self._lifecycle.slots:
            if slot.title == f"holdfast {role}" and slot.process in self._children:
                return slot.process
        raise ValueError(f"no process is {role!r}")


def flip_signs(slab: mmap.mmap | bytearray) -> None:
    """In place; of numbers whose sign is in the last of each four bytes, or of each two."""
    signs = slice(3, None, _FLIP_EVERY_BYTES)
    slab[signs] = slab[signs].translate(_SIGN_FLIPPED)
