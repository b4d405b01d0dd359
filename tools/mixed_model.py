"""What the bound of a mixed step does to streams, by arithmetic: tools/mixed_model.py.

    PYTHONPATH=. python3 tools/mixed_model.py [--concurrency 16 64 256] [--input 512] [--output 256]

A closed loop of streams over a device whose steps take as long as an H200's do, by sums of what
was measured there (products by their rows, attention by its bytes; docs/benches.md): no engine
runs, and of the scheduler its `_prompt_budget` alone. Prints, for each bound, tokens a second, the
gaps between tokens and the time to the first. Held against two measurements, of 2,048 tokens of
prompts with the rows that decode on top, its first form gave 7,079 tok/s and a p99 of 45 ms where
Qwen3-8B at 64 streams had 6,765 and 52, and 33,432 and 11.7 where Qwen3-0.6B at 256 had 34,096 and
14.1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from holdfast.config import Limits
from holdfast.core.scheduler import Scheduler

PREFILL_TOKENS, ROWS = 8192, 256
# Of a client: from an answer's end to the next request, and between two of them.
_AGAIN_MS, _BETWEEN_MS = 1.0, 0.2


@dataclass(frozen=True)
class Device:
    """products: (rows, ms of all layers' and the head), between which it is linear; row_ms: of
    attention of a row that decodes at 640 tokens; step_ms, token_ms: what else there is; mixed_ms:
    that a step with prompts keeps the host longer than the device."""

    name: str
    products: tuple[tuple[int, float], ...]
    row_ms: float
    step_ms: float
    token_ms: float
    mixed_ms: float = 0.0

    def ms(self, decode: int, prompts: int) -> float:
        rows, took = zip(*self.products, strict=True)
        products = float(np.interp(decode + prompts, rows, took))
        more = self.mixed_ms if prompts else 0.0
        return products + decode * self.row_ms + self.step_ms + prompts * self.token_ms + more


# 1,280 and 2,304 rows are 256 above a power of two: another wave of tiles.
DEVICES = (
    Device(
        "Qwen3-8B",
        (
            *((1, 3.4), (64, 4.0), (128, 4.6), (256, 5.8), (512, 11.2), (768, 16.5), (1024, 20.5)),
            *((1280, 27.0), (2048, 40.6), (2304, 46.5), (8192, 160.0)),
        ),
        row_ms=0.0255,
        step_ms=0.8,
        token_ms=0.0012,
    ),
    Device(
        "Qwen3-0.6B",
        (
            *((1, 0.85), (64, 1.2), (128, 1.25), (256, 1.4), (512, 1.9), (768, 2.4), (1024, 2.9)),
            *((1280, 3.4), (2048, 5.2), (2304, 5.8), (8192, 20.0)),
        ),
        row_ms=0.0158,
        step_ms=0.4,
        token_ms=0.0006,
        mixed_ms=1.0,
    ),
)


def budget_of(mixed: int, decode: int) -> int:
    limits = Limits(
        vocab_size=8,
        context_tokens=4096,
        pages=8,
        live_tokens=1 << 20,
        rows_max=ROWS,
        prefill_tokens=PREFILL_TOKENS,
        mixed_tokens=mixed,
    )
    return Scheduler._prompt_budget(SimpleNamespace(limits=limits), decode)  # type: ignore[arg-type]


def play(device: Device, streams: int, mixed: int, *, words: tuple[int, int], each: int = 4) -> str:
    """words: tokens in and out of a request; each stream asks `each` times."""
    total, sent, done, now = streams * each, streams, 0, 0.0
    waiting = [[_BETWEEN_MS * at, words[0]] for at in range(streams)]
    decoding: list[list[float]] = []
    gaps: list[float] = []
    firsts: list[float] = []
    while done < total:
        here = [request for request in waiting if request[0] <= now]
        if not here and not decoding:
            now = min(request[0] for request in waiting)
            continue
        budget, prompts, whole = budget_of(mixed, len(decoding)), 0, []
        for request in here:
            if budget <= 0 or len(decoding) + len(whole) >= ROWS:
                break
            chunk = min(budget, int(request[1]))
            request[1] -= chunk
            budget, prompts = budget - chunk, prompts + chunk
            if not request[1]:
                whole.append(request)
        now += device.ms(len(decoding), prompts)
        for row in decoding:
            gaps.append(now - row[1])
            row[:] = row[0] + 1, now
        for request in whole:
            waiting.remove(request)
            firsts.append(now - request[0])
            decoding.append([1, now])
        for row in [row for row in decoding if row[0] >= words[1]]:
            decoding.remove(row)
            done += 1
            if sent < total:
                waiting.append([now + _AGAIN_MS + _BETWEEN_MS * len(waiting), words[0]])
                sent += 1
    return (
        f"{total * words[1] / now * 1e3:9,.0f} tok/s, between tokens {np.mean(gaps):6.2f} ms, p99 "
        f"{np.percentile(gaps, 99):6.1f}, first {np.mean(firsts):6.0f}, p99 "
        f"{np.percentile(firsts, 99):6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--mixed-tokens", nargs="+", type=int, default=[512, 1024, 2048, 8192])
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=256)
    asked = parser.parse_args()
    for device in DEVICES:
        for streams in asked.concurrency:
            print(f"\n{device.name}, {streams} streams")
            for mixed in asked.mixed_tokens:
                found = play(device, streams, mixed, words=(asked.input, asked.output))
                print(f"  {mixed:5}  {found}", flush=True)


if __name__ == "__main__":
    main()
