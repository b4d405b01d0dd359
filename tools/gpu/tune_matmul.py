"""Products of few rows: every way to cut them, beside cuBLAS and the floor of their bytes.

    PYTHONPATH=. python3 tools/gpu/tune_matmul.py [--budget S] [--models 8B 0.6B] [--rows 1 8 64]
        [--keep N] [--seed N] [--json FILE]

Each product of a model's layer, at each number of rows: configurations drawn from the space below,
compiled side by side on all cores, checked against a float32 product, then timed as a graph of
pairs, the norm and the product behind it as in a layer, over weights of many layers, so that
nothing comes from L2. The best of each are printed and written to FILE: what
ops.kernels.matmul_config is made from.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from holdfast.ops.kernels.matmul_config import ROWS_MAX, MatmulConfig, choose_config
from holdfast.ops.kernels.norm import add_rms_norm
from holdfast.ops.kernels.small_matmul import SmallMatmul

BF16 = torch.bfloat16
BYTES_PER_S = 4.24e12
# (N, K)
SHAPES = {
    "8B": {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (24_576, 4096),
        "down": (4096, 12_288),
        "head": (151_936, 4096),
    },
    "0.6B": {
        "qkv": (4096, 1024),
        "output": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151_936, 1024),
    },
}
SHARED_MAX = 220 << 10
REPEATS = 5


def space(n: int, k: int, rows: int) -> list[MatmulConfig]:
    """The ways to cut a product that fit an SM and give it work enough."""
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


class Case:
    def __init__(self, n: int, k: int, rows: int, layers: int = 0) -> None:
        self.n, self.k, self.rows = n, k, rows
        self.bytes = n * k * 2
        layers = layers or max(2, min(36, int(2e9 // self.bytes)))
        self.weights = [
            torch.randn((n, k), device="cuda", dtype=BF16) * k**-0.5 for _ in range(layers)
        ]
        self.x = torch.randn((rows, k), device="cuda", dtype=BF16)
        self.stream = torch.randn((rows, k), device="cuda", dtype=BF16)
        self.scale = torch.ones(k, device="cuda", dtype=BF16)
        self.out = torch.zeros((rows, n), device="cuda", dtype=BF16)
        # A workspace for any of them; wide products are not split.
        most = MatmulConfig(64, 16, 64, 8 if n < 1 << 15 else 1)
        self.small = SmallMatmul("cuda", [(n, k)], rows, config_of=lambda *_: most)
        self.expected: torch.Tensor | None = None
        self.wide = torch.zeros((rows, n), device="cuda", dtype=BF16)

    def normed(self) -> None:
        add_rms_norm(self.stream, None, self.scale, 1e-6, self.x)

    def pair(self, config: MatmulConfig, layer: int) -> None:
        self.normed()
        self.small.run(self.x, self.weights[layer], None, self.out, config)

    def cublas(self, layer: int) -> None:
        self.normed()
        torch.mm(self.x, self.weights[layer].t(), out=self.wide)

    def right(self, config: MatmulConfig) -> float:
        """Relative error by norm, against float32."""
        self.normed()
        if self.expected is None:
            self.expected = self.x.float() @ self.weights[0].float().t()
        worst = 0.0
        for _ in range(2):
            self.out.fill_(7.0)
            self.pair(config, 0)
            apart = (self.out.float() - self.expected).norm() / self.expected.norm()
            worst = max(worst, float(apart))
        return worst

    def us(self, launch) -> float:
        graph = torch.cuda.CUDAGraph()
        launch(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for layer in range(len(self.weights)):
                launch(layer)
        graph.replay()
        pairs = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        took = statistics.median(start.elapsed_time(end) for start, end in pairs)
        return 1e3 * took / len(self.weights)


_CASES: dict = {}


def compile_one(job: tuple) -> tuple:
    """In a process of its own: launch it once, so that it lies in Triton's cache."""
    n, k, rows, config = job
    try:
        key = (n, k, rows)
        if key not in _CASES:
            _CASES.clear()
            _CASES[key] = Case(*key, layers=1)
        _CASES[key].pair(config, 0)
        torch.cuda.synchronize()
        return job, None
    except Exception as error:  # What does not fit is left out.
        if "illegal" in str(error) or "launch failure" in str(error):
            os._exit(1)
        return job, repr(error)[:200]


def compile_all(jobs: list[tuple], budget_s: float) -> set:
    """The jobs that ran, in so many seconds; the others are told of."""
    compiled: set = set()
    refused: dict = {}
    if not jobs:
        return compiled
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, job) for job in jobs]
        try:
            for future in as_completed(futures, timeout=max(1.0, budget_s)):
                job, why = future.result()
                if why is None:
                    compiled.add(job)
                else:
                    refused[why[:60]] = refused.get(why[:60], 0) + 1
        except Exception as error:
            print("compiling ended:", repr(error)[:200], flush=True)
        for process in list((pool._processes or {}).values()):
            process.kill()
    print(f"compiled {len(compiled)} of {len(jobs)}; {refused}", flush=True)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--models", nargs="+", default=["8B", "0.6B"])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--keep", type=int, default=24, help="configurations of a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "mm.json")
    asked = parser.parse_args()
    if not all(0 < rows <= ROWS_MAX for rows in asked.rows):
        parser.error(f"--rows: 1 to {ROWS_MAX}; cuBLAS has products of more")
    end_s = time.monotonic() + asked.budget
    random.seed(asked.seed)
    cells, jobs = [], []
    for model, rows in itertools.product(asked.models, asked.rows):
        for name, (n, k) in SHAPES[model].items():
            if asked.shapes and name not in asked.shapes:
                continue
            configs = space(n, k, rows)
            some = random.sample(configs, min(asked.keep, len(configs)))
            if (chosen := choose_config(n, k, rows, 132)) is not None:
                some.insert(0, chosen)
            cells.append((model, name, (n, k, rows), some))
            jobs += [(n, k, rows, config) for config in some]
    compiled = compile_all(jobs, asked.budget * 0.6)
    left = end_s - time.monotonic()
    print(f"{len(compiled)} of {len(jobs)} compiled, {left:.0f} s left", flush=True)
    rows_found = []
    for model, name, key, some in cells:
        tried = [config for config in some if (*key, config) in compiled]
        # Of the time that is left, each cell has its share.
        now_s = time.monotonic()
        cell_end_s = now_s + (end_s - now_s) / (len(cells) - len(rows_found))
        rows_found.append({"model": model, "product": name} | measured(key, tried, cell_end_s))
        show(rows_found[-1])
        torch.cuda.empty_cache()
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        asked.json.write_text(json.dumps(versions | {"rows": rows_found}, indent=1))


def measured(key: tuple[int, int, int], configs: list[MatmulConfig], end_s: float) -> dict:
    """Microseconds of one product by cuBLAS, by what the table says and by each configuration."""
    case, chosen = Case(*key), choose_config(*key, 132)
    cublas = case.us(case.cublas)
    tried = []
    for config in configs:
        if time.monotonic() > end_s:
            break
        if (error := case.right(config)) > 1e-2:
            print("WRONG", key, config, error, flush=True)
            continue
        tried.append((case.us(partial(case.pair, config)), config))
    tried.sort(key=lambda one: one[0])
    return {
        "rows": key[2],
        "cublas_us": cublas,
        "table_us": next((took for took, config in tried if config == chosen), cublas),
        "floor_us": case.bytes / BYTES_PER_S * 1e6,
        "tried": [{"us": took} | dataclasses.asdict(config) for took, config in tried[:16]],
    }


def show(row: dict) -> None:
    for config in row["tried"][:4]:
        print(
            f"{row['model']:5}{row['product']:8} m {row['rows']:3} cublas {row['cublas_us']:6.1f} "
            f"table {row['table_us']:6.1f} floor {row['floor_us']:6.1f} ours {config['us']:6.1f}  "
            f"n{config['block_n']} k{config['block_k']} s{config['splits']} w{config['warps']} "
            f"st{config['stages']} {'swapped' if config['swapped'] else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
