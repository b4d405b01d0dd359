"""The journal on disk: whole, private, bounded, and never in anybody's way."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import until

from holdfast.config import Limits
from holdfast.core.journal import Admission, Journal, JournalTail, records_of, replay
from holdfast.errors import OptionError
from holdfast.proc.journal_copy import JournalCopy
from holdfast.wire.messages import Sampling

LIMITS = Limits(vocab_size=99, context_tokens=64, rows_max=2, queue_requests=2, live_tokens=256)


class Writer:
    """A journal in memory and its copy."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.buffer = memoryview(bytearray(Journal.size(LIMITS)))
        self.journal = Journal(self.buffer, LIMITS)
        self.folder = folder
        self.warnings: list[str] = []
        settings = {"sync": "none", "sync_interval_s": 0.01, "file_bytes": 1 << 20, "files": 3}
        self.copy = JournalCopy(
            lambda: JournalTail(self.buffer),
            folder,
            warn=self.warnings.append,
            retry_s=0.05,
            **{**settings, **options},
        )

    def submit(self, number: int) -> Admission:
        prompt = np.arange(number, number + 5, dtype=np.int32).tobytes()
        record = Admission(number, 0, "", 0, prompt, 9, number, 0, Sampling())
        assert self.journal.submit(record)
        return record

    def token(self, number: int, token: int) -> None:
        ids = np.array([number], np.uint64)
        assert self.journal.tokens(0, ids, np.array([token], np.int32))

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def requests(self) -> dict[int, list[int]]:
        """What a reader of the copy finds: tokens by request."""
        records: list[object] = []
        for path in self.files():
            # The writer may take a file away between the listing and the reading.
            with contextlib.suppress(FileNotFoundError):
                records += records_of(memoryview(path.read_bytes()))
        return {number: request.tokens for number, request in replay(records).items()}


def whole(path: Path) -> bool:
    """Whether nothing but whole records stands in the file."""
    data = path.read_bytes()
    sizes = [(16 + len(payload) + 7) & ~7 for _, payload in records_of(memoryview(data))]
    return sum(sizes) == len(data)


Make = Callable[..., Writer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    writers: list[Writer] = []

    def start(folder: Path = tmp_path / "journal", **options: object) -> Writer:
        writers.append(Writer(folder, **options))
        writers[-1].copy.start()
        return writers[-1]

    yield start
    for writer in writers:
        writer.copy.close()


@pytest.mark.parametrize("sync", ["none", "interval", "step"])
def test_the_copy_holds_every_record_and_only_its_owner_can_read_it(make: Make, sync: str) -> None:
    old = os.umask(0)
    try:
        writer = make(sync=sync)
    finally:
        os.umask(old)
    for number in (1, 2, 3):
        writer.submit(number)
        writer.token(number, 10 * number)
    until("copied", lambda: writer.requests() == {1: [10], 2: [20], 3: [30]})
    writer.token(2, 21)
    writer.copy.close()
    assert writer.requests() == {1: [10], 2: [20, 21], 3: [30]}
    assert stat.S_IMODE(writer.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in writer.files()] == [0o600]
    assert not writer.warnings and writer.copy.errors == 0


def test_step_syncs_before_it_reads_on_and_none_never_syncs(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    writer = make(sync="step")
    writer.submit(1)
    until("synced", lambda: synced and synced[-1] == writer.copy.bytes_written > 0)
    writer.copy.close()
    synced.clear()
    quiet = make(writer.folder.parent / "quiet", sync="none")
    quiet.submit(1)
    until("copied", lambda: quiet.requests())
    quiet.copy.close()
    assert synced == []


def test_files_are_rotated_and_the_oldest_go(make: Make) -> None:
    writer = make(file_bytes=400, files=3)
    seen: set[str] = set()
    for number in range(1, 30):
        writer.submit(number)
        until("copied", lambda n=number: n in writer.requests())
        seen |= {path.name for path in writer.files()}
        assert len(writer.files()) <= 3
    assert len(seen) > 3
    assert {path.name for path in writer.files()} == set(sorted(seen)[-3:])
    assert all(path.stat().st_size <= 400 for path in writer.files())


def test_files_of_an_earlier_server_count_and_strangers_are_left_alone(
    make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir(mode=0o700)
    (folder / "notes.txt").touch()
    for number in range(5):
        (folder / f"journal-20200101T000000000000000-1-{number:06d}.hfj").touch()
    writer = make(files=3)
    names = [path.name for path in writer.files()]
    assert "notes.txt" in names and len(names) == 4
    assert "journal-20200101T000000000000000-1-000004.hfj" in names


def test_a_compaction_is_followed_into_the_new_half(make: Make) -> None:
    writer = make()
    record = writer.submit(1)
    writer.token(1, 7)
    until("copied", lambda: writer.requests() == {1: [7]})
    writer.journal.compact([(record, np.array([7], np.int32), 0)])
    writer.token(1, 8)
    until("copied", lambda: writer.requests() == {1: [7, 8]})


def test_a_full_disk_is_counted_said_once_and_leaves_no_gap_behind(make: Make) -> None:
    """RLIMIT_FSIZE stands for the disk: writes beyond it fail with EFBIG."""
    writer = make()
    writer.submit(1)
    until("copied", lambda: writer.requests() == {1: []})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.files()[0].stat().st_size + 20, hard))
    try:
        writer.token(1, 10)
        writer.submit(2)
        until("several tries", lambda: writer.copy.errors >= 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Retries did not push the good file out, and half a record does not stand in it.
    assert writer.requests().get(1) == []
    assert all(whole(path) for path in writer.files())
    writer.token(1, 11)
    until("healed", lambda: writer.requests() == {1: [10, 11], 2: []})
    assert len(writer.warnings) == 1
    assert "File too large" in writer.warnings[0] and str(writer.folder) in writer.warnings[0]
    assert not writer.copy.troubled


def test_a_directory_that_vanishes_does_not_end_the_copying_thread(
    make: Make, tmp_path: Path
) -> None:
    writer = make(file_bytes=200)
    writer.submit(1)
    until("copied", lambda: writer.copy.bytes_written)
    moved = tmp_path / "moved"
    writer.folder.rename(moved)
    writer.submit(2)
    until("trouble", lambda: writer.copy.errors >= 2)
    moved.rename(writer.folder)
    until("healed", lambda: set(writer.requests()) == {1, 2})
    assert len(writer.warnings) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_without_space_is_survived(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        writer = make(folder)
        (folder / "filler").write_bytes(b"x" * 12_288)
        for number in range(1, 200):  # About 9 KB for the 4 KB that are left.
            writer.token(number, 1)
        until("trouble", lambda: writer.copy.errors)
        assert "No space left" in writer.warnings[0]
        (folder / "filler").unlink()
        writer.journal.compact([])
        writer.submit(91)
        until("healed", lambda: 91 in writer.requests())
        writer.copy.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_directory_that_others_can_read_is_refused(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(OptionError, match=r"--journal-dir: .*mode 0755.*chmod 700"):
        make(folder)


def test_a_path_that_is_no_directory_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"--journal-dir: .* cannot be written"):
        make(tmp_path / "file" / "below")


def test_two_servers_do_not_share_a_directory(make: Make) -> None:
    first = make()
    with pytest.raises(OptionError, match="in use by another server"):
        make()
    first.copy.close()
    make().copy.close()
