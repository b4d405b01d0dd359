"""What a journal's copy on disk tells, and how its damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brain_driver import limits_of

from holdfast.core.journal import Admission, Journal, JournalTail
from holdfast.errors import OperatorError
from holdfast.proc.journal_files import DamagedJournal, read_runs
from holdfast.wire.messages import End, Sampling

LIMITS = limits_of()
NAME = "journal-20260101T000000000000000-77-{:06d}.hfj"


def admission(number: int) -> Admission:
    prompt = np.arange(number, number + 5, dtype=np.int32).tobytes()
    return Admission(number, 0, "", 0, prompt, 8, number, 0, Sampling())


def ring() -> tuple[bytearray, list[bytes]]:
    """A journal of two requests, and what its tail read after each record."""
    buffer = bytearray(Journal.size(LIMITS))
    journal, tail = Journal(memoryview(buffer), LIMITS), JournalTail(memoryview(buffer))
    ids, pieces = np.array([1, 2], np.uint64), []
    for number in (1, 2):
        journal.submit(admission(number))
        pieces.append(tail.read())
    for token in range(4):
        journal.tokens(0, ids, np.array([token, 10 + token], np.int32))
        pieces.append(tail.read())
    journal.end(1, End.STOP, 3)
    pieces.append(tail.read())
    return buffer, pieces


def folder_of(folder: Path, *files: bytes) -> Path:
    for number, data in enumerate(files):
        (folder / NAME.format(number)).write_bytes(data)
    return folder


def told(path: Path, **options: bool) -> dict[int, tuple[list[int], int]]:
    (run,) = read_runs(path, **options)
    return {number: (one.tokens, one.end) for number, one in run.requests.items()}


WHOLE = {1: ([0, 1, 2], int(End.STOP)), 2: ([10, 11, 12, 13], 0)}


def test_a_run_is_read_from_its_files_in_order_and_from_the_ring_itself(tmp_path: Path) -> None:
    buffer, pieces = ring()
    folder = folder_of(tmp_path, b"".join(pieces[:3]), b"".join(pieces[3:]))
    assert told(folder) == WHOLE
    memory = tmp_path / "memory"
    memory.write_bytes(buffer)
    assert told(memory) == WHOLE


def test_runs_of_several_servers_are_told_apart_and_the_newest_is_last(tmp_path: Path) -> None:
    _, pieces = ring()
    folder_of(tmp_path, b"".join(pieces))
    later = "journal-20260102T000000000000000-5-000000.hfj"
    (tmp_path / later).write_bytes(pieces[0])
    first, second = read_runs(tmp_path)
    assert list(first.requests) == [1, 2] and list(second.requests) == [1]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_last_record_that_is_cut_short_is_a_note_and_costs_itself_alone(
    tmp_path: Path, cut: int
) -> None:
    _, pieces = ring()
    data = b"".join(pieces[:-1])
    folder = folder_of(tmp_path, data[:-cut])
    (run,) = read_runs(folder)
    assert run.requests[2].tokens == [10, 11, 12]
    (note,) = run.notes
    assert f"byte {len(data) - len(pieces[-2]):,}" in note and NAME.format(0) in note


def test_zeros_behind_the_last_record_are_a_note(tmp_path: Path) -> None:
    _, pieces = ring()
    folder = folder_of(tmp_path, b"".join(pieces) + bytes(4096))
    (run,) = read_runs(folder)
    assert len(run.notes) == 1 and run.requests[2].tokens == WHOLE[2][0]


def test_a_flipped_bit_is_named_with_its_file_and_byte(tmp_path: Path) -> None:
    _, pieces = ring()
    data = bytearray(b"".join(pieces))
    start = len(b"".join(pieces[:3]))
    data[start + 30] ^= 4
    folder = folder_of(tmp_path, b"".join(pieces[:1]), bytes(data))
    with pytest.raises(DamagedJournal, match="checksum") as caught:
        read_runs(folder)
    assert caught.value.offset == start and caught.value.path.name == NAME.format(1)
    assert str(caught.value).startswith(f"{folder / NAME.format(1)}: byte {start:,}: ")
    (run,) = read_runs(folder, partial=True)
    assert run.requests[2].tokens == [10] and "checksum" in run.notes[0]


def test_a_file_cut_short_in_the_middle_of_a_run_is_damage(tmp_path: Path) -> None:
    _, pieces = ring()
    folder = folder_of(tmp_path, b"".join(pieces[:3])[:-5], b"".join(pieces[3:]))
    with pytest.raises(DamagedJournal) as caught:
        read_runs(folder)
    assert caught.value.offset == len(b"".join(pieces[:2]))


@pytest.mark.parametrize(
    "data", [b"%PDF-1.7 and a lot of other things that are no journal" * 9, b"{}", bytes(16)]
)
def test_a_file_that_is_no_journal_is_refused_by_its_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "notes.hfj"
    path.write_bytes(data)
    with pytest.raises(OperatorError, match=r"notes\.hfj"):
        read_runs(path)


def test_a_folder_without_a_journal_and_a_path_without_anything_are_refused(
    tmp_path: Path,
) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OperatorError, match=str(path)):
            read_runs(path)


def test_an_empty_file_is_a_run_without_requests(tmp_path: Path) -> None:
    assert told(folder_of(tmp_path, b"")) == {}
