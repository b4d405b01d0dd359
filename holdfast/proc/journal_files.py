"""Reading a journal that nobody writes for us any more: the files of a copy, or the ring itself.

A folder of `--journal-dir` holds the files of one or several runs of a server; a run's files, in
order, fold into its requests. A path may also be one file, or the ring in memory as another process
shows it (/proc/PID/fd/N of a running server). What does not hold is named with file and byte: a
last record that was being written when its server died is a note, anything else is an error.

Read by `holdfast replay`. Recovery of a running engine reads the ring by core.journal alone.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from holdfast.core import journal
from holdfast.core.journal import JournalledRequest, RecordKind
from holdfast.errors import OperatorError

SUFFIX = ".hfj"


class DamagedJournal(OperatorError):
    """A journal cannot be read to its end. `path` and `offset` (bytes) say where."""

    def __init__(self, path: Path, offset: int, message: str) -> None:
        super().__init__(f"{path}: byte {offset:,}: {message}")
        self.path = path
        self.offset = offset


@dataclass(slots=True)
class JournalRun:
    """What one run of a server left. name: when it started and its pid, as in its files' names.

    requests: by id, in order of admission. notes: what is not as it should be, and harmless.
    """

    name: str
    files: int
    requests: dict[int, JournalledRequest]
    notes: list[str] = field(default_factory=list)


def read_runs(path: Path, *, partial: bool = False) -> list[JournalRun]:
    """The runs at `path`, oldest first, at least one.

    partial: read each file up to its first damage instead of raising. Raises DamagedJournal, or
    OperatorError when there is no journal at all.
    """
    try:
        if path.is_dir():
            return _read_folder(path, partial)
        with path.open("rb") as file:
            head = file.read(4)
            if head == journal.MAGIC.to_bytes(4, "little"):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    return [_read_ring(path, mapped, partial)]
    except OSError as error:
        raise OperatorError(f"{path} cannot be read: {error.strerror}") from error
    return [_fold(path.name, [path], partial)]


def _read_folder(folder: Path, partial: bool) -> list[JournalRun]:
    runs: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        runs.setdefault(path.stem.rpartition("-")[0], []).append(path)
    if not runs:
        raise OperatorError(f"{folder} holds no journal (no *{SUFFIX})")
    return [_fold(name, paths, partial) for name, paths in runs.items()]


def _fold(name: str, paths: list[Path], partial: bool) -> JournalRun:
    notes: list[str] = []

    def records() -> Iterator[tuple[RecordKind, memoryview]]:
        for path in paths:
            data = path.read_bytes()
            yield from _whole(path, memoryview(data), notes, last=path is paths[-1], lax=partial)

    return JournalRun(name, len(paths), _replay(paths[-1], records()), notes)


def _read_ring(path: Path, mapped: mmap.mmap, partial: bool) -> JournalRun:
    notes: list[str] = []
    # Copied: the mapping is closed before anybody looks at a record, and its writer goes on.
    try:
        data = bytes(journal.active_half(memoryview(mapped)))
    except (struct.error, ValueError) as error:
        raise DamagedJournal(path, 0, "the ring's header is not whole") from error
    records = _whole(path, memoryview(data), notes, last=True, lax=partial)
    return JournalRun(path.name, 1, _replay(path, records), notes)


def _replay(
    path: Path, records: Iterable[tuple[RecordKind, memoryview]]
) -> dict[int, JournalledRequest]:
    try:
        return journal.replay(records)
    except (msgspec.DecodeError, struct.error, ValueError) as error:
        message = f"{path}: its records are of another version of Holdfast: {error}"
        raise OperatorError(message) from error


def _whole(
    path: Path, data: memoryview, notes: list[str], *, last: bool, lax: bool
) -> Iterator[tuple[RecordKind, memoryview]]:
    """The records of one file, up to a torn last one. Raises DamagedJournal."""
    damage = journal.damage_of(data)
    if damage is None:
        return journal.records_of(data)
    if damage.torn and last and damage.offset:
        notes.append(f"{path.name}: the last record, at byte {damage.offset:,}, is not whole")
    elif damage.offset == 0 and not damage.torn:
        raise DamagedJournal(path, 0, "this is no journal of Holdfast, or its start is damaged")
    elif lax:
        notes.append(f"{path.name}: not read from byte {damage.offset:,} on: {damage.message}")
    else:
        raise DamagedJournal(path, damage.offset, damage.message)
    return journal.records_of(data[: damage.offset])
