"""Products of few rows: every way to cut them, beside cuBLAS and the floor of their bytes.

    PYTHONPATH=. python3 tools/gpu/tune_matmul.py [--budget S] [--models 8B 0.6B] [--rows 1 8 64]
        [--keep N] [--seed N] [--json FILE]

Each product of a model's layer, at each number of rows: configurations drawn from the space below,
compiled side by side on all cores, checked against a float32 product, then timed as a graph of
pairs, the norm and the product behind it as in a layer, over weights of many layers, so that nothing
comes from L2. The best of each are printed and written to FILE: what the table of
ops.kernels.small_matmul is made from.
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
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from holdfast.ops.kernels.norm import add_rms_norm
from holdfast.ops.kernels.small_matmul import MatmulConfig, run

BF16 = torch.bfloat16
BYTES_PER_S = 4.24e12
# (N of the result, K, gated)
SHAPES = {
    "8B": {
        "qkv": (6144, 4096, False),
        "output": (4096, 4096, False),
        "gate_up": (24_576, 4096, False),
        "gated": (12_288, 4096, True),
        "down": (4096, 12_288, False),
        "head": (151_936, 4096, False),
    },
    "0.6B": {
        "qkv": (4096, 1024, False),
        "output": (1024, 2048, False),
        "gate_up": (6144, 1024, False),
        "gated": (3072, 1024, True),
        "down": (1024, 3072, False),
        "head": (151_936, 1024, False),
    },
}
SHARED_MAX = 220 << 10
REPEATS = 5


def space(n: int, k: int, gated: bool, rows: int) -> list[MatmulConfig]:
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    found = []
    for block_n, block_k, splits, warps, stages, swapped, bulk, prefetch, early in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (1, 2, 3, 4, 6, 8), (4, 8), (3, 4, 6, 8),
        (False, True), (False, True), (0, 2, 8), (False, True),
    ):  # fmt: skip
        shared = (block_n * (1 + gated) + tall) * block_k * 2 * stages
        programs = -(-n // block_n) * splits
        if shared > SHARED_MAX or shared < 32 << 10 or k < block_k * splits * 2:
            continue
        if swapped and block_n < 64 or (not swapped and tall < 64 and block_n > 64):
            continue
        if warps == 8 and block_n * tall < 2048 or programs < 96 or (splits > 1 and programs > 800):
            continue
        if bulk and block_n < 32:
            continue
        if prefetch * 64 > k // splits:
            continue
        found.append(
            MatmulConfig(
                tall, block_n, block_k, splits, warps, stages, swapped, bulk, prefetch, early
            )
        )
    return found


class Case:
    def __init__(self, n: int, k: int, gated: bool, rows: int, layers: int = 0) -> None:
        self.n, self.k, self.gated, self.rows = n, k, gated, rows
        self.bytes = n * (1 + gated) * k * 2
        layers = layers or max(2, min(36, int(2e9 // self.bytes)))
        self.weights = [
            torch.randn((n * (1 + gated), k), device="cuda", dtype=BF16) * k**-0.5
            for _ in range(layers)
        ]
        self.x = torch.randn((rows, k), device="cuda", dtype=BF16)
        self.stream = torch.randn((rows, k), device="cuda", dtype=BF16)
        self.scale = torch.ones(k, device="cuda", dtype=BF16)
        self.out = torch.zeros((rows, n), device="cuda", dtype=BF16)
        self.partial = torch.zeros(2 * 8 * 128 * min(n, 32_768), device="cuda")
        self.arrivals = torch.zeros(16_384, device="cuda", dtype=torch.int32)
        self.wide = torch.zeros((rows, n * (1 + gated)), device="cuda", dtype=BF16)

    def ours(self, config: MatmulConfig, layer: int, dependent: bool) -> None:
        run(
            self.x,
            self.weights[layer],
            None,
            self.out,
            config,
            self.partial,
            self.arrivals,
            gated=self.gated,
            dependent=dependent,
        )

    def normed(self) -> None:
        add_rms_norm(self.stream, None, self.scale, 1e-6, self.x)

    def pair(self, config: MatmulConfig, layer: int) -> None:
        self.normed()
        self.ours(config, layer, True)

    def cublas(self, layer: int) -> None:
        self.normed()
        torch.mm(self.x, self.weights[layer].t(), out=self.wide)

    def right(self, config: MatmulConfig) -> float:
        """Relative error by norm, against float32."""
        expected = self.x.float() @ self.weights[0].float().t()
        if self.gated:
            gate, up = expected.chunk(2, 1)
            expected = torch.nn.functional.silu(gate) * up
        worst = 0.0
        for _ in range(2):
            self.out.fill_(7.0)
            self.ours(config, 0, True)
            worst = max(worst, float((self.out.float() - expected).norm() / expected.norm()))
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
    n, k, gated, rows, config = job
    try:
        key = (n, k, gated, rows)
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
    end_s = time.monotonic() + asked.budget
    random.seed(asked.seed)
    cells, jobs = [], []
    for model, rows in itertools.product(asked.models, asked.rows):
        for name, (n, k, gated) in SHAPES[model].items():
            if asked.shapes and name not in asked.shapes:
                continue
            configs = space(n, k, gated, rows)
            some = random.sample(configs, min(asked.keep, len(configs)))
            cells.append((model, name, (n, k, gated, rows), some))
            jobs += [(n, k, gated, rows, config) for config in some]
    compiled: set = set()
    refused: dict = {}
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, job) for job in jobs]
        try:
            for future in as_completed(futures, timeout=asked.budget * 0.6):
                job, why = future.result()
                if why is None:
                    compiled.add(job)
                else:
                    refused[why[:60]] = refused.get(why[:60], 0) + 1
        except Exception as error:
            print("compiling ended:", repr(error)[:200], flush=True)
        for process in list(pool._processes.values()):
            process.kill()
    left = end_s - time.monotonic()
    print(f"{len(compiled)} of {len(jobs)} compiled, {left:.0f} s left; {refused}", flush=True)
    rows_found = []
    for model, name, key, some in cells:
        case = Case(*key)
        floor = case.bytes / BYTES_PER_S * 1e6
        cublas = case.us(case.cublas)
        tried = []
        for config in some:
            if (*key, config) not in compiled or time.monotonic() > end_s:
                continue
            error = case.right(config)
            if error > 1e-2:
                print("WRONG", model, name, config, error, flush=True)
                continue
            tried.append((case.us(lambda layer, config=config: case.pair(config, layer)), config))
        tried.sort(key=lambda one: one[0])
        for rank, (took, config) in enumerate(tried[:4]):
            c = config
            print(
                f"{model:5}{name:8} m {key[3]:3} cublas {cublas:7.1f} floor {floor:7.1f} ours "
                f"{took:7.1f}  n{c.block_n} k{c.block_k} s{c.splits} "
                f"w{c.warps} st{c.stages} {'swap' if c.swapped else '    '} "
                f"{'bulk' if c.bulk else '    '} p{c.prefetch} {'early' if c.early else 'late '}"
                + (f"  of {len(tried)}" * (not rank)),
                flush=True,
            )
        rows_found.append(
            {
                "model": model,
                "product": name,
                "rows": key[3],
                "cublas_us": cublas,
                "floor_us": floor,
                "tried": [
                    {"us": took, **dataclasses.asdict(config)} for took, config in tried[:16]
                ],
            }
        )
        del case
        torch.cuda.empty_cache()
        asked.json.write_text(
            json.dumps(
                {"torch": torch.__version__, "triton": triton.__version__, "rows": rows_found},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
