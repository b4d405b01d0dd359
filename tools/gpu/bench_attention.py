"""Our attention kernels on an H200: right first, then how fast, beside FlashInfer where it is.

    PYTHONPATH=. python3 tools/gpu/bench_attention.py [--tune] [--budget SECONDS] [--only PART ...]

Parts: correct, decode, prefill, mixed. The pool is an 8B model's, page-major, 19.3e9 elements; each
layer of a measurement reads pages of its own, so nothing comes from L2. Decode is timed as graphs
are replayed, prefill launch by launch; the median of the repeats, all of which are kept. The table
comes last; everything also goes to $OUT/bench_attention.json. --tune sweeps the configurations
instead, until the budget is spent, and prints the best of each shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import attention_rivals
import numpy as np
import torch
import triton
from attention_cases import (
    CONTEXT_MAX,
    DECODE,
    DEVICE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE_TOKENS,
    PREFILL,
    REPEATS,
    SHAPE,
    DecodeCase,
    Pages,
    PrefillCase,
    blank,
    layered_us,
    noise,
    on_device,
    poison_tails,
    replayed_us,
)
from attention_tune import tune

from holdfast.ops.attention import AttentionBatch, Scratch
from holdfast.ops.attention_triton import TritonAttention
from holdfast.ops.kernels.decode_config import choose_config

# Relative error of a row, by norm: bfloat16's inputs and the rounding of p.
TOLERANCE = 1e-2
PARTS = ("correct", "decode", "prefill", "mixed")


def dense(
    pool: torch.Tensor,
    layer: int,
    qkv: torch.Tensor,
    table: np.ndarray,
    length: int,
    window: int,
) -> torch.Tensor:
    """float32[query tokens, heads * head_dim] of one row's last tokens, by a plain sum."""
    columns = -(-length // PAGE_TOKENS)
    kv = pool[on_device(table[:columns].astype(np.int64)), layer].float()
    kv = kv.transpose(0, 1).reshape(2, -1, KV_HEADS, HEAD_DIM)[:, :length]
    tokens = qkv.shape[0]
    q = qkv[:, : HEADS * HEAD_DIM].float().view(tokens, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = torch.einsum("tkgd,pkd->kgtp", q, kv[0]) / HEAD_DIM**0.5
    last = length - tokens + torch.arange(tokens, device=DEVICE)[:, None]
    distance = last - torch.arange(length, device=DEVICE)
    hidden = (distance < 0) | (distance >= (window or length + 1))
    scores.masked_fill_(hidden, float("-inf"))
    out = torch.einsum("kgtp,pkd->tkgd", scores.softmax(-1), kv[1])
    return out.reshape(tokens, -1)


def judge(name: str, found: torch.Tensor, expected: torch.Tensor, faults: list[str]) -> float:
    """Relative error by norm, noted as a fault when it is too large or no number."""
    error = float((found.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        faults.append(f"{name}: relative error {error}")
    return error


def correct(pages: Pages) -> tuple[list[dict], list[str]]:
    """Decode, verify, windows, prefill and a mixed step against the plain sum."""
    rows_, faults = [], []
    edges = [0, 4, 5, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 500, 1023, 1024, 1025, 2047, 2048]
    lengths = np.array((edges * 2)[:33], np.int32)
    table = pages.table(33, 2048)
    poison_tails(pages, table, lengths)
    for query_len, window in itertools.product((1, 4), (0, 100)):
        attention = made(query_len_max=query_len, rows_max=33)
        qkv, out = noise(33 * query_len), blank(33 * query_len)
        attention.decode(
            pages.pool, 7, qkv, on_device(table), on_device(lengths), out,
            query_len=query_len, window=window,
        )  # fmt: skip
        worst = 0.0
        for row, length in enumerate(lengths.tolist()):
            of = slice(row * query_len, (row + 1) * query_len)
            if length == 0:
                if bool((out[of] != 0).any()):
                    faults.append(f"padding row {row} is not zero")
                continue
            expected = dense(pages.pool, 7, qkv[of], table[row], length, window)
            name = f"decode, query_len {query_len}, window {window}, length {length}"
            worst = max(worst, judge(name, out[of], expected, faults))
        rows_.append({"part": "correct", "decode": [query_len, window], "error": worst})
    pages.refill()
    starts = np.array([0, 100, 2047, 1024, 15, 300, 0], np.int32)
    lens = np.array([700, 412, 1, 1024, 1, 33, 1], np.int32)
    table = pages.table(lens.size, 2048)
    poison_tails(pages, table, starts + lens)
    for window in (0, 200):
        batch = AttentionBatch.build(lens, starts, table, PAGE_TOKENS, DEVICE)
        attention, qkv, out = made(rows_max=8), noise(int(lens.sum())), blank(int(lens.sum()))
        scratch = Scratch(DEVICE)
        plan = attention.plan(batch, pages.pool, HEADS, KV_HEADS, qkv.dtype, scratch)
        attention.attend(plan, pages.pool, 35, qkv, out, window)
        ends, worst = np.cumsum(lens), 0.0
        for row, (end, count) in enumerate(zip(ends.tolist(), lens.tolist(), strict=True)):
            of = slice(end - count, end)
            length = int(starts[row] + count)
            expected = dense(pages.pool, 35, qkv[of], table[row], length, window)
            worst = max(
                worst, judge(f"mixed, window {window}, row {row}", out[of], expected, faults)
            )
        rows_.append({"part": "correct", "mixed": window, "error": worst})
    pages.refill()
    return rows_, faults


def made(rows_max: int = 256, query_len_max: int = 1) -> TritonAttention:
    return TritonAttention(
        DEVICE, rows_max=rows_max, query_len_max=query_len_max, context_max=CONTEXT_MAX, **SHAPE
    )


def decode(pages: Pages) -> list[dict]:
    found = []
    for rows, context in DECODE:
        case = DecodeCase(pages, rows, context)
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        config = choose_config(rows, KV_HEADS, HEAD_DIM, 2, CONTEXT_MAX, sms)
        name = f"holdfast, {config.splits} splits"
        found.append(case.row(name, replayed_us(case.launch())))
        q = case.qkv[:, : HEADS * HEAD_DIM].contiguous().view(rows, HEADS, HEAD_DIM)
        rivals = attention_rivals.decode(pages.pool, q, case.table, case.lengths)
        found += [case.row(rival, replayed_us(launch)) for rival, launch in rivals]
    return found


def prefill(pages: Pages) -> list[dict]:
    found = []
    for rows, context in PREFILL:
        case = PrefillCase(pages, rows, context)
        name, launch = case.engine()
        found.append(case.row(name, layered_us(launch)))
        q = case.qkv[:, : HEADS * HEAD_DIM].contiguous().view(-1, HEADS, HEAD_DIM)
        lengths = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
        rivals = attention_rivals.prefill(pages.pool, q, case.table, lengths, context)
        found += [case.row(rival, layered_us(launch)) for rival, launch in rivals]
    return found


def mixed(pages: Pages) -> list[dict]:
    """64 rows that decode at 2,048 beside 2 chunks of 512 on top of 1,024: GPU and host time."""
    lens = np.array([1] * 32 + [512, 512] + [1] * 32, np.int32)
    starts = np.array([2047] * 32 + [1024, 1024] + [2047] * 32, np.int32)
    table, qkv = pages.table(66, 2048), noise(int(lens.sum()))
    batch = AttentionBatch.build(lens, starts, table, PAGE_TOKENS, DEVICE)
    attention, scratch, out = made(), Scratch(DEVICE), blank(int(lens.sum()))
    plans = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        plan = attention.plan(batch, pages.pool, HEADS, KV_HEADS, qkv.dtype, scratch)
        plans.append(1e6 * (time.perf_counter() - began))
    samples = replayed_us(lambda layer: attention.attend(plan, pages.pool, layer, qkv, out))
    shape = "64 x 2048 + 2 x 512"
    return [
        {"part": "mixed", "shape": shape, "name": "holdfast", "us": statistics.median(samples),
         "samples": samples},
        {"part": "mixed", "shape": shape, "name": "plan, host", "us": statistics.median(plans),
         "samples": plans},
    ]  # fmt: skip


def print_table(rows: list[dict]) -> None:
    for row in rows:
        unit = next((key for key in ("TB/s", "TFLOP/s") if key in row), None)
        rate = f"{row[unit]:8.2f} {unit}, x{row['of floor']:.2f} of the floor" if unit else ""
        print(f"{row['part']:8} {row['shape']:>20}  {row['us']:9.1f} us {rate:38} {row['name']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep configurations instead")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds that --tune may take")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    torch.manual_seed(0)
    pages, rows, faults = Pages(), [], []
    if "correct" in args.only:
        checked, faults = correct(pages)
        for row in checked:
            print(row, flush=True)
        print("\n".join(faults[:20]) or "correct: all within the tolerance", flush=True)
        rows += checked
    if args.tune:
        rows += tune(pages, deadline)
    else:
        for part, measure in (("decode", decode), ("prefill", prefill), ("mixed", mixed)):
            if part in args.only:
                rows += measure(pages)
    facts = {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "faults": faults,
        "rows": rows,
    }
    out = Path(os.environ.get("OUT", "."))
    (out / "bench_attention.json").write_text(json.dumps(facts, indent=1))
    print_table([row for row in rows if "us" in row])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
