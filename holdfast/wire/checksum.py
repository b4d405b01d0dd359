"""The checksum of a page: what "unchanged since sealed" means, to the bit.

A page's bytes are read as little-endian uint32 words w[0..k); with all arithmetic modulo 2**64,

    sum = SEED + sum over i of (w[i] + 1) * mix(i)      mix(i) = ((i + 1) * GOLDEN) | 1

Each word's weight is odd, so any change of a single word changes the sum; weights differ, so moved
words change it too; the +1 makes trailing zero words count. It is not cryptographic: it guards
against hardware and our own mistakes, not against an adversary. Sums are order-free additions, so a
device may reduce in any order and gets the same bits. Twins in ops.checksum are tested against it.
"""

from __future__ import annotations

import numpy as np

SEED = 0x9AE1_6A3B_2F90_404F
GOLDEN = 0x9E37_79B9_7F4A_7C15


def weights(words: int) -> np.ndarray:
    """uint64[words]: the odd weight of each word position."""
    return (np.arange(1, words + 1, dtype=np.uint64) * np.uint64(GOLDEN)) | np.uint64(1)


def page_sums(pages: np.ndarray, word_weights: np.ndarray) -> np.ndarray:
    """Checksums of whole pages.

    pages: uint32[k, words], C-contiguous. word_weights: `weights(words)`. Returns uint64[k].
    """
    values = pages.astype(np.uint64) + np.uint64(1)
    return (values * word_weights).sum(axis=1, dtype=np.uint64) + np.uint64(SEED)


def bytes_sum(data: bytes | memoryview | np.ndarray, block_bytes: int = 1 << 20) -> int:
    """Checksum of a byte string, chained over blocks; for slabs that are too large for one pass.

    The length is padded to a multiple of four with zeros. Used for weights and journal snapshots.
    """
    view = np.frombuffer(data, np.uint8)
    block_weights = weights(block_bytes // 4)
    total = SEED
    for at in range(0, view.size, block_bytes):
        block = view[at : at + block_bytes]
        if block.size % 4:
            block = np.concatenate([block, np.zeros(-block.size % 4, np.uint8)])
        words = block.view(np.uint32)
        part = int(page_sums(words[None, :], block_weights[: words.size])[0])
        total = (total * GOLDEN + part) % (1 << 64)
    return total
