"""MatmulConfig: how a product of few rows is cut, and the table that says so.

Pure numbers, without torch or triton, like ops.kernels.decode_config and for the same reasons.
Measured by tools/gpu/tune_matmul.py on an H200. Called by ops.kernels.small_matmul and gpu_work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Up to here the table has been measured; cuBLAS has the others. The kernels themselves compute any
# number of rows: tools/gpu/tune_matmul.py `--next` measures 128 and 256.
ROWS_MAX = 64


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How a product is cut. rows: of x in a tile, a power of two from 16 to 256; block_n, block_k:
    of a tile of the weight, powers of two, but see groups; splits: parts of K.

    Of ops.kernels.small_matmul's own kernel: swapped: see `_multiply`, block_n >= 64 then; bulk:
    tiles come by TMA, k is a multiple of 8; kept: weights stay in L2, for several tiles of rows.

    groups: warp groups, 1 to 3, of 64 rows of the weight each, of ops.kernels.warp_matmul, which
    then computes it: block_n is 64 * groups, k a multiple of 8; warps and the other kernel's fields
    are not used. 0 is small_matmul's own kernel.
    """

    rows: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    swapped: bool = False
    bulk: bool = False
    kept: bool = False
    groups: int = 0

    @property
    def halves(self) -> int:
        """Of rows, each a product of its own: one of 256 does not go with the registers of three
        groups, and spills where parts are added."""
        return 2 if self.groups and self.rows == 256 else 1


def layer_products(
    *, vocab: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[tuple[int, int], ...]:
    """(n, k) of a model's weights: q, k and v; output; gate and up; down; head."""
    return (
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * intermediate, hidden),
        (hidden, intermediate),
        (vocab, hidden),
    )


def choose_config(n: int, k: int, rows: int, sm_count: int) -> MatmulConfig | None:
    """How x [rows, k] times weight [n, k] is computed; None where cuBLAS is as fast.

    A pure function of shapes, so that a bucket's graph and an eager step compute the same bits. A
    product wants about a program an SM, with 96 KiB or more of weights under way in each.
    """
    megabytes = 2 * n * k / (1 << 20)
    if megabytes > 512 or rows > ROWS_MAX:
        return None
    tiles = -(-n // 64)
    if rows <= 32:
        tall = 16 if rows <= 16 else 32
        if tall == 32 and megabytes > 64 and 2048 < k <= 2 * n:
            return None
        splits = _splits(n, k, 64, 128, sm_count)
        if k // splits >= 6144:
            splits *= 2
        return MatmulConfig(
            tall, 64, 128, splits, 4, 3 if tiles * splits > 1.5 * sm_count else 6, True
        )
    if megabytes > 16 and k <= 2048:
        return MatmulConfig(64, 64, 64, 1, 4, 4, True)
    if megabytes > 16 and k <= 2 * n:
        return None
    wide = n >= 45 * sm_count or megabytes > 16
    splits = _splits(n, k, 64 if wide else 32, 128, sm_count)
    if wide:
        return MatmulConfig(64, 64, 128, splits, 8, 6)
    return MatmulConfig(64, 32, 128, splits, 4, 8)


def _splits(n: int, k: int, block_n: int, block_k: int, sm_count: int) -> int:
    """As many as give every SM a program, of two blocks at least."""
    splits = round(sm_count / -(-n // block_n))
    return max(1, min(splits, 8, k // (2 * block_k)))


def workspace(
    configs: Mapping[tuple[int, int], Sequence[MatmulConfig | None]],
) -> tuple[int, int]:
    """(float32 of parts, int32 of tiles) that the largest of these products needs, at least one.

    configs: of each weight (n, k), for 1, 2, 3 .. rows.
    """
    parts = arrivals = 1
    for (n, _), each in configs.items():
        for rows, config in enumerate(each, 1):
            if config is None or config.splits == 1:
                continue
            tiles, row_tiles = -(-n // config.block_n), -(-rows // config.rows)
            # Parts in whole tiles: warp_matmul's are.
            part = tiles * config.block_n * row_tiles * config.rows
            parts = max(parts, config.splits * part)
            arrivals = max(arrivals, tiles * row_tiles * max(1, config.groups))
    return parts, arrivals
