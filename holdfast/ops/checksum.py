"""Checksums over tensors: the twin of wire.checksum, on the memory where the bytes lie.

Invariant: equal to wire.checksum's page_sums and bytes_sum to the bit, on any bytes; read only.
Called by device.memory and proc.worker. All arithmetic is modulo 2**64, so the order of summation
within a page is free.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

SEED = 0x9AE1_6A3B_2F90_404F
GOLDEN = 0x9E37_79B9_7F4A_7C15
# Blocks of a slab, as wire.checksum.bytes_sum chains them.
BLOCK_BYTES = 1 << 20
# Words widened to 64 bits at a time on a device: bounds the temporary memory to 64 MiB.
_DEVICE_WORDS = 8 << 20


class PageSums:
    """Checksums of pages of one size. Holds the weights of the words, int64[words] on `device`."""

    def __init__(self, words: int, device: torch.device | str = "cpu") -> None:
        self.words = words
        order = np.arange(1, words + 1, dtype=np.uint64)
        self._host = (order * np.uint64(GOLDEN)) | np.uint64(1)
        # sum (w + 1) * mix = sum w * mix + sum mix: the second part is a constant of the size.
        self._constant = np.uint64((int(self._host.sum(dtype=np.uint64)) + SEED) % (1 << 64))
        self._weights = torch.from_numpy(self._host.view(np.int64)).to(device=device)

    def of(self, pool: torch.Tensor, pages: np.ndarray) -> np.ndarray:
        """uint64[k] checksums of rows `pages` int[k] of pool: int32[pages_total, words]."""
        if pages.size == 0:
            return np.empty(0, np.uint64)
        if pool.device.type == "cpu":
            return self._of_host(pool.numpy().view(np.uint32), pages)
        sums = [part.cpu() for part in self._of_device(pool, pages)]
        return torch.cat(sums).numpy().view(np.uint64) + self._constant

    def _of_host(self, pool: np.ndarray, pages: np.ndarray) -> np.ndarray:
        sums = np.empty(pages.size, np.uint64)
        for at, page in enumerate(pages.tolist()):
            # einsum widens in small buffers: 5.5 GB/s a thread, a plain expression 1.3.
            sums[at] = np.einsum(
                "i,i->", pool[page], self._host, dtype=np.uint64, casting="same_kind"
            )
        return sums + self._constant

    def _of_device(self, pool: torch.Tensor, pages: np.ndarray) -> list[torch.Tensor]:
        """int64 sums without the constant, some pages at a time; also right on the CPU."""
        index = torch.from_numpy(pages.astype(np.int64)).to(device=pool.device)
        some = max(1, _DEVICE_WORDS // self.words)
        parts = []
        for start in range(0, pages.size, some):
            words = pool[index[start : start + some]].to(dtype=torch.int64)
            words &= 0xFFFF_FFFF
            words *= self._weights
            parts.append(words.sum(dim=-1))
        return parts


def slab_sum(slab: torch.Tensor, progress: Callable[[int, int], None] | None = None) -> int:
    """Checksum of uint8[bytes], bytes a multiple of 4: wire.checksum.bytes_sum of them.

    progress(bytes done, bytes in all) is called after each block.
    """
    whole = SlabSum(slab)
    while (total := whole.advance()) is None:
        if progress is not None:
            progress(whole.done, slab.numel())
    if progress is not None:
        progress(slab.numel(), slab.numel())
    return total


class SlabSum:
    """The same checksum a block at a time, over and over. done: bytes of this pass so far."""

    def __init__(self, slab: torch.Tensor) -> None:
        """slab: uint8[bytes], bytes a multiple of 4."""
        self._slab = slab
        self._blocks = PageSums(BLOCK_BYTES // 4, slab.device)
        self._first = np.zeros(1, np.int64)
        self._total = SEED
        self.done = 0

    def advance(self) -> int | None:
        """Read the next block: the checksum once all are read, and the next pass begins."""
        if self.done < self._slab.numel():
            block = self._slab[self.done : self.done + BLOCK_BYTES]
            words = block.view(torch.int32)[None, :]
            sums = self._blocks
            if words.shape[1] != sums.words:
                sums = PageSums(words.shape[1], self._slab.device)
            found = int(sums.of(words, self._first)[0])
            self._total = (self._total * GOLDEN + found) % (1 << 64)
            self.done += block.numel()
        if self.done < self._slab.numel():
            return None
        total, self._total, self.done = self._total, SEED, 0
        return total
