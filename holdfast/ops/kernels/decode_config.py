"""DecodeConfig: how a bucket of rows is cut for decode attention, and the table that says so.

Pure numbers, without torch or triton. A table and no autotuner: that would measure where a server
starts, compile after ready, and give two workers of one engine two answers. What the numbers should
be is measured by tools/gpu/bench_attention.py --tune. Called by ops.kernels.decode_attention.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a tile of K and V.
_TILE_BYTES = {2: 32 << 10, 4: 16 << 10}
# Programs an SM holds at once (150 registers a thread, 72 KiB of shared memory), and tokens that
# one program should not exceed: at about 80 GB/s it reads 32,768 of a kv head of 128 in 200 us.
_PROGRAMS_PER_SM = 3
_SPLIT_TOKENS_MAX = 32768
_PROGRAMS_MAX = 4096


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a bucket is computed. block: positions of a tile, a power of two >= 16; splits: parts a
    row's context is cut into at most; blocks_min: blocks a part has at least."""

    block: int
    splits: int
    warps: int = 4
    stages: int = 3
    blocks_min: int = 1


def choose_config(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, context_max: int, sm_count: int
) -> DecodeConfig:
    """The host's table: a pure function of the bucket, never of lengths.

    Few rows: as many splits as fill the GPU once. Many: four times, since then the last, partly
    filled turn costs little, and more for the longest contexts unless there are programs enough.
    """
    block = _block(head_dim, itemsize)
    pairs = rows * kv_heads
    at_once = _PROGRAMS_PER_SM * sm_count
    splits = at_once // pairs if 4 * pairs <= at_once else -(-4 * at_once // pairs)
    splits = max(splits, _splits_for_length(context_max, pairs))
    return DecodeConfig(block=block, splits=min(max(1, splits), -(-context_max // block)))


def splits_max(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, context_max: int, sm_count: int
) -> int:
    """`choose_config` on no GPU of at most so many SMs gives more splits: what a workspace may be
    as large as before the GPU is known."""
    pairs = rows * kv_heads
    many = -(-4 * _PROGRAMS_PER_SM * sm_count // pairs)
    splits = max(many, _splits_for_length(context_max, pairs))
    return min(max(1, splits), -(-context_max // _block(head_dim, itemsize)))


def _block(head_dim: int, itemsize: int) -> int:
    lanes = 1 << (head_dim - 1).bit_length()
    return min(128, max(16, _TILE_BYTES[itemsize] // (2 * lanes * itemsize)))


def _splits_for_length(context_max: int, pairs: int) -> int:
    return min(-(-context_max // _SPLIT_TOKENS_MAX), _PROGRAMS_MAX // pairs)
