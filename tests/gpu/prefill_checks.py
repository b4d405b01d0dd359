"""What test_gpu_prefill.py runs, one check a process; `python prefill_checks.py CHECK ..` or all.

A check builds steps whose free pages, page tails and unused columns are poison (attention_twin) and
holds TritonAttention against the torch reference, row by row.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import numpy as np
import torch
from attention_twin import LAYER, NAN, Shape, Step

from holdfast.ops.attention import AttentionBatch, Scratch

DEVICE = torch.device("cuda:0")
BIG = Shape(group=4, kv_heads=2, head_dim=128, page_tokens=16)
# Relative error of a row by norm: bfloat16's inputs and the rounding of p.
TOLERANCE = 1e-2


def made(
    shape: Shape, *, context_max: int = 4096, query_tokens: int = 1, itemsize: int = 2, config=None
):
    """TritonAttention, imported where there is triton. config: of the kernel, or the engine's."""
    from holdfast.ops.attention_triton import TritonAttention

    make_gathered = None
    if config is not None:
        from holdfast.ops.kernels.warp_prefill import WarpPrefill

        make_gathered = partial(WarpPrefill, config=config)
    return TritonAttention(
        DEVICE,
        rows_max=64,
        query_len_max=1,
        context_max=context_max,
        itemsize=itemsize,
        gather_query_tokens=query_tokens,
        make_gathered=make_gathered,
        **shape.made_for(),
    )


def attended(step: Step, attention, window: int = 0):
    """(out on the host, the plan)."""
    pool, qkv, out = (tensor.to(DEVICE) for tensor in (step.pool, step.qkv, step.out()))
    heads = step.shape.heads, step.shape.kv_heads
    plan = attention.plan(step.batch(DEVICE), pool, *heads, qkv.dtype, Scratch(DEVICE))
    attention.attend(plan, pool, LAYER, qkv, out, window)
    return out.cpu().float(), plan


def judge(name: object, found: torch.Tensor, expected: torch.Tensor, lens) -> None:
    """Each row of the step within the tolerance; NaN never is."""
    at = 0
    for row, count in enumerate(np.asarray(lens).tolist()):
        of = slice(at, at + count)
        error = float((found[of] - expected[of]).norm() / expected[of].norm())
        assert error < TOLERANCE, f"{name}, row {row} of {count} tokens: relative error {error}"
        at += count


def hold(
    shape: Shape, lens: list[int], starts: list[int], *, gathered: int | None = None, **options
) -> None:
    """gathered: how many rows must take the road that is tested; all but those of one token unless
    given, for they are decoded."""
    dtype = options.pop("dtype", torch.bfloat16)
    step = Step(shape, lens, starts, dtype=dtype)
    out, plan = attended(step, made(shape, **options))
    taken = 0 if plan.gathered is None else plan.gathered.places.shape[1]
    expected = sum(count > 1 for count in lens) if gathered is None else gathered
    assert taken == expected, f"{taken} rows were gathered, {expected} expected"
    judge((shape, lens, starts), out, step.reference(), lens)


EDGES = [2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]


def edges() -> None:
    for length in EDGES:
        hold(BIG, [length], [0])
        hold(BIG, [length, 1, 2], [0, 40, 0])
    hold(BIG, EDGES, [0] * len(EDGES))


def chunks() -> None:
    """On top of what is cached, at odd starts; rows that decode lie between."""
    for start in (1, 15, 16, 17, 100, 126, 127, 128, 129, 255, 256, 383, 1001):
        hold(BIG, [2, 1, 130, 3, 1, 33], [start, start, start, start + 1, 0, start])
    for length in (2, 31, 32, 33, 127, 128, 129, 257):
        hold(BIG, [length, length, length], [127 - length % 127, 128, 640 - length])


def groups() -> None:
    lens, starts = [2, 33, 1, 128, 129, 200], [0, 100, 600, 0, 127, 77]
    # Three kernels each, which take most of the time; BIG is the shape of all other checks.
    for group, head_dim, page_tokens in (
        (1, 64, 16), (3, 80, 3), (4, 96, 1), (7, 128, 24), (16, 128, 5),
    ):  # fmt: skip
        shape = Shape(group=group, kv_heads=2, head_dim=head_dim, page_tokens=page_tokens)
        hold(shape, lens, starts)


def windows() -> None:
    """`forget` has poisoned all that no token of the step sees."""
    for window in (1, 2, 16, 63, 64, 65, 127, 128, 129, 200, 1000):
        lens, starts = [30, 1, 150, 64, 2, 257], [0, 400, 90, window, window - 1, 700]
        step = Step(BIG, lens, starts, dtype=torch.bfloat16)
        expected = step.windowed(window)
        step.forget([max(0, start - window + 1) for start in starts], column_page=0)
        out, plan = attended(step, made(BIG), window)
        assert plan.gathered is not None
        judge(f"window {window}", out, expected, lens)


def many_rows() -> None:
    rng = np.random.default_rng(1)
    shape = Shape(group=2, kv_heads=2, head_dim=64, page_tokens=16)
    for _ in range(4):
        lens = rng.integers(1, 300, 48)
        starts = rng.integers(0, 500, 48) * rng.integers(0, 2, 48)
        hold(shape, lens.tolist(), starts.tolist())
    # What the engine does: short rows are read from pages, beside rows that decode.
    lens = [256, 1, 255, 400, 1, 2]
    hold(BIG, lens, [0, 9, 300, 5, 77, 0], gathered=2, query_tokens=256)


def no_room() -> None:
    """Rows that the scratch has no room for; one alone has more than all of it."""
    step = Step(BIG, [200, 130, 40, 256], [0, 0, 3000, 0], dtype=torch.bfloat16)
    attention = made(BIG)
    attention._gather_tokens = 512
    out, plan = attended(step, attention)
    assert plan.gathered is not None and plan.gathered.places[1].tolist() == [200, 130]
    judge("no room", out, step.reference(), step.lens)


def half() -> None:
    hold(BIG, [300, 1, 40], [0, 5, 99], dtype=torch.float16)
    # float32 is read from pages.
    step = Step(BIG, [300], [7])
    out, plan = attended(step, made(BIG, itemsize=4))
    assert plan.gathered is None
    judge("float32", out, step.reference(), step.lens)


def layers() -> None:
    """One object, step after step and layer after layer over one scratch, all launched before the
    first is looked at: what a longer row left there is not seen by a shorter one."""
    attention, found = made(BIG), []
    steps = [
        Step(BIG, lens, starts, dtype=torch.bfloat16, seed=seed)
        for seed, (lens, starts) in enumerate(
            [([700, 1], [300, 3]), ([130, 129], [0, 5]), ([2, 40, 257], [500, 0, 1])] * 4
        )
    ]
    for step in steps:
        pool, qkv, out = (tensor.to(DEVICE) for tensor in (step.pool, step.qkv, step.out()))
        batch = step.batch(DEVICE)
        plan = attention.plan(batch, pool, 8, 2, qkv.dtype, Scratch(DEVICE))
        first = torch.empty_like(out)
        attention.attend(plan, pool, LAYER, qkv, first)
        attention.attend(plan, pool, 0, qkv, out)  # A layer that is all NaN.
        attention.attend(plan, pool, LAYER, qkv, out)
        found.append((first, out))
    for step, (first, again) in zip(steps, found, strict=True):
        assert torch.equal(first, again), "one step twice gave two results"
        judge("layers", again.cpu().float(), step.reference(), step.lens)


def persistent() -> None:
    """Programs that walk several tiles: more of them than the GPU has SMs, of any number of blocks
    each, odd and even, so that stages and parities go round."""
    from holdfast.ops.kernels.warp_prefill import WarpConfig

    for config in (
        WarpConfig(persistent=True),
        WarpConfig(block=64, stages=4, heads=1, tiles_first=False, persistent=True),
    ):
        hold(BIG, [2], [0], config=config)
        hold(BIG, [700, 300, 1, 129, 1000, 64], [0, 333, 9, 1, 500, 0], config=config)
        hold(BIG, EDGES * 3, [number * 17 for number in range(len(EDGES) * 3)], config=config)
        step = Step(BIG, [900, 700, 64], [0, 400, 1000], dtype=torch.bfloat16)
        expected = step.windowed(100)
        step.forget([0, 301, 901], column_page=0)
        out, _ = attended(step, made(BIG, config=config), 100)
        judge("persistent, window 100", out, expected, step.lens)


def large_pool() -> None:
    """Pages beyond 2**32 elements of a pool of NaN (10 GB)."""
    shape, layers_ = Shape(group=4, kv_heads=8, head_dim=128, page_tokens=16), 2
    per_page = layers_ * 2 * 16 * 8 * 128
    pages = (1 << 32) // per_page + 9000
    pool = torch.full((pages, layers_, 2, 16, 8, 128), NAN, dtype=torch.bfloat16, device=DEVICE)
    small = Step(shape, [300, 1, 140], [33, 700, 0], dtype=torch.bfloat16)
    used = small.pool.shape[0]
    shift = pages - used
    pool[shift:] = small.pool.to(DEVICE)
    table = np.where(small.table < used, small.table + shift, small.table).astype(np.int32)
    batch = AttentionBatch.build(small.lens, small.starts, table, 16, DEVICE)
    attention, qkv, out = made(shape), small.qkv.to(DEVICE), small.out().to(DEVICE)
    plan = attention.plan(batch, pool, 32, 8, qkv.dtype, Scratch(DEVICE))
    assert plan.gathered is not None
    attention.attend(plan, pool, LAYER, qkv, out)
    judge("large pool", out.cpu().float(), small.reference(), small.lens)


def nothing_compiles() -> None:
    """After one gathered row, no number of rows, tokens, tiles or decode rows compiles anything."""
    from holdfast.ops.kernels.compiles import CompileCount

    attention = made(BIG)
    for lens in ([300], [1], [1, 300]):
        attended(Step(BIG, lens, [0] * len(lens), dtype=torch.bfloat16), attention)
    count = CompileCount()
    for lens in ([16], [300] * 16, [1] * 15 + [2, 3], [1, 1, 1, 129], [128] * 8, [1] * 16 + [700]):
        starts = list(range(len(lens)))
        attended(Step(BIG, lens, starts, dtype=torch.bfloat16), attention)
    assert count.count == 0, f"compiled {count.count}, the last {count.last}"


def empty_tiles() -> None:
    """A bucket of a graph: more tiles, rows and pieces of the scratch than any of its steps has.
    Warps that have nothing to do must not wait for one another."""
    from mixed_twin import Bucket

    mixes = [
        ([1] * 30 + [200], [*range(100, 130), 0]),
        ([2], [0]),
        ([33, 1, 129, 300], [0, 400, 500, 0]),
        ([1, 1], [5, 900]),
        ([64, 1], [1001, 3]),
        ([2, 3, 4, 5, 6, 7, 8, 9], [0, 127, 128, 129, 0, 255, 1000, 1]),
    ]
    for window in (0, 100):
        attention, bucket = made(BIG), None
        for seed, (lens, starts) in enumerate(mixes):
            step = Step(BIG, lens, starts, dtype=torch.bfloat16, seed=seed)
            bucket = bucket or Bucket(attention, step.pool.to(DEVICE), tokens=512, rows_max=64)
            assert bucket.arrays.cut.gathered_tokens > 0
            out = bucket.attend(step, window)
            count = step.qkv.shape[0]
            expected = step.windowed(window) if window else step.reference()
            judge(("empty tiles", window, lens), out[:count], expected, lens)
            assert bool(out[count:].isnan().all()), "a program of nothing wrote a row"


ALL = {
    check.__name__: check
    for check in (
        edges, chunks, groups, windows, many_rows, no_room, half, layers, persistent, large_pool,
        nothing_compiles, empty_tiles,
    )
}  # fmt: skip


def main() -> None:
    for name in sys.argv[1:] or ALL:
        began = time.monotonic()
        ALL[name]()
        torch.cuda.synchronize()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
