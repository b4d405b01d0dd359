"""FaultFiles: reports of faults as JSON files, the newest of them.

A thread of the supervisor writes them, so that a disk that is slow, full or gone is in nobody's
way. A file appears whole (`fault-<UTC>-<number>.json`, renamed into place, 0600); at most `files`
are kept. Trouble is counted and said once; a report that cannot be written is lost, not serving.

Invariant: `put` never waits; at most QUEUE_MAX reports wait, and one more is refused and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.errors import OptionError

FILES_KEPT = 20
QUEUE_MAX = 16
_OPTION = "--fault-dir"
_FILE = re.compile(r"fault-\d{8}T\d{6}Z-\d+-\d{6}\.json")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class FaultFiles:
    """`start` once, `close` once. warn: called with one line, on the writer's thread."""

    def __init__(
        self, folder: Path, *, warn: Callable[[str], None], files: int = FILES_KEPT
    ) -> None:
        self._folder = folder
        self._files = files
        self._warn = warn
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._write_all, name="fault files", daemon=True)
        self._number = 0
        self.written = 0
        self.errors = 0

    def start(self) -> None:
        """Make the directory. Raises OptionError when that cannot be done."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise PermissionError(0, "Permission denied")
        except OSError as error:
            message = f"{self._folder} cannot be written: {error.strerror}"
            raise OptionError(_OPTION, message) from error
        self._thread.start()

    def put(self, report: dict[str, Any]) -> Path | None:
        """Have it written; the path at which it will be, or None when too many wait already."""
        self._number += 1
        seconds = int(report["time_ns"]) // 1_000_000_000
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))
        name = f"fault-{stamp}-{os.getpid()}-{self._number:06d}.json"
        try:
            self._queue.put_nowait((name, report))
        except queue.Full:
            self.errors += 1
            return None
        return self._folder / name

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, and end. A disk that hangs is left behind at the deadline."""
        if self._thread.ident is None:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            name, report = entry
            try:
                self._write(name, report)
                self.written += 1
            except OSError as error:
                self.errors += 1
                if self.errors == 1:
                    self._warn(f"fault reports cannot be written to {self._folder}: {error}")

    def _write(self, name: str, report: dict[str, Any]) -> None:
        self._remove_old()
        partial = self._folder / f".{name}.part"
        try:
            with open(os.open(partial, _FLAGS, 0o600), "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, self._folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def _remove_old(self) -> None:
        for old in reports_in(self._folder)[: -(self._files - 1) or None]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()


def reports_in(folder: Path) -> list[Path]:
    """Report files of a folder, oldest first. Raises OSError when it cannot be read."""
    return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
