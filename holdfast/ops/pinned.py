"""Pinned staging: host arrays to a device by copies that nobody waits for.

A copy from pageable memory makes torch wait for all that the stream was given before it, so a step
that copies its index arrays so cannot be launched ahead. Owns the pinned slots and is the home of:
a slot is written again only after the event of its copy. Used by device.frame for plans, by whoever
lays a step out on the host (ops.attention_triton, ops.mixed_arrays, device.batch, device.runner),
and by ops.checksum. On a CPU a copy is over when it returns, and `Uploads` makes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from holdfast.errors import WorkerFault

# One being copied for each step in flight, and one being written.
SLOTS = 3
# A copy waits behind two steps at most; the supervisor's deadline of a step is shorter than this.
_TIMEOUT_S = 600.0
# A sleep of 20 us takes 70, as Linux puts waking up off by 50: too long for what is nearly over.
_SPIN_S = 100e-6
_LOOK_S = 20e-6
# Each array of an upload begins on such a line: kernels are compiled for aligned pointers.
_LINE_BYTES = 16


class Event(Protocol):
    """What a Slot needs of a DeviceEvent."""

    def query(self) -> bool: ...
    def record(self) -> None: ...


class DeviceEvent:
    """torch.cuda.Event on the current stream of one device.

    Told no stream, `record` of torch's own asks which device is current, and before that whether
    there is any: 150 us, several times a step (torch 2.11 on an H200's machine).
    """

    def __init__(self, device: torch.device) -> None:
        """device: with its number."""
        self._device = device
        self._event = torch.cuda.Event()
        # The stream of the last record, by its number: as a rule the next is the same.
        self._number: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def query(self) -> bool:
        return self._event.query()

    def record(self) -> None:
        number = torch._C._cuda_getCurrentRawStream(self._device.index)
        if number != self._number:
            self._number = number
            self._stream = torch.cuda.current_stream(self._device)
        self._event.record(self._stream)


def await_event(event: Event, what: str) -> None:
    """Wait until the stream has come to the event. Raises WorkerFault("`what` is not over ...") at
    the deadline, and what the GPU has to say."""
    began_s = now_s = time.monotonic()
    while not event.query():
        if now_s - began_s > _TIMEOUT_S:
            raise WorkerFault(f"{what} is not over after {_TIMEOUT_S:.0f} s")
        if now_s - began_s > _SPIN_S:
            time.sleep(_LOOK_S)
        now_s = time.monotonic()


class Slot:
    """One pinned buffer, int32[words], and the event of the copy from it (None: over at once)."""

    def __init__(self, words: int, device: torch.device, event: Event | None) -> None:
        self._device = device
        self._event = event
        self._copied = False
        self._allocate(words)

    def _allocate(self, words: int) -> None:
        pinned = self._device.type == "cuda"
        self.tensor = torch.zeros(words, dtype=torch.int32, pin_memory=pinned)
        self.words = self.tensor.numpy()
        self._fronts: dict[int, torch.Tensor] = {}

    def wait(self) -> None:
        """Until the slot may be written. Raises WorkerFault when its copy never ends."""
        if self._event is not None and self._copied:
            await_event(self._event, "a staging copy")

    def grow(self, words: int) -> None:
        """Have room for so many at least; after `wait`, since the old buffer goes."""
        if words > self.words.size:
            self._allocate(1 << (words - 1).bit_length())

    def front(self, words: int) -> torch.Tensor:
        """int32[words]: the first words of the buffer. Few sizes: each view is kept."""
        found = self._fronts.get(words)
        if found is None:
            found = self._fronts[words] = self.tensor[:words]
        return found

    def copied(self) -> None:
        """A copy from the slot was just launched on the current stream."""
        if self._event is not None:
            self._event.record()
            self._copied = True


class Ring:
    """SLOTS slots of one device, taken in turn. One owner, one thread, one stream."""

    def __init__(
        self,
        device: torch.device,
        words: int,
        make_event: Callable[[], Event | None] | None = None,
    ) -> None:
        """words: int32 of each slot at first. make_event: of a slot; torch's own unless given."""
        if make_event is None:
            make_event = (lambda: DeviceEvent(device)) if device.type == "cuda" else lambda: None
        self._slots = [Slot(words, device, make_event()) for _ in range(SLOTS)]
        self._turn = 0

    def take(self, words: int = 0) -> Slot:
        """The next slot, its last copy over, with room for so many int32. Its copy must be told
        (`copied`) before the next is taken. Raises WorkerFault when a copy never ends."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        slot.wait()
        slot.grow(words)
        return slot


class Uploads:
    """Arrays to one device, in one copy a call: one call a step and owner, or a slot is waited for
    that is in use. One thread, one stream."""

    def __init__(self, device: torch.device, words: int = 0, ring: Ring | None = None) -> None:
        """words: int32 of all arrays of the largest call, as far as it is known: a larger one makes
        its slot grow. ring: in place of the device's own, which a CPU has none of."""
        self._device = device
        if ring is None and device.type == "cuda":
            ring = Ring(device, words)
        self._ring = ring

    def put(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Each array as a packed tensor on the device, of its type and shape; kernels launched from
        here on, on the current stream, see its contents. A CPU's packed arrays are not copied.

        On a GPU each begins on a 16-byte line of memory of its own, which torch's allocator gives
        to nobody on this stream before the tensors are gone.
        """
        if self._ring is None:
            return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.nbytes // _LINE_BYTES) * _LINE_BYTES
        slot = self._ring.take(end // 4)
        staged = slot.words.view(np.uint8)
        for array, start in zip(arrays, starts, strict=True):
            flat = np.ascontiguousarray(array).reshape(-1)
            staged[start : start + array.nbytes] = flat.view(np.uint8)
        buffer = torch.empty(end // 4, dtype=torch.int32, device=self._device)
        buffer.copy_(slot.tensor[: end // 4], non_blocking=True)
        slot.copied()
        raw = buffer.view(torch.uint8)
        return [
            raw[start : start + array.nbytes].view(_torch_type(array.dtype)).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]


def _torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
