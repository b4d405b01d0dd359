"""What one decoder step costs on this CPU, and the floor under it.

    python tools/bench_decoder_cpu.py [MODEL] [--threads 2] [--profile] [--json]

Decode: milliseconds a step (forward and logits) for B rows of one context; prefill: tokens a second
of one row's chunk at position 0. Pages are scattered at random over a pool as large as the case
needs, and the layers' weights and pages are far larger than the caches, as in serving. The floor is
the larger of the step's multiply-adds at the measured speed of a large product and its bytes of
weights and KV at the measured speed of reading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from holdfast.model.decoder import Decoder
from holdfast.model.spec import ModelSpec, resolve_model
from holdfast.model.weights import WeightsLayout, load_weights
from holdfast.ops.attention import AttentionBatch

PAGE_TOKENS = 16
DECODE_ROWS = (1, 8, 32, 64)
DECODE_CONTEXTS = (256, 512)
PREFILL_CHUNKS = (128, 512)


class Case:
    """B rows of one context, `query` tokens each, in a pool of scattered pages."""

    def __init__(self, decoder: Decoder, rows: int, start: int, query: int) -> None:
        spec = decoder.spec
        columns = -(-(start + query) // PAGE_TOKENS)
        generator = torch.Generator().manual_seed(7)
        self.decoder = decoder
        pages = rows * columns + 1
        shape = (pages, spec.layers, 2, PAGE_TOKENS, spec.kv_heads, spec.head_dim)
        self.pool = torch.empty(shape).normal_(generator=generator)
        scattered = torch.randperm(pages - 1, generator=generator).numpy() + 1
        self.table = scattered.astype(np.int32).reshape(rows, columns)
        self.query = np.full(rows, query, np.int32)
        self.start = np.full(rows, start, np.int32)
        count = rows * query
        self.tokens = torch.randint(3, spec.vocab_size, (count,), generator=generator)
        self.positions = torch.arange(start, start + query).repeat(rows)
        self.last = torch.arange(query - 1, count, query)

    def step(self) -> torch.Tensor:
        batch = AttentionBatch.build(self.query, self.start, self.table, PAGE_TOKENS, "cpu")
        hidden = self.decoder.forward(self.tokens, self.positions, batch, self.pool)
        return self.decoder.logits(hidden[self.last])


def best_ms(work: Callable[[], object], seconds: float = 1.5) -> tuple[float, float]:
    """(fastest, median) milliseconds of `work`, over about `seconds`."""
    work()
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times), statistics.median(times)


def machine() -> tuple[float, float]:
    """(multiply-adds a second of a large float32 product, bytes a second of reading)."""
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    large = torch.randn(64 << 20)
    products = 1024**3 / best_ms(lambda: torch.mm(a, b, out=out))[0] * 1e3
    reading = large.numel() * 4 / best_ms(lambda: large.sum())[0] * 1e3
    return products, reading


def floor_ms(spec: ModelSpec, case: Case, products: float, reading: float) -> float:
    """Time below which the step cannot be: arithmetic and reading, whichever is longer a part."""
    hidden, query = spec.hidden_size, spec.heads * spec.head_dim
    key = spec.kv_heads * spec.head_dim
    layer = hidden * (query + 2 * key) + query * hidden + 3 * hidden * spec.intermediate_size
    tokens, rows = case.tokens.numel(), case.query.size
    head = hidden * spec.vocab_size
    linear = tokens * spec.layers * layer + rows * head
    seen = float((case.query * (case.start + (case.query + 1) / 2)).sum())
    attention = 2 * spec.layers * seen * query
    kv = rows * float((case.start + case.query)[0]) * spec.kv_token_bytes("float32")
    weights = 4.0 * (spec.layers * layer + head)
    part = max(linear / products, weights / reading)
    return 1e3 * (part + max(attention / products, kv / reading))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each case")
    parser.add_argument("--profile", action="store_true", help="operators of decode, 64 rows")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = ModelSpec.load(resolve_model(options.model))
    layout = WeightsLayout.of(spec, "float32")
    slab = torch.empty(layout.bytes, dtype=torch.uint8)
    load_weights(spec, slab, layout)
    decoder = Decoder(spec, layout.views(slab))
    if options.profile:
        profile(Case(decoder, 64, 400, 1))
        return
    products, reading = machine()
    found: dict[str, object] = {"gflops": 2e-9 * products, "read_gb_per_s": 1e-9 * reading}
    print(f"{2e-9 * products:.0f} GFLOP/s, {1e-9 * reading:.1f} GB/s read")
    for context in DECODE_CONTEXTS:
        for rows in DECODE_ROWS:
            case = Case(decoder, rows, context - 1, 1)
            fast, median = best_ms(case.step, options.seconds)
            floor = floor_ms(spec, case, products, reading)
            found[f"decode_{rows}_{context}_ms"] = fast
            print(
                f"decode  B={rows:<3} context {context}: {fast:6.2f} ms a step (median "
                f"{median:.2f}), {rows / fast * 1e3:6.0f} tokens/s, floor {floor:.2f} ms"
            )
    for chunk in PREFILL_CHUNKS:
        case = Case(decoder, 1, 0, chunk)
        fast, median = best_ms(case.step, options.seconds)
        floor = floor_ms(spec, case, products, reading)
        found[f"prefill_{chunk}_tokens_per_s"] = chunk / fast * 1e3
        print(
            f"prefill chunk {chunk}: {fast:6.2f} ms (median {median:.2f}), "
            f"{chunk / fast * 1e3:6.0f} tokens/s, floor {floor:.2f} ms"
        )
    if options.json:
        print(json.dumps(found))


def profile(case: Case) -> None:
    """Print where the time of a decode step goes, by operator."""
    for _ in range(5):
        case.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(20):
            case.step()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=24))


if __name__ == "__main__":
    main()
