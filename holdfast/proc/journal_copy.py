"""JournalCopy: the journal on disk, some moments late, never in the way of a step.

A thread of the supervisor follows the journal memfd (core.journal.JournalTail) and appends what is
new to `<dir>/journal-<start>-<pid>-<number>.hfj`, raw records as `core.journal.records_of` reads
them; a file that is full is followed by the next one and the oldest are removed. Files are 0600 in
a directory that is 0700: they hold prompts. When the disk is full or broken, that is counted and
said once, serving goes on, and a new file is tried every few seconds; it begins with the journal's
whole active half, hence with every live request, so that trouble leaves no gap behind it.

Invariant: only whole records stand in a file, up to a torn last write. Nobody waits for this thread
but `close`, with a deadline.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from holdfast.errors import OptionError

# How late the copy may be; reading an unchanged journal costs some microseconds.
FOLLOW_S = 0.02
RETRY_S = 5.0
_OPTION = "--journal-dir"
_FILE = re.compile(r"journal-\d{8}T\d{15}-\d+-\d{6}\.hfj")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Tail(Protocol):
    """core.journal.JournalTail: `read` gives the whole records appended since the last call."""

    def read(self) -> bytes: ...


class JournalCopy:
    """`start` once, `close` once; `tail()` makes a tail that begins with the whole active half.

    file_bytes: a file is closed before it would exceed this; one read alone may be larger.
    files: how many are kept; the caller sees to it that (files - 1) * file_bytes holds one half.
    warn: called with one line, on the copy's thread, when trouble begins.
    """

    def __init__(
        self,
        tail: Callable[[], Tail],
        folder: Path,
        *,
        sync: str,
        sync_interval_s: float,
        file_bytes: int,
        files: int,
        warn: Callable[[str], None],
        retry_s: float = RETRY_S,
    ) -> None:
        self._new_tail = tail
        self._tail = tail()
        self._folder = folder
        self._sync = sync
        self._sync_interval_s = sync_interval_s
        self._file_bytes = file_bytes
        self._files = files
        self._warn = warn
        self._retry_after_s = retry_s
        self._fd = -1
        self._folder_fd = -1
        self._written = 0
        self._number = 0
        self._name = ""
        seconds, fraction_ns = divmod(time.time_ns(), 1_000_000_000)
        self._stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) + f"{fraction_ns:09d}"
        self._synced_s = time.monotonic()
        self._dirty = False
        self._retry_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal-copy", daemon=True)
        self.bytes_written = 0
        self.errors = 0
        self.troubled = False

    def start(self) -> None:
        """Make the directory and the first file. Raises OptionError when that cannot be done."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(self._folder.stat().st_mode)
            if mode & 0o077:
                raise OptionError(
                    _OPTION,
                    f"{self._folder} is open to others (mode {mode:04o}) and the journal holds "
                    f"prompts; chmod 700 it",
                )
            self._folder_fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock()
            self._open_next()
        except OSError as error:
            raise OptionError(
                _OPTION, f"{self._folder} cannot be written: {error.strerror}"
            ) from error
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Copy what is left and end. A disk that hangs is left behind at the deadline."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"the journal's copy in {self._folder} is not complete: the disk hangs")
        elif self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1

    def _lock(self) -> None:
        try:
            # On the directory itself, so that there is no lock file to be left behind.
            fcntl.flock(self._folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{self._folder} is in use by another server; choose another"
            raise OptionError(_OPTION, message) from error

    def _follow(self) -> None:
        while True:
            stopping = self._stop.wait(FOLLOW_S)
            self._copy()
            if stopping:
                break
        if self._fd >= 0 and self._try(self._fsync):
            os.close(self._fd)

    def _copy(self) -> None:
        if self._fd < 0:
            if time.monotonic() < self._retry_s or not self._try(self._open_next):
                return
            self._tail = self._new_tail()
        data = self._tail.read()
        if data and not self._try(self._append, data):
            return
        late = time.monotonic() - self._synced_s >= self._sync_interval_s
        if self._dirty and (self._sync == "step" or (self._sync == "interval" and late)):
            self._try(self._fsync)

    def _try(self, action: Callable[..., None], *arguments: object) -> bool:
        """Run one disk operation; on trouble give the file up and come back later with a new."""
        try:
            action(*arguments)
        except OSError as error:
            self.errors += 1
            if not self.troubled:
                self.troubled = True
                self._warn(f"the journal is not copied to {self._folder}: {error.strerror}")
            self._retry_s = time.monotonic() + self._retry_after_s
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(self._fd)
                self._fd = -1
            return False
        return True

    def _append(self, data: bytes) -> None:
        if self._written and self._written + len(data) > self._file_bytes:
            self._fsync()
            os.close(self._fd)
            self._fd = -1
            self._open_next()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            self._cut()
            raise
        self._written += len(data)
        self._dirty = True
        self.troubled = False
        self.bytes_written += len(data)

    def _cut(self) -> None:
        """Take back half a write; an empty file goes, lest retries push the good ones out."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._written)
            if self._written == 0:
                os.unlink(self._folder / self._name)

    def _fsync(self) -> None:
        if self._dirty and self._sync != "none":
            os.fdatasync(self._fd)
            self._synced_s = time.monotonic()
        self._dirty = False

    def _open_next(self) -> None:
        self._remove_old()
        self._name = f"journal-{self._stamp}-{os.getpid()}-{self._number:06d}.hfj"
        self._number += 1
        self._fd = os.open(self._folder / self._name, _FLAGS, 0o600)
        self._written = 0
        self._dirty = False

    def _remove_old(self) -> None:
        """Make room for one more file; before it is opened, since the disk may be full."""
        ours = sorted(path for path in self._folder.iterdir() if _FILE.fullmatch(path.name))
        for old in ours[: max(0, len(ours) - self._files + 1)]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
