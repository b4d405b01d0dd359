"""How many parts decode attention cuts a row's context into: tools/gpu/tune_parts.py [--budget S].

Buckets of rows whose lengths differ, as in service, and of few rows: the engine's own choice first,
then others. Prints microseconds of a layer, replayed; the last column is times the bytes' floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import torch
from attention_cases import CONTEXT_MAX, HEAD_DIM, KV_HEADS, DecodeCase, Pages, replayed_us

from holdfast.ops.kernels.decode_config import DecodeConfig, choose_config

# (rows, longest, shortest or None)
CASES = (
    (256, 1008, 100), (112, 2048, 100), (64, 2048, 100), (64, 776, 512), (256, 776, 512),
    (31, 8192, 100), (32, 776, 512), (16, 776, 512), (8, 776, 512), (1, 640, None),
    (8, 4096, None), (1, 8192, None), (4, 4096, None),
)  # fmt: skip
LAYERS = 12


def variants(rows: int) -> list[DecodeConfig]:
    """The engine's, then others around it."""
    own = choose_config(rows, KV_HEADS, HEAD_DIM, 2, CONTEXT_MAX, 132)
    pairs = rows * KV_HEADS
    found = [own]
    tiles = ((32, 4), (64, 3)) if rows >= 16 else ((64, 3),)
    for (block, stages), tokens in itertools.product(tiles, (256, 512, 1024, 2048)):
        for per_sm in (0, 1, 2, 3, 4, 6):
            parts = max(1, round(per_sm * 132 / pairs))
            config = dataclasses.replace(
                own,
                block=block,
                stages=stages,
                parts=parts,
                splits=max(own.splits, parts),
                blocks_max=max(1, tokens // block),
            )
            if config not in found:
                found.append(config)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=60.0)
    asked = parser.parse_args()
    end_s = time.monotonic() + asked.budget
    pages = Pages()
    for rows, longest, least in CASES:
        case = DecodeCase(pages, rows, longest, least)
        tried = []
        for config in variants(rows):
            if time.monotonic() > end_s:
                break
            row = case.row("", replayed_us(case.launch(config), LAYERS))
            tried.append((row["us"], row["of floor"], config))
        if not tried:
            break
        own = tried[0]
        print(f"{case.shape:>16}  own {own[0]:7.1f} us x{own[1]:.2f}  {own[2]}", flush=True)
        for took, over, config in sorted(tried, key=lambda one: one[0])[:4]:
            print(f"{'':>20}  {took:7.1f} us x{over:.2f}  {config}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
