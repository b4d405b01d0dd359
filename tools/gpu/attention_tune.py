"""The sweep of bench_attention.py --tune: which configurations the tables should name.

Decode in two steps: tile, warps and stages by two shapes with the table's own splits, then splits
for each shape with the three best. What it prints is to be written into
holdfast/ops/kernels/decode_config.py and prefill_attention.choose_config.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable

import triton
from attention_cases import (
    CONTEXT_MAX,
    DECODE,
    HEAD_DIM,
    KV_HEADS,
    PREFILL,
    DecodeCase,
    Pages,
    PrefillCase,
    layered_us,
    replayed_us,
)

from holdfast.ops.kernels.decode_config import DecodeConfig, choose_config
from holdfast.ops.kernels.prefill_attention import PrefillConfig

# Programs of a grid, in programs an SM.
TURNS = (1, 2, 3, 4, 6, 8, 12, 16)


def tune(pages: Pages, deadline: float) -> list[dict]:
    """The best configurations of each shape, decode first; prints as it goes."""
    found: list[dict] = []
    cases = [DecodeCase(pages, rows, context) for rows, context in DECODE]
    variants = [
        dict(zip(("block", "warps", "stages"), values, strict=True))
        for values in itertools.product((64, 32, 128), (4, 8, 2), (3, 2, 4, 5))
    ]
    kept = _ranked_variants(cases, variants, deadline - 0.5 * (deadline - time.monotonic()))
    for case in cases:
        pairs = case.rows * KV_HEADS
        splits = sorted({max(1, round(132 * turns / pairs)) for turns in TURNS})
        tried = [
            DecodeConfig(splits=split, parts=split, blocks_max=1 << 20, **variant)
            for variant in kept
            for split in splits
            if split * 16 <= case.context
        ]
        found += _best(tried, _decoded(case), min(deadline, time.monotonic() + 30))
    for rows, context in PREFILL:
        case = PrefillCase(pages, rows, context)
        tried = [
            PrefillConfig(*values)
            for values in itertools.product((128, 64), (64, 128, 32), (8, 4), (3, 2, 4))
        ]
        found += _best(tried, _prefilled(case), deadline)
    return found


def _decoded(case: DecodeCase) -> Callable[[DecodeConfig], dict]:
    """Twelve layers are enough to read past L2: 400 MB at 1 x 8192."""
    return lambda config: case.row(str(config), replayed_us(case.launch(config), 12))


def _prefilled(case: PrefillCase) -> Callable[[PrefillConfig], dict]:
    return lambda config: case.row(str(config), layered_us(case.launch(config)))


def _ranked_variants(cases: list[DecodeCase], variants: list[dict], deadline: float) -> list[dict]:
    """The three variants whose times, relative to the best of each of two shapes, add up least."""
    chosen = [cases[1], cases[3]]
    best = [float("inf")] * len(chosen)
    times = {}
    for number, variant in enumerate(variants):
        if time.monotonic() > deadline:
            break
        took = []
        for case in chosen:
            config = choose_config(case.rows, KV_HEADS, HEAD_DIM, 2, CONTEXT_MAX, 132)
            result = _measured(dataclasses.replace(config, **variant), _decoded(case))
            took.append(result["us"] if result else float("inf"))
        times[number] = took
        best = [min(a, b) for a, b in zip(best, took, strict=True)]
        print("tune", variant, [f"{us:.1f} us" for us in took], flush=True)
    scores = {n: sum(a / b for a, b in zip(took, best, strict=True)) for n, took in times.items()}
    return [variants[number] for number in sorted(scores, key=scores.__getitem__)[:3]]


def _best(configs: list, measure: Callable, deadline: float, keep: int = 3) -> list[dict]:
    results = []
    for config in configs:
        if time.monotonic() > deadline:
            print(f"out of time after {len(results)} of {len(configs)}", flush=True)
            break
        result = _measured(config, measure)
        if result is not None:
            results.append(result)
    return sorted(results, key=lambda row: row["us"])[:keep]


def _measured(config: object, measure: Callable) -> dict | None:
    """None for a configuration that does not fit the GPU."""
    try:
        return measure(config)
    except triton.runtime.errors.OutOfResources as error:
        print(f"{config}: {error}", file=sys.stderr)
        return None
