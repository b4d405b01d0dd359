"""Prefill attention: every kernel of ours and its configurations, beside FlashInfer's.

    PYTHONPATH=. python3 tools/gpu/tune_prefill.py [--budget S] [--kinds paged warp]
        [--rivals] [--json FILE]

Each configuration is compiled and launched once in a process of its own, many side by side; one
that does not come back (its warps wait for one another) is left out. What is left is held against
the kernel that reads pages and timed as a replayed graph of four layers, with and without the
gather. TFLOP/s count the gather's time in the first column.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import attention_rivals
import numpy as np
import torch
import triton
from attention_cases import (
    DEVICE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE_TOKENS,
    SHAPE,
    blank,
    noise,
    on_device,
    replayed_us,
)

from holdfast.ops.kernels.gather_config import ALIGN
from holdfast.ops.kernels.gather_kv import Gathered, gather_kv, place_rows
from holdfast.ops.kernels.prefill_attention import PrefillAttention, PrefillConfig, cut_tiles
from holdfast.ops.kernels.warp_prefill import WarpConfig, WarpPrefill

Launch = Callable[[int], object]
LAYERS = 4
# (rows, query tokens, cached tokens). Of the short ones gather_config.QUERY_TOKENS_MIN is made.
CASES = (
    (4, 8192, 0), (16, 1024, 0), (2, 512, 1024), (2, 4096, 0), (1, 1024, 2048), (64, 128, 0),
    (32, 256, 0), (8, 128, 2048), (4, 256, 4096),
)  # fmt: skip
TOLERANCE = 1e-2
KINDS = ("paged", "warp")


class Case:
    """Rows of prompts over a pool of four layers."""

    def __init__(self, rows: int, query_len: int, start: int) -> None:
        self.name = f"{rows} x {query_len}" + (f" on {start}" if start else "")
        self.rows, self.query_len, self.context = rows, query_len, start + query_len
        self.lens = np.full(rows, query_len, np.int32)
        self.starts = np.full(rows, start, np.int32)
        columns = -(-self.context // PAGE_TOKENS)
        pages = rows * columns + 1
        shape = (pages, LAYERS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        self.pool = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        order = np.random.default_rng(0).permutation(pages - 1) + 1
        self.table = on_device(order.reshape(rows, columns).astype(np.int32))
        self.qkv, self.out = noise(rows * query_len), blank(rows * query_len)
        lengths = self.lens + self.starts
        placed = place_rows(lengths, self.starts)
        self.places, self.owners, self.used = map(on_device, placed)
        self.scratch = torch.zeros(
            (2, KV_HEADS, self.owners.numel() * ALIGN, HEAD_DIM),
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        seen = query_len * start + query_len * (query_len + 1) // 2
        self.flop = 4 * HEAD_DIM * HEADS * rows * seen

    def gather(self, layer: int) -> None:
        gather_kv(self.pool, layer, self.gathered(self.places), self.scratch)

    def gathered(self, tiles: torch.Tensor) -> Gathered:
        return Gathered(self.table, self.places, self.owners, self.used, tiles)

    def attention(self, config: object) -> Launch:
        """launch of a layer, the gather left out."""
        if isinstance(config, PrefillConfig):
            paged = PrefillAttention(config=config, **SHAPE)
            tiles = on_device(cut_tiles(self.lens, self.starts, paged.tile_tokens))
            return lambda layer: paged.run(self.qkv, self.pool, layer, self.table, tiles, self.out)
        made = WarpPrefill(self.scratch, heads=HEADS, kv_heads=KV_HEADS, config=config)
        rows = self.gathered(on_device(cut_tiles(self.lens, self.starts, made.tile_tokens)))
        return lambda layer: made.attend(self.qkv, rows, self.out)

    def rate(self, us: float) -> float:
        return self.flop / us / 1e6


def behind(first: Launch, second: Launch) -> Launch:
    """Both launches of a layer."""
    return lambda layer: (first(layer), second(layer))


def space(kinds: Sequence[str]) -> list:
    found: list = []
    if "paged" in kinds:
        found.append(PrefillConfig())
    if "warp" in kinds:
        for (block, stages), heads, tiles_first, persistent in itertools.product(
            ((128, 2), (64, 4)), (0, 1), (True, False), (False, True)
        ):
            found.append(WarpConfig(block, stages, heads, tiles_first, persistent))
    return found


def tried(config: object) -> tuple[object, str | None]:
    """In a process of its own: compile the configuration and see that it ends."""
    try:
        case = Case(2, 300, 40)
        case.gather(0)
        case.attention(config)(0)
        torch.cuda.synchronize()
        return config, None
    except Exception as error:  # What does not fit is left out.
        if "illegal" in str(error) or "launch failure" in str(error):
            print(config, repr(error)[:200], flush=True)
            os._exit(1)
        return config, repr(error)[:300]


def usable(configs: list, seconds: float) -> list:
    """Those that compiled and came back in time."""
    good, refused = [], {}
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(tried, config) for config in configs]
        try:
            for future in as_completed(futures, timeout=seconds):
                config, why = future.result()
                if why is None:
                    good.append(config)
                else:
                    refused.setdefault(why[:80], []).append(config)
        except Exception as error:
            print("compiling ended:", repr(error)[:200], flush=True)
        for process in list(pool._processes.values()):
            process.kill()
    for why, some in refused.items():
        print(f"refused {len(some)}: {why}; first {some[0]}", flush=True)
    lost = [config for config in configs if config not in good]
    print(f"{len(good)} of {len(configs)} usable; not: {lost[:6]}", flush=True)
    return [config for config in configs if config in good]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=90.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rivals", action="store_true", help="FlashInfer beside ours")
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "pf.json")
    asked = parser.parse_args()
    end_s = time.monotonic() + asked.budget
    torch.manual_seed(0)
    configs = usable(space(asked.kinds), asked.budget * 0.5)
    print(f"{end_s - time.monotonic():.0f} s left", flush=True)
    rows = []
    for rows_, query_len, start in CASES:
        case = Case(rows_, query_len, start)
        case.attention(PrefillConfig())(0)
        expected = case.out.float()
        gather = statistics.median(replayed_us(case.gather, LAYERS))
        found = []
        for config in configs:
            if time.monotonic() > end_s:
                print("out of time", flush=True)
                break
            launch = case.attention(config)
            case.gather(0)
            case.out.fill_(float("nan"))
            launch(0)
            error = float((case.out.float() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                print(f"WRONG {case.name} {config}: relative error {error}", flush=True)
                continue
            alone = statistics.median(replayed_us(launch, LAYERS))
            whole = alone
            if not isinstance(config, PrefillConfig):
                whole = statistics.median(replayed_us(behind(case.gather, launch), LAYERS))
            found.append((whole, alone, str(config)))
            rows.append({"case": case.name, "us": whole, "alone_us": alone,
                         "kind": type(config).__name__, **asdict(config)})  # fmt: skip
        if asked.rivals:
            q = case.qkv[:, : HEADS * HEAD_DIM].contiguous().view(-1, HEADS, HEAD_DIM)
            lengths = torch.full((rows_,), case.context, dtype=torch.int32, device=DEVICE)
            for name, launch in attention_rivals.prefill(
                case.pool, q, case.table, lengths, query_len
            ):
                took = statistics.median(replayed_us(launch, LAYERS))
                found.append((took, took, name))
                rows.append({"case": case.name, "us": took, "kind": name})
        print(f"== {case.name}: gather {gather:.1f} us, {case.flop / 1e9:.0f} GFLOP", flush=True)
        for whole, alone, name in sorted(found):
            print(
                f"{whole:9.1f} us {case.rate(whole):6.1f} TFLOP/s; alone {alone:9.1f} us "
                f"{case.rate(alone):6.1f}  {name}",
                flush=True,
            )
        del case, expected
        torch.cuda.empty_cache()
    facts = {"torch": torch.__version__, "triton": triton.__version__, "rows": rows}
    asked.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
