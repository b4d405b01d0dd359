"""ops.pinned: what is staged arrives as it was, and a slot waits for the copy from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.errors import WorkerFault
from holdfast.ops import pinned
from holdfast.ops.pinned import SLOTS, Ring, Uploads

CPU = torch.device("cpu")


class Event:
    """Over after so many looks."""

    def __init__(self) -> None:
        self.looks = 0
        self.records = 0

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def record(self) -> None:
        self.records += 1


def ring(words: int = 4) -> tuple[Ring, list[Event]]:
    events: list[Event] = []
    made = Ring(CPU, words, lambda: events.append(Event()) or events[-1])
    assert len(events) == SLOTS
    return made, events


def test_arrays_arrive_with_their_types_and_shapes_on_lines_of_their_own() -> None:
    staged, _ = ring()
    uploads = Uploads(CPU, ring=staged)
    draw = np.random.default_rng(0)
    kept = []
    for _ in range(3 * SLOTS):
        arrays = [
            draw.integers(-9, 9, (3, 5)).astype(np.int32),
            draw.integers(-(2**62), 2**62, 7),
            np.empty(0, np.int32),
            draw.standard_normal(int(draw.integers(1, 90))).astype(np.float32),
            draw.integers(0, 99, (4, 6)).astype(np.int64)[:, ::2],
            draw.integers(0, 2, 5) > 0,
        ]
        kept.append((arrays, uploads.put(*arrays)))
    # What came first still holds although its slot was written again.
    for arrays, tensors in kept:
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.numpy().dtype == array.dtype
            np.testing.assert_array_equal(tensor.numpy(), array)
            assert tensor.is_contiguous() and tensor.storage_offset() * tensor.itemsize % 16 == 0


def test_a_cpu_copies_nothing() -> None:
    array = np.arange(5)
    (tensor,) = Uploads(CPU).put(array)
    array[2] = 77
    assert tensor.tolist() == [0, 1, 77, 3, 4]
    (packed,) = Uploads(CPU).put(np.arange(6).reshape(2, 3).T)
    assert packed.is_contiguous() and packed.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_slot_is_taken_again_only_after_the_event_of_its_copy() -> None:
    staged, events = ring()
    for _ in range(SLOTS):
        staged.take().copied()
    assert [event.records for event in events] == [1] * SLOTS
    events[0].looks = 3
    slot = staged.take()
    assert events[0].looks < 0, "waited until the copy was over"
    assert events[1].looks == 0, "and for no other"
    before = slot.words
    slot.grow(before.size)
    assert slot.words is before
    slot.grow(before.size + 1)
    assert slot.words.size == 2 * before.size


def test_a_copy_that_never_ends_is_a_fault_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_TIMEOUT_S", 0.0)
    staged, events = ring()
    for _ in range(SLOTS):
        staged.take().copied()
    events[0].looks = 1 << 30
    with pytest.raises(WorkerFault, match="a staging copy is not over"):
        staged.take()
