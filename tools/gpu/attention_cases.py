"""What bench_attention.py and --tune measure: an 8B model's pages, cases, and how they are timed.

Each layer of a measurement reads pages of its own, so nothing comes from L2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch

from holdfast.ops.attention import AttentionBatch, Scratch
from holdfast.ops.attention_triton import TritonAttention
from holdfast.ops.kernels.decode_attention import DecodeAttention
from holdfast.ops.kernels.decode_config import DecodeConfig
from holdfast.ops.kernels.prefill_attention import PrefillAttention, PrefillConfig, cut_tiles

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, LAYERS = 32, 8, 128, 16, 36
SHAPE = {
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "page_tokens": PAGE_TOKENS,
}
PAGES = 128 * 2048 // PAGE_TOKENS + 1
CONTEXT_MAX = 40960
DECODE = ((1, 8192), (8, 4096), (64, 2048), (128, 2048), (256, 1024))
PREFILL = ((4, 8192), (16, 1024))
# What shared/gpu/README.md measured of this kind of machine.
BYTES_PER_S, FLOP_PER_S = 4.24e12, 786e12
REPEATS = 9
DEVICE = torch.device("cuda:0")


class Pages:
    """The pool, full of noise, and tables of shuffled pages over it."""

    def __init__(self) -> None:
        shape = (PAGES, LAYERS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        self.pool = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        self.refill()
        self._rng = np.random.default_rng(0)

    def refill(self) -> None:
        for page in self.pool.split(1024):
            page.normal_()

    def table(self, rows: int, context: int) -> np.ndarray:
        """int32[rows, pages of the context]: no page twice, none of them page 0."""
        columns = -(-context // PAGE_TOKENS)
        order = self._rng.permutation(PAGES - 1)[: rows * columns] + 1
        return order.reshape(rows, columns).astype(np.int32)


def noise(tokens: int) -> torch.Tensor:
    """qkv of a step."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return torch.randn(tokens, width, dtype=torch.bfloat16, device=DEVICE)


def blank(tokens: int) -> torch.Tensor:
    return torch.full((tokens, HEADS * HEAD_DIM), float("nan"), dtype=torch.bfloat16, device=DEVICE)


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def poison_tails(pages: Pages, table: np.ndarray, lengths: np.ndarray) -> None:
    """NaN behind the last token of each row, in the table's later pages and in page 0."""
    pages.pool[0] = float("nan")
    for row, length in zip(table, lengths, strict=True):
        column, offset = divmod(int(length), PAGE_TOKENS)
        if column < row.size:
            pages.pool[int(row[column]), :, :, offset:] = float("nan")
            pages.pool[on_device(row[column + 1 :].astype(np.int64))] = float("nan")


class DecodeCase:
    """One bucket: rows of one length, or of lengths drawn evenly from `least` to it."""

    def __init__(self, pages: Pages, rows: int, context: int, least: int | None = None) -> None:
        self.pages, self.rows, self.context = pages, rows, context
        self.table = on_device(pages.table(rows, context))
        lengths = np.full(rows, context, np.int32)
        if least is not None:
            lengths = np.random.default_rng(rows).integers(least, context + 1, rows, np.int32)
        self.shape = f"{rows} x {context}" if least is None else f"{rows} x {least}..{context}"
        self.lengths = on_device(lengths)
        self.qkv, self.out = noise(rows), blank(rows)
        kv = int(lengths.sum()) * 2 * KV_HEADS * HEAD_DIM
        self.bytes = 2 * (kv + 2 * rows * HEADS * HEAD_DIM)

    def launch(self, config: DecodeConfig | None = None) -> Callable[[int], object]:
        attention = DecodeAttention(
            DEVICE,
            rows_max=self.rows,
            query_len_max=1,
            context_max=CONTEXT_MAX,
            config_of=None if config is None else lambda _: config,
            **SHAPE,
        )
        pool, table, lengths = self.pages.pool, self.table, self.lengths
        return lambda layer: attention.run(self.qkv, pool, layer, table, lengths, self.out)

    def row(self, name: str, samples: list[float]) -> dict:
        took = statistics.median(samples)
        return {
            "part": "decode",
            "shape": self.shape,
            "name": name,
            "us": took,
            "TB/s": self.bytes / took / 1e6,
            "of floor": took * 1e-6 * BYTES_PER_S / self.bytes,
            "samples": samples,
        }


class PrefillCase:
    """Whole prompts of one length."""

    def __init__(self, pages: Pages, rows: int, context: int) -> None:
        self.pages, self.rows, self.context = pages, rows, context
        self.table = on_device(pages.table(rows, context))
        self.qkv, self.out = noise(rows * context), blank(rows * context)
        self.flop = 4 * HEAD_DIM * HEADS * rows * (context * (context + 1) // 2)

    def launch(self, config: PrefillConfig) -> Callable[[int], object]:
        """The kernel that reads pages, of one configuration."""
        attention = PrefillAttention(config=config, **SHAPE)
        lens = np.full(self.rows, self.context, np.int32)
        tiles = on_device(cut_tiles(lens, np.zeros_like(lens), attention.tile_tokens))
        pool = self.pages.pool
        return lambda layer: attention.run(self.qkv, pool, layer, self.table, tiles, self.out)

    def engine(self) -> tuple[str, Callable[[int], object]]:
        """What the engine launches for such a step, and which kernel it chose."""
        attention = TritonAttention(
            DEVICE, rows_max=self.rows, query_len_max=1, context_max=CONTEXT_MAX, **SHAPE
        )
        lens, pool = np.full(self.rows, self.context, np.int32), self.pages.pool
        table = self.table.cpu().numpy()
        batch = AttentionBatch.build(lens, np.zeros_like(lens), table, PAGE_TOKENS, DEVICE)
        heads = HEADS, KV_HEADS
        plan = attention.plan(batch, pool, *heads, self.qkv.dtype, Scratch(DEVICE))
        name = "holdfast, from pages" if plan.gathered is None else "holdfast, gathered"
        return name, lambda layer: attention.attend(plan, pool, layer, self.qkv, self.out)

    def row(self, name: str, samples: list[float]) -> dict:
        took = statistics.median(samples)
        return {
            "part": "prefill",
            "shape": f"{self.rows} x {self.context}",
            "name": name,
            "us": took,
            "TFLOP/s": self.flop / took / 1e6,
            "of floor": took * 1e-6 * FLOP_PER_S / self.flop,
            "samples": samples,
        }


def replayed_us(launch: Callable[[int], object], layers: int = LAYERS) -> list[float]:
    """Microseconds of GPU time a layer, of replays of a graph of all layers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
        launch(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            launch(layer)
    return timed_us(graph.replay, layers)


def timed_us(work: Callable[[], object], layers: int, repeats: int = REPEATS) -> list[float]:
    work()
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) / layers for start, end in pairs]


def layered_us(launch: Callable[[int], object], layers: int = 4) -> list[float]:
    return timed_us(lambda: [launch(layer) for layer in range(layers)], layers)
