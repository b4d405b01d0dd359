"""Checksums of rows of memory at the speed of reading them: wire.checksum as a Triton kernel.

The definition's weights ((i + 1) * GOLDEN) | 1 need two 64-bit products a word, more than the GPU
has time for at 4 TB/s. But GOLDEN is odd, so (i + 1) * GOLDEN is odd exactly when i is even, and

    mix(i) = (i + 1) * GOLDEN + [i is odd]
    sum w(i) * mix(i) = GOLDEN * sum w(i) * (i + 1)  +  sum over odd i of w(i)        mod 2**64

which needs no table, and by running sums over a lane's words (`later`) four additions a word and
no product. Words are read in pairs, as uint64 with w(2j) in the low half. Sums are order-free, so
programs add to a row's sum atomically.

Called by ops.checksum alone, which adds the constant that depends on the length only. 8-byte words
and rows of whole 16-byte lines: what that means for a shape is ops.checksum's to check.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.launch import ceil_div, launch

GOLDEN = 0x9E37_79B9_7F4A_7C15
# Pairs of words that a program reads at once (16 KiB, 64 bytes a thread), and how often: 128 KiB a
# program are enough reads in flight on every SM, and few enough atomics.
_TILE = 2048
_TILES = 8
_WARPS = 8


@triton.jit(do_not_specialize=["row_lines", "stride_lines", "parts"])
def _sum_rows(
    words,
    rows,
    sums,
    row_lines,
    stride_lines,
    parts,
    GOLDEN: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Add one part of one row to its sum. Lines are of 16 bytes, two pairs of words."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    part = program % parts
    # Every offset is a multiple of a line in the kernel's own arithmetic, so loads are 16 bytes.
    start = words + tl.load(rows + row) * stride_lines * 2
    pairs = row_lines * 2
    lane = tl.arange(0, TILE)
    first = part * (TILE * TILES)
    both = tl.zeros([TILE], tl.uint64)
    odd = tl.zeros([TILE], tl.uint64)
    later = tl.zeros([TILE], tl.uint64)
    for tile in tl.static_range(TILES):
        at = first + tile * TILE + lane
        pair = tl.load(start + at, mask=at < pairs, other=0).to(tl.uint64, bitcast=True)
        high = pair >> 32
        both += (pair & 0xFFFFFFFF) + high
        odd += high
        later += both  # In the end: each tile's words as often as tiles followed, itself included.
    # A pair at `at` counts (w + w') (2 at + 1) + w'; at = first + lane + tile * TILE.
    number = ((first + lane) * 2 + 1).to(tl.uint64)
    ordered = both * (number + 2 * TILE * TILES) - later * (2 * TILE) + odd
    total = tl.sum(ordered, axis=0) * GOLDEN + tl.sum(odd, axis=0)
    tl.atomic_add(sums + row, total.to(tl.int64, bitcast=True))


def fits(words: int, stride_words: int) -> bool:
    """Whether rows of so many 32-bit words, so far apart, are whole lines with 32-bit numbers."""
    return words % 4 == 0 and stride_words % 4 == 0 and words < 1 << 31


def row_sums(memory: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int64[k], bits of the sums without the constant, of rows int64[k] of int32[n, words].

    `memory` may have any row stride that `fits`; its first byte lies on a 16-byte line.
    """
    words, stride = memory.shape[1], memory.stride(0)
    sums = torch.zeros(rows.numel(), dtype=torch.int64, device=memory.device)
    parts = ceil_div(words, 2 * _TILE * _TILES)
    launch(
        _sum_rows,
        (rows.numel() * parts,),
        memory.view(torch.int64),
        rows,
        sums,
        words // 4,
        stride // 4,
        parts,
        GOLDEN=GOLDEN,
        TILE=_TILE,
        TILES=_TILES,
        num_warps=_WARPS,
    )
    return sums
