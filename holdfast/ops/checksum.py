"""Checksums over tensors: the twin of wire.checksum, on the memory where the bytes lie.

Invariant: equal to wire.checksum's page_sums and bytes_sum to the bit, on any bytes; read only.
Called by device.memory and proc.worker. All arithmetic is modulo 2**64, so the order of summation
within a page is free. On a GPU a Triton kernel reads at the memory's speed; where there is no
triton, or a page is no whole number of 16-byte lines, a torch expression does, eight times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from holdfast.ops import kernels
from holdfast.ops.pinned import DeviceEvent, Event, Uploads, await_event

SEED = 0x9AE1_6A3B_2F90_404F
GOLDEN = 0x9E37_79B9_7F4A_7C15
# Blocks of a slab, as wire.checksum.bytes_sum chains them.
BLOCK_BYTES = 1 << 20
# Words widened to 64 bits at a time by the expression: bounds the temporary memory to 64 MiB.
_DEVICE_WORDS = 8 << 20
# Blocks between two reports of progress on a device: 16 GiB, four milliseconds of reading.
_DEVICE_BLOCKS = 1 << 14
_ONLY = np.zeros(1, np.int64)


class PendingSums:
    """Sums on their way to the host. sums: int64[k], bits of what was added up, host."""

    def __init__(
        self, sums: torch.Tensor, constant: np.uint64, landing: _Landing | None = None
    ) -> None:
        """landing: whose memory the sums come to, which is free again once they were taken."""
        self._sums = sums
        self._constant = constant
        self._landing = landing

    def take(self) -> np.ndarray:
        """uint64[k]; waits for the copy. Once. Raises WorkerFault when it never ends."""
        if self._landing is not None:
            await_event(self._landing.event, "a copy of checksums")
        found = self._sums.numpy().view(np.uint64) + self._constant
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.free.append(landing)
        return found


# Asking torch for nothing takes 10 us of a step that seals nothing.
_NO_SUMS = PendingSums(torch.empty(0, dtype=torch.int64), np.uint64(0))


@dataclass(frozen=True, slots=True)
class _Landing:
    """Pinned memory that sums are copied to, int64[words], the event of the copy, and the list of
    memory like this that nobody uses."""

    sums: torch.Tensor
    event: Event
    free: list[_Landing]


def _pinned(words: int) -> torch.Tensor:
    return torch.empty(words, dtype=torch.int64, pin_memory=True)


class PageSums:
    """Checksums of pages of one size on one device."""

    def __init__(self, words: int, device: torch.device | str = "cpu") -> None:
        self.words = words
        self._device = torch.device(device)
        # sum (w + 1) * mix = sum w * mix + sum mix: the second part is a constant of the size. It
        # is GOLDEN * (1 + .. + words), and 1 for each odd place (see ops.kernels.checksum).
        mixes = GOLDEN * (words * (words + 1) // 2) + words // 2
        self._constant = np.uint64((mixes + SEED) % (1 << 64))
        self._uploads = Uploads(self._device)
        self._free: list[_Landing] = []
        # A device without triton is slower, never wrong: `kernel` says which it is.
        self.kernel = self._device.type != "cpu" and words % 4 == 0 and kernels.available()

    @functools.cached_property
    def _host(self) -> np.ndarray:
        """uint64[words]: the weights. The kernel does without."""
        order = np.arange(1, self.words + 1, dtype=np.uint64)
        return (order * np.uint64(GOLDEN)) | np.uint64(1)

    @functools.cached_property
    def _weights(self) -> torch.Tensor:
        """int64[words] on the device: the same bits."""
        return torch.from_numpy(self._host.view(np.int64)).to(device=self._device)

    def of(self, pool: torch.Tensor, pages: np.ndarray) -> np.ndarray:
        """uint64[k] checksums of rows `pages` int[k] of pool: int32[pages_total, words]."""
        return self.begin(pool, pages).take()

    def begin(self, pool: torch.Tensor, pages: np.ndarray) -> PendingSums:
        """The same, launched on the current stream and fetched later."""
        if pages.size == 0:
            return _NO_SUMS
        if pool.device.type == "cpu":
            sums = torch.from_numpy(
                self._of_host(pool.numpy().view(np.uint32), pages).view(np.int64)
            )
            return PendingSums(sums, np.uint64(0))
        # Pinned both ways, so nobody waits.
        [index] = self._uploads.put(pages.astype(np.int64))
        if self.kernel and pool.stride(0) % 4 == 0 and pool.data_ptr() % 16 == 0:
            from holdfast.ops.kernels.checksum import row_sums

            sums = row_sums(pool, index)
        else:
            sums = torch.cat(self._of_device(pool, index))
        landing = self._land(pages.size)
        found = landing.sums[: pages.size]
        found.copy_(sums, non_blocking=True)
        landing.event.record()
        return PendingSums(found, self._constant, landing)

    def _land(self, words: int) -> _Landing:
        # What is never taken, as after a fault, stays with its taker; what is too small goes.
        while self._free:
            if (one := self._free.pop()).sums.numel() >= words:
                return one
        room = 1 << (words - 1).bit_length()
        return _Landing(_pinned(room), DeviceEvent(self._device), self._free)

    def _of_host(self, pool: np.ndarray, pages: np.ndarray) -> np.ndarray:
        sums = np.empty(pages.size, np.uint64)
        for at, page in enumerate(pages.tolist()):
            # einsum widens in small buffers: 5.5 GB/s a thread, a plain expression 1.3.
            sums[at] = np.einsum(
                "i,i->", pool[page], self._host, dtype=np.uint64, casting="same_kind"
            )
        return sums + self._constant

    def _of_device(self, pool: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        """int64 sums without the constant, some pages at a time; also right on the CPU."""
        some = max(1, _DEVICE_WORDS // self.words)
        parts = []
        for start in range(0, index.numel(), some):
            words = pool[index[start : start + some]].to(dtype=torch.int64)
            words &= 0xFFFF_FFFF
            words *= self._weights
            parts.append(words.sum(dim=-1))
        return parts


def slab_sum(slab: torch.Tensor, progress: Callable[[int, int], None] | None = None) -> int:
    """Checksum of uint8[bytes], bytes a multiple of 4: wire.checksum.bytes_sum of them.

    progress(bytes done, bytes in all) is called after each block, on a device after many.
    """
    some = 1 if slab.device.type == "cpu" else _DEVICE_BLOCKS
    whole = SlabSum(slab)
    while (total := whole.advance(some)) is None:
        if progress is not None:
            progress(whole.done, slab.numel())
    if progress is not None:
        progress(slab.numel(), slab.numel())
    return total


class SlabSum:
    """The same checksum, some blocks at a time, over and over. done: bytes of this pass so far."""

    def __init__(self, slab: torch.Tensor) -> None:
        """slab: uint8[bytes], bytes a multiple of 4."""
        whole = slab.numel() // BLOCK_BYTES
        self._slab = slab
        self._blocks = slab[: whole * BLOCK_BYTES].view(torch.int32).view(whole, BLOCK_BYTES // 4)
        self._rest = slab[whole * BLOCK_BYTES :].view(torch.int32)[None, :]
        self._block_sums = PageSums(BLOCK_BYTES // 4, slab.device)
        self._rest_sums = PageSums(self._rest.shape[1], slab.device)
        self._total = SEED
        self.done = 0

    def advance(self, blocks: int = 1) -> int | None:
        """Read the next so many blocks: the checksum once all are read, and the next pass begins.

        The last block of a slab may be a shorter one, which is read by itself.
        """
        first, whole = self.done // BLOCK_BYTES, self._blocks.shape[0]
        if first < whole:
            last = min(whole, first + blocks)
            found = self._block_sums.of(self._blocks, np.arange(first, last))
            self.done = last * BLOCK_BYTES
            self._total = _chained(self._total, found)
        elif self._rest.numel():
            self._total = _chained(self._total, self._rest_sums.of(self._rest, _ONLY))
            self.done = self._slab.numel()
        if self.done < self._slab.numel():
            return None
        total, self._total, self.done = self._total, SEED, 0
        return total


def _chained(total: int, sums: np.ndarray) -> int:
    """`total` after the sums uint64[k] of the next k blocks: each multiplies by GOLDEN, then adds.

    At once, since a Python loop over the blocks of a large model takes as long as reading it.
    """
    powers = np.multiply.accumulate(np.full(sums.size, GOLDEN, np.uint64))
    later = (sums[:-1] * powers[-2::-1]).sum(dtype=np.uint64)
    return (total * int(powers[-1]) + int(later) + int(sums[-1])) % (1 << 64)
