"""MatmulConfig: how a product of few rows is cut, and the table that says so.

Pure numbers, without torch or triton, like ops.kernels.decode_config and for the same reasons.
Measured by tools/gpu/tune_matmul.py on an H200. Called by ops.kernels.small_matmul and gpu_work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Beyond, cuBLAS computes: of 128 and 256 rows it won 16 of 20 products of 8B and 0.6B against the
# best of 40 ways to cut each, TMA and warp groups among them (bench/results/products_h200.json).
ROWS_MAX = 64


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How a product is cut. rows: of x in a tile, which holds all of them: 16, 32 or 64; block_n,
    block_k: of a tile of the weight, powers of two; splits: parts of K; swapped: see `_multiply`,
    block_n >= 64 then."""

    rows: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    swapped: bool = False


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

    configs: of each weight (n, k), for each number of rows.
    """
    split = [
        (config.splits * config.rows * n, -(-n // config.block_n))
        for (n, _), each in configs.items()
        for config in each
        if config is not None and config.splits > 1
    ]
    parts = max((parts for parts, _ in split), default=1)
    return parts, max((tiles for _, tiles in split), default=1)
