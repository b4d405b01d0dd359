"""DecodeConfig: how a bucket of rows is cut for decode attention, and the table that says so.

Pure numbers, without torch or triton. A table and no autotuner: that would measure where a server
starts, compile after ready, and give two workers of one engine two answers. What the numbers should
be is measured by tools/gpu/bench_attention.py --tune. Called by ops.kernels.decode_attention.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a tile of K and V: of few rows, whose programs are few, and of many.
_TILE_BYTES = {2: 32 << 10, 4: 16 << 10}
_MANY_TILE_BYTES = {2: 16 << 10, 4: 8 << 10}
# Programs an SM holds at once (150 registers a thread, 72 KiB of shared memory).
_PROGRAMS_PER_SM = 3
# Tokens of a part: programs of much longer ones would still run when all others are done. A
# program alone on its SM reads about 80 GB/s: 1,024 tokens of a kv head of 128 in 7 us. Programs
# that find nothing to do cost about 1 us a thousand.
_PART_TOKENS = 1024
# A part is read back by the program that adds up, one after another: half a microsecond each, in
# which a program reads some hundred tokens.
_PART_TOKENS_MIN = 256
_PROGRAMS_MAX = 4096


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a bucket is computed. block: positions of a tile, a power of two >= 16; splits: parts a
    row's context is cut into at most, which is a dimension of the grid; parts: how many it is cut
    into as a rule; blocks_min, blocks_max: fewer or more, where a part would have fewer or more
    blocks than these."""

    block: int
    splits: int
    warps: int = 4
    stages: int = 3
    parts: int = 1
    blocks_min: int = 1
    blocks_max: int = 1


def choose_config(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, context_max: int, sm_count: int
) -> DecodeConfig:
    """The host's table: a pure function of the bucket, never of lengths.

    Few rows: as many splits as fill the GPU, a row or two one program an SM, since then each has
    the whole SM's memory pipe. Many: smaller tiles in a deeper pipe, and a split only for length.
    """
    pairs = rows * kv_heads
    at_once = _PROGRAMS_PER_SM * sm_count
    if pairs >= at_once:
        block, stages, parts = _block(head_dim, itemsize, _MANY_TILE_BYTES[itemsize]), 4, 1
    else:
        block, stages = _block(head_dim, itemsize, _TILE_BYTES[itemsize]), 3
        parts = sm_count // pairs if 8 * pairs <= sm_count else at_once // pairs
    most = -(-context_max // block)
    return DecodeConfig(
        block=block,
        splits=min(max(parts, _splits_for_length(context_max, pairs)), most),
        stages=stages,
        parts=min(parts, most),
        blocks_min=-(-_PART_TOKENS_MIN // block),
        blocks_max=-(-_PART_TOKENS // block),
    )


def splits_max(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, context_max: int, sm_count: int
) -> int:
    """`choose_config` on no GPU of at most so many SMs gives more splits: what a workspace may be
    as large as before the GPU is known."""
    pairs = rows * kv_heads
    splits = max(_PROGRAMS_PER_SM * sm_count // pairs, _splits_for_length(context_max, pairs))
    least = _block(head_dim, itemsize, _MANY_TILE_BYTES[itemsize])
    return min(max(1, splits), -(-context_max // least))


def _block(head_dim: int, itemsize: int, tile_bytes: int) -> int:
    lanes = 1 << (head_dim - 1).bit_length()
    return min(128, max(16, tile_bytes // (2 * lanes * itemsize)))


def _splits_for_length(context_max: int, pairs: int) -> int:
    return min(-(-context_max // _PART_TOKENS), max(1, _PROGRAMS_MAX // pairs))
