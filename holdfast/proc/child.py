"""A child process of the supervisor: how it is started, how it learns its part, how it dies.

The supervisor calls `spawn`; the role's module (`python -m holdfast.proc.<role>`) calls `boot`
before it imports anything heavy. Invariants: a child never outlives its parent (PR_SET_PDEATHSIG,
and a check for a parent that died before it was set); a child holds exactly the descriptors that it
was given; a child is ended by its control channel, never by a terminal's Ctrl-C or by a SIGTERM to
the whole group, which are the supervisor's to handle. No torch, no device, no fork without exec.

What each role is given (all also have `control`, a proc.control.Control; link = wire.link.Link):

    role    descriptors                       config
    keeper                                    weights_bytes, pool_bytes, device
    worker, weights, pool (the keeper's: a    limits, model, device, dtype, pool_dtype, kernels,
    standby memfd, or GPU memory behind a     load, seed, threads, loaded (the slab holds the
            descriptor; absent where such     weights already: do not load), background (a standby
            memory cannot be shared)          prepares itself with CPU time that is left over, or
                                              rests as long as it uses a GPU), scrub_gbps,
                                              graphs; drills, provoke (only of a server started
                                              with --drills)
    core    journal, metrics (memfds)         limits, epoch, tag, recover, fault_tokens,
                                              step_timeout_s, step_margin_s, scrub_pages_s
    api     core (link, epoch 0), metrics     limits, model, served_name, api_keys, cors_origins,
            (memfd, slot 2 + index), listen   write_timeout_s, keepalive_s, body_bytes_max,
            (a listening socket)              drain_timeout_s, log_level

    from        to     message            carries
    child       super  ready              facts; keeper: 2 fds, or none and why (unshared);
                                           worker: it is prepared
    worker      super  compiled           count, what: kernels compiled by a step
    worker      super  steps              graph, mixed: decode steps, and steps with prompts,
                                           replayed, by sampler; eager: steps run eagerly, by
                                           reason; all since the last such word
    child       super  progress           what, done, total (bytes; of "graphs": captures)
    supervisor  worker verify             sum the weights
    worker      super  weights_sum        sum (uint64); one that scrubs says it unasked,
                                           and the step after which its pass began
    supervisor  worker hurry              it took the worker's place before it was prepared
    supervisor  worker unwatched          until_s (monotonic): nobody streams, so a standby that
                                           prepares itself need spare nobody until then
    supervisor  worker promote            epoch, fd: its link to the core; it may write from now on
    supervisor  worker provoke            a drill's order (device.provoke)
    supervisor  worker tell               say `steps` now, for a drill
    worker      super  provoked           kind, at_s: it does it now; `told`: it has
    child       super  fault              operator (bool), message, at_s (monotonic; optional);
                                           the child then exits
    supervisor  any    ping               are you there? (keeper, core, api; a waiting standby)
    child       super  pong               yes
    supervisor  any    stop               finish what is being written and exit 0
    supervisor  api    drain              refuse new requests with 503, keep streams going
    supervisor  api    core               fd: link (epoch 0) to a new core; resume over it
    supervisor  api    core_lost          detail; hold the streams until `core` comes
    supervisor  core   drain              refuse new requests
    supervisor  core   end_all            end (wire.messages.End), message: end what is live
    supervisor  core   worker             epoch, memory (wire.messages; none: lost), pid, fd: link
                                          to the worker of that epoch
    supervisor  core   weights_good       epoch, step: a pass over the weights that began after that
                                           step found them good
    supervisor  core   worker_lost        epoch, detail: it is over and fenced; implicates: it
                                           ended by its own fault
    supervisor  core   api                index, process, first_id of its requests, fd: link
    supervisor  core   api_lost           index
    core        super  drained            nothing is live any more (after drain)
    core        super  worker_fault       epoch, detail: that epoch must end; optional hung: no
                                           result came in time, closed: only its link's end was
                                           seen, since_s (monotonic): of a hang when its step began
    core        super  fault_report       report (core.report): plain data for whoever looks for the
                                           cause
    core        super  resumed            epoch, streams, at_s (monotonic): the first new token of
                                           that epoch, or nobody waited for one (streams 0)
    core        super  api_fault          process, detail: that api process must be replaced
    supervisor  keeper weights_sum        process, sum, loaded, step: what a worker found there
    keeper      super  weights            process, ok, step: whether they are what was loaded
    supervisor  keeper weights_forget     they will be loaded anew

Exit codes of children: 0 after stop, 70 after a fault of our own, 2 after an operator's.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import setproctitle

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.proc.background import leave_background
from holdfast.proc.control import Control
from holdfast.proc.lifecycle.slot import title

BOOT_FD = "HOLDFAST_BOOT_FD"
EXIT_OPERATOR = 2
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Boot:
    """What a child was told. It owns `fds`, which no process it starts itself inherits."""

    role: str
    index: int
    config: dict[str, Any]
    fds: dict[str, int]

    @property
    def limits(self) -> Limits:
        return Limits(**self.config["limits"])

    def control(self) -> Control:
        """The control channel; call it once, it takes over the descriptor."""
        return Control(self.socket("control"))

    def socket(self, name: str) -> socket.socket:
        """The descriptor as a socket; call it once a name, it takes over the descriptor."""
        return socket.socket(fileno=self.fds[name])


class Child:
    """A started child, seen from the supervisor: its pid, pidfd and control channel."""

    def __init__(self, role: str, index: int, process: subprocess.Popen, control: Control) -> None:
        self.role = role
        self.index = index
        self.pid = process.pid
        # Not reaped before `wait`, so the pid cannot have been reused.
        self.pidfd = os.pidfd_open(process.pid)
        self.control = control
        self.started_s = time.monotonic()
        self._process = process

    @property
    def title(self) -> str:
        return title(self.role, self.index)

    def kill(self) -> None:
        """SIGKILL; harmless after the end."""
        if self._process.returncode is None:
            # It may have ended in between; `wait` reaps it.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                # On a machine without time to spare a thread in the background does not even die.
                leave_background(self.pid)

    def wait(self, timeout_s: float) -> int | None:
        """Exit status (negative signal number) once the process is gone, None at the deadline.

        The pidfd fires when the last thread is gone: nothing of the process runs after that.
        """
        if self._process.returncode is None:
            poller = select.poll()
            poller.register(self.pidfd, select.POLLIN)
            if not poller.poll(max(0.0, timeout_s) * 1000):
                return None
            self._process.wait(timeout=5)
        return self._process.returncode

    def close(self) -> None:
        """Give up the descriptors; the process must be gone."""
        require(self._process.returncode is not None, f"{self.title} closed while it runs")
        self.control.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def spawn(
    role: str,
    index: int,
    *,
    module: str,
    config: dict[str, Any],
    fds: dict[str, int],
    env: dict[str, str] | None = None,
) -> Child:
    """Start `python -m module` with `fds` (which stay ours), and a control channel besides.

    To be called by the main thread: PR_SET_PDEATHSIG fires at the end of the thread that spawned.
    `env` is added to our environment. Raises OSError when no process can be made.
    """
    control, theirs = Control.pair()
    given = {**fds, "control": theirs.fileno()}
    blob = msgspec.msgpack.encode(
        {"role": role, "index": index, "parent": os.getpid(), "config": config, "fds": given}
    )
    boot_fd = os.memfd_create("holdfast-boot", os.MFD_CLOEXEC)
    # Blocked here and inherited: a Ctrl-C before the child's `boot` must not end it half made.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        _write_all(boot_fd, blob)
        process = subprocess.Popen(
            module_command(module),
            env=module_environment({**(env or {}), BOOT_FD: str(boot_fd)}),
            stdin=subprocess.DEVNULL,
            pass_fds=(boot_fd, *given.values()),
            close_fds=True,
        )
    except BaseException:
        control.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(boot_fd)
        theirs.close()
    return Child(role, index, process, control)


def module_command(module: str, *arguments: str) -> list[str]:
    """To run a module of ours in another process, in `module_environment`; -P: its own directory is
    no place where modules are found."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, and `more`; modules are found there where this process finds them."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **(more or {}), "PYTHONPATH": path}


def boot() -> Boot:
    """First call in a child: tie its life to the parent's, title it, read what it is to do.

    Ends the process at once when the parent is gone already. Raises KeyError when the process was
    not started by `spawn`.
    """
    boot_fd = int(os.environ.pop(BOOT_FD))
    with open(boot_fd, "rb") as file:
        file.seek(0)
        blob = msgspec.msgpack.decode(file.read())
    die_with_parent(blob["parent"])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    for fd in blob["fds"].values():
        os.set_inheritable(fd, False)
    faulthandler.enable()
    setproctitle.setproctitle(title(blob["role"], blob["index"]))
    return Boot(blob["role"], blob["index"], blob["config"], blob["fds"])


def start_again(start: Boot, module: str) -> None:
    """This process anew, told the same and that it is in a hurry (proc.background). Does not
    return."""
    blob = msgspec.msgpack.encode(
        {
            "role": start.role,
            "index": start.index,
            "parent": os.getppid(),
            "config": {**start.config, "background": False},
            "fds": start.fds,
        }
    )
    boot_fd = os.memfd_create("holdfast-boot", 0)  # inherited over exec
    with contextlib.closing(os.fdopen(boot_fd, "wb", closefd=False)) as file:
        file.write(blob)
    for fd in start.fds.values():
        os.set_inheritable(fd, True)
    environment = {**os.environ, BOOT_FD: str(boot_fd)}
    os.execve(sys.executable, module_command(module), environment)


def die_with_parent(parent: int) -> None:
    """SIGKILL to this process when its parent ends, also if it has ended already."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent:
        # The parent died before the request was made, and its death cannot fire any more.
        os._exit(EXIT_FAULT)


def limits_config(limits: Limits) -> dict[str, Any]:
    """`limits` as a config value; the child reads it back as `Boot.limits`."""
    return dataclasses.asdict(limits)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
