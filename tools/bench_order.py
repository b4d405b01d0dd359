"""Throughput of the page-order checker in page accesses a second, for steps large and small.

    .venv/bin/python tools/bench_order.py [--seconds S]

Each round tells the checker what one decode step tells it: the step waits for a load, runs, records
an event; a copy waits for that event and stores some pages. Reads repeat (shared prefixes) and are
scattered over the pool. Rounds are timed in batches and the best and the median batch are printed;
an access is one page named by one operation, read or written, repeats included.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from holdfast.wire.order import OrderChecker, Pages

STREAMS = ("compute", "h2d", "d2h", "seal", "disk", "verify")
# A 16-token page of an 8B model is 2 MiB: 120 GiB of KV are some 61,000 pages.
DEVICE_PAGES = 61_440
HOST_PAGES = 2 * DEVICE_PAGES


def rounds(rows: int, columns: int, copied: int, generations: bool, seconds: float) -> list[float]:
    """Accesses a second of each timed batch, and a check that nothing was found."""
    draw = np.random.default_rng(7)
    checker = OrderChecker({"device": DEVICE_PAGES, "host": HOST_PAGES}, STREAMS, trash=["device"])
    tables = draw.integers(1, DEVICE_PAGES, (rows, columns)).astype(np.int32)
    writes = tables[:, -1].copy()
    stored = draw.permutation(HOST_PAGES)[:copied].astype(np.int32)

    def pages(pool: str, index: np.ndarray) -> Pages:
        # uint32, as kv.pages holds them.
        held = np.ones(index.size, np.uint32) if generations else None
        return Pages(pool, index.reshape(-1), held)

    reads, writes = [pages("device", tables)], [pages("device", writes)]
    source, target = pages("device", tables[:, 0][:copied]), pages("host", stored)
    accesses = rows * columns + rows + 2 * copied

    def one_round() -> int:
        found = len(checker.wait("compute", "stored"))
        found += len(checker.launch("compute", reads, writes, "step"))
        checker.record("compute", "stepped")
        if copied:
            found += len(checker.wait("d2h", "stepped"))
            found += len(checker.copy("d2h", source, target, "store"))
        checker.record("d2h", "stored")
        return found

    checker.record("d2h", "stored")
    found = one_round()
    batch = max(1, 400_000 // accesses)
    speeds = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(batch):
            found += one_round()
        speeds.append(batch * accesses / (time.perf_counter() - start))
    if found:
        raise SystemExit(f"the bench's own program is racy: {found} findings")
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    seconds = parser.parse_args().seconds
    print(f"{'case':<52} {'median M/s':>10} {'best M/s':>9} {'us a round':>10}")
    for name, rows, columns, copied in (
        ("large step: 256 rows x 128 pages, 256 written", 256, 128, 0),
        ("large step + store of 64 pages", 256, 128, 64),
        ("huge step: 256 rows x 1024 pages, 256 written", 256, 1024, 0),
        ("prefill: 1 row x 512 pages, 1 written", 1, 512, 0),
        ("small step: 62 pages read, 2 written", 2, 31, 0),
        ("small step + store of 1 page", 2, 31, 1),
    ):
        for generations in (False, True):
            speeds = rounds(rows, columns, copied, generations, seconds)
            median = float(np.median(speeds))
            accesses = rows * columns + rows + 2 * copied
            label = name + (", handles" if generations else "")
            print(
                f"{label:<52} {median / 1e6:>10.1f} {max(speeds) / 1e6:>9.1f} "
                f"{accesses / median * 1e6:>10.1f}"
            )


if __name__ == "__main__":
    main()
