"""Ways to cut a product, for tune_matmul.py: what fits an SM, the most promising first.

Pure numbers: `python3 tools/gpu/matmul_space.py N K ROWS` (PYTHONPATH=.) prints a space.
"""

from __future__ import annotations

import itertools
import random
import sys

from holdfast.ops.kernels.matmul_config import MatmulConfig

SHARED_MAX = 220 << 10
SMS = 132
# Of one H200: bytes that SMs get from L2 and operations, a second, as far as kernels reach them.
_L2_BYTES_PER_S, _OPERATIONS_PER_S, _BYTES_PER_S = 5.5e12, 650e12, 4.24e12
# What a program takes besides: filling its pipeline, and writing what it has.
_PROGRAM_S = 3e-6


def choose(n: int, k: int, rows: int, keep: int) -> list[MatmulConfig]:
    """`keep` configurations of a cell: of few rows drawn, of more than 64 by `estimate_s`, half of
    them of warp groups and a quarter each with and without bulk copies."""
    if rows <= 64:
        found = few_rows(n, k, rows)
        return random.sample(found, min(keep, len(found)))
    kinds = [warp_groups(n, k, rows)]
    kinds += [many_rows(n, k, rows, bulk=bulk) for bulk in (False, True)]
    chosen = []
    for configs, share in zip(kinds, (2, 4, 4), strict=True):
        configs.sort(key=lambda config: estimate_s(n, k, rows, config))
        chosen += configs[: keep // share]
    return chosen


def few_rows(n: int, k: int, rows: int) -> list[MatmulConfig]:
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    found = []
    for block_n, block_k, splits, warps, stages, swapped in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (1, 2, 3, 4, 6, 8), (4, 8), (3, 4, 6, 8), (False, True)
    ):
        shared = (block_n + tall) * block_k * 2 * stages
        programs = -(-n // block_n) * splits
        if shared > SHARED_MAX or shared < 32 << 10 or k < block_k * splits * 2:
            continue
        if (swapped and block_n < 64) or (not swapped and tall < 64 and block_n > 64):
            continue
        if (warps == 8 and block_n * tall < 2048) or programs < 96:
            continue
        if splits > 1 and programs > 800:
            continue
        found.append(MatmulConfig(tall, block_n, block_k, splits, warps, stages, swapped))
    return found


def many_rows(n: int, k: int, rows: int, *, bulk: bool) -> list[MatmulConfig]:
    """Of small_matmul's own kernel: at most 64 float32 sums a thread, two warp groups for tiles of
    128 by 128."""
    found = []
    for tall, block_n, block_k, splits, warps, stages, swapped in itertools.product(
        (64, 128), (64, 128, 256), (64, 128), range(1, 9), (4, 8), (3, 4, 5, 6), (False, True)
    ):
        shared = (block_n + tall) * block_k * 2 * stages
        if not _sensible(n, k, block_n, block_k, splits) or not 96 << 10 <= shared <= SHARED_MAX:
            continue
        if not 32 <= tall * block_n // (32 * warps) <= 64:
            continue
        # A warp group has 64 of the tall side; two of them want 128.
        if warps == 8 and (block_n if swapped else tall) < 128:
            continue
        found.append(
            MatmulConfig(
                tall, block_n, block_k, splits, warps, stages, swapped, bulk, kept=rows > tall
            )
        )
    return found


def warp_groups(n: int, k: int, rows: int) -> list[MatmulConfig]:
    found = []
    for tall, groups, block_k, splits in itertools.product(
        (64, 128, 256), (1, 2, 3), (32, 64, 128), range(1, 9)
    ):
        if (
            (tall == 256 and rows <= 128)
            or (block_k == 32 and tall * groups < 768)
            or tall * groups < 128
        ):
            continue
        if not _sensible(n, k, 64 * groups, block_k, splits):
            continue
        most = SHARED_MAX // ((64 * groups + tall) * block_k * 2)
        found += [
            MatmulConfig(tall, 64 * groups, block_k, splits, stages=stages, groups=groups)
            for stages in {min(most, 8), max(most // 2, 3)}
            if 3 <= stages <= most
        ]
    return found


def _sensible(n: int, k: int, block_n: int, block_k: int, splits: int) -> bool:
    """Whether no split is empty or of less than three blocks, and parts are no flood."""
    blocks = -(-k // block_k)
    part = -(-blocks // splits)
    if splits == 1:
        return True
    return part >= 3 and part * (splits - 1) < blocks and -(-n // block_n) * splits <= 4 * SMS


def estimate_s(n: int, k: int, rows: int, config: MatmulConfig) -> float:
    """Seconds by waves of programs, each bound by L2 or by operations, and never less than the
    weights' bytes; only good for an order."""
    stage = (config.block_n + config.rows) * config.block_k * 2
    together = max(1, min(2, (227 << 10) // (stage * config.stages)))
    row_tiles = -(-rows // config.rows)
    programs = -(-n // config.block_n) * row_tiles * config.splits
    waves = -(-programs // (SMS * together)) * together
    program_bytes = (config.block_n + config.rows) * k / config.splits * 2
    operations = 2 * config.block_n * config.rows * k / config.splits
    each = max(program_bytes / _L2_BYTES_PER_S, operations / _OPERATIONS_PER_S) * SMS
    parts = 0.0
    if config.splits > 1:
        parts = 2 * 4 * config.splits * row_tiles * config.rows * n / _BYTES_PER_S
    # Fewer bytes under way than about 40 KiB an SM do not keep memory busy.
    under_way = min(1.0, stage * (config.stages - 1) * together / (120 << 10))
    floor = 2 * n * k / _BYTES_PER_S / under_way
    return max(waves * each, floor) + parts + waves / together * _PROGRAM_S


def main() -> None:
    n, k, rows = map(int, sys.argv[1:4])
    for config in choose(n, k, rows, 40):
        print(f"{1e6 * estimate_s(n, k, rows, config):7.1f} us  {config}")


if __name__ == "__main__":
    main()
