"""Estate: what the supervisor owns and every process may lose but itself.

The listening sockets, the memfds of journal and counters (and the keeper's, once they came), the
journal's copy on disk, the files of fault reports, the status socket and the signals. Opened before
any process, so that a port in use or a full machine is one line at start; closed in the reverse
order. Nothing else here has a name in a file system, so nothing is left behind by SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque

import setproctitle

from holdfast.core.journal import Journal, JournalTail
from holdfast.core.metrics import Metrics, MetricsBoard
from holdfast.core.report import Report, line_of
from holdfast.proc import coredump, memfd
from holdfast.proc.fault_files import FaultFiles
from holdfast.proc.journal_copy import JournalCopy
from holdfast.proc.listen import listen, raise_file_limit
from holdfast.proc.options import ServeOptions
from holdfast.proc.status import StatusServer

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WARNINGS_MAX = 100
# Slot 0 is the core's, 2 + index that of an api process.
METRICS_SLOT = 1


class Estate:
    """Raises OperatorError when something cannot be had; call `close` in any case.

    fds: memfds by name. signals: numbers caught and not yet handled, oldest first; `wake` becomes
    readable with each. warnings: lines for the operator, appended by any thread.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.fds: dict[str, int] = {}
        self.signals: deque[int] = deque()
        self.warnings: deque[str] = deque(maxlen=WARNINGS_MAX)
        self.copy: JournalCopy | None = None
        self.faults: FaultFiles | None = None
        self._cleanup = contextlib.ExitStack()
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    def _open(self, options: ServeOptions) -> None:
        self._cleanup.callback(lambda: self.drop(*self.fds))
        if warning := raise_file_limit():
            self.warnings.append(warning)
        count = options.limits.api_processes
        self.listeners = listen(options.host, options.port, count)
        for sock in self.listeners:
            self._cleanup.callback(sock.close)
        self.port: int = self.listeners[0].getsockname()[1]
        sizes = {
            "journal": (Journal.size(options.limits), "--live-tokens"),
            "metrics": (Metrics.size(2 + count), "memory"),
        }
        for name, (size, option) in sizes.items():
            self.take({name: memfd.make(name, size, option=option)})
        numbers = memfd.attach(self.fds["metrics"])
        self.metrics = Metrics(numbers, METRICS_SLOT)
        # The core's numbers, to read.
        self.board = MetricsBoard(numbers, slots=1)
        if options.journal_dir is not None:
            self._open_copy(options)
        if options.fault_dir is not None:
            self.faults = FaultFiles(options.fault_dir, warn=self.warnings.append)
            self.faults.start()
            self._cleanup.callback(self.faults.close)
        if options.gpu_coredump is not None:
            coredump.make_folder(options.gpu_coredump)
        self.status = StatusServer()
        self._cleanup.callback(self.status.close)
        self._cleanup.callback(setproctitle.setproctitle, setproctitle.getproctitle())
        self.title = f"holdfast serve :{self.port}"
        setproctitle.setproctitle(self.title)
        self._catch_signals()

    def take(self, fds: dict[str, int]) -> None:
        """These descriptors are ours from now on; those of the same names are given up."""
        self.drop(*fds)
        self.fds.update(fds)

    def drop(self, *names: str) -> None:
        """Give up these descriptors, so that their memory is free once nobody maps it."""
        for name in names:
            if name in self.fds:
                os.close(self.fds.pop(name))

    def tell_fault(self, report: Report) -> None:
        """One line for the operator, and a file when a place for it was given."""
        line = line_of(report)
        if self.faults is not None:
            path = self.faults.put(report)
            line += f"; report: {path}" if path else "; too many reports wait for the disk"
        self.warnings.append(line)

    def stop_listening(self) -> None:
        """No process will be started on these sockets again: new connections are refused once the
        api processes have closed theirs, instead of waiting for nobody."""
        for sock in self.listeners:
            sock.close()

    def close(self) -> None:
        self._cleanup.close()

    def _open_copy(self, options: ServeOptions) -> None:
        assert options.journal_dir is not None
        file_bytes = int(options.journal_file_mb * 1e6)
        buffer = memfd.attach(self.fds["journal"])
        self.copy = JournalCopy(
            lambda: JournalTail(buffer),
            options.journal_dir,
            sync=options.journal_sync,
            sync_interval_s=options.journal_sync_interval_s,
            file_bytes=file_bytes,
            # What is kept must hold one whole half, hence every live request.
            files=max(options.journal_files, -(-options.limits.journal_bytes // file_bytes) + 1),
            warn=self.warnings.append,
        )
        self.copy.start()
        self._cleanup.callback(self.copy.close)

    def _catch_signals(self) -> None:
        """Signals wake a select through a socket; what they mean is decided by its loop."""
        self.wake, write = socket.socketpair()
        for sock in (self.wake, write):
            sock.setblocking(False)
            self._cleanup.callback(sock.close)
        self._cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write.fileno()))
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before is signal.SIG_IGN:
                continue  # Started by nohup: the end of the terminal is not ours.
            signal.signal(number, lambda caught, frame: self.signals.append(caught))
            if before is not None:  # None: installed by C code, cannot be put back.
                self._cleanup.callback(signal.signal, number, before)
