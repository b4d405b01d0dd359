"""What the fused kernels cost on this GPU, beside the torch code that they replace, and the floor.

    python tools/gpu/bench_fused.py [--json FILE]

Microseconds of one call in a graph of many, so that no launch from the host is in it; the floor is
the call's bytes at the measured speed of a copy. Run tests/gpu/test_gpu_fused_kernels.py first: it
says whether the results are right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from holdfast.model.layers import Rotation, gated, rms_norm, rotation_frequencies
from holdfast.ops.attention import Scratch
from holdfast.ops.kernels.gate import silu_mul
from holdfast.ops.kernels.norm import add_rms_norm
from holdfast.ops.kernels.rope import rotate_append, rotation_table
from holdfast.ops.kernels.sample import KeyedDraws

SHAPES = {
    "0.6B": {"hidden": 1024, "heads": 16, "kv_heads": 8, "width": 3072},
    "8B": {"hidden": 4096, "heads": 32, "kv_heads": 8, "width": 12_288},
}
HEAD_DIM, VOCAB, PAGE_TOKENS, LAYERS = 128, 151_936, 16, 4
ROWS = (1, 8, 64, 256)
CALLS, REPLAYS = 20, 10
BF16 = torch.bfloat16


def microseconds(call: Callable[[], object]) -> float:
    """Of one call; the fastest of some replays of a graph of CALLS."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return min(times)


def copy_bytes_a_us() -> float:
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source))


def layer_cases(
    shape: dict[str, int], rows: int
) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    """(kernel, bytes, our call, torch's call)."""
    hidden, heads, kv_heads, width = shape.values()
    device = torch.device("cuda")
    scratch = Scratch(device)
    x, delta = (torch.randn(rows, hidden, device=device).to(BF16) for _ in range(2))
    weight, out = torch.ones(hidden, device=device, dtype=BF16), torch.empty_like(x)
    yield (
        "add + norm",
        4 * x.numel() * 2,
        lambda: add_rms_norm(x, delta, weight, 1e-6, out),
        lambda: rms_norm(x.add_(delta), weight, 1e-6, out=out),
    )
    gate_up = torch.randn(rows, 2 * width, device=device).to(BF16)
    narrow = torch.empty(rows, width, device=device, dtype=BF16)
    yield (
        "gate",
        3 * narrow.numel() * 2,
        lambda: silu_mul(gate_up, narrow),
        lambda: gated(gate_up, scratch),
    )
    both = heads + kv_heads
    qkv = torch.randn(rows, (both + kv_heads) * HEAD_DIM, device=device).to(BF16)
    norm = torch.ones(HEAD_DIM, device=device, dtype=BF16)
    pool = torch.zeros(rows + 1, LAYERS, 2, PAGE_TOKENS, kv_heads, HEAD_DIM, device=device).to(BF16)
    slots = torch.arange(rows, device=device) * PAGE_TOKENS + PAGE_TOKENS
    positions = torch.arange(rows, device=device) * 7
    frequencies = rotation_frequencies(HEAD_DIM, 1e6, None).to(device)
    table, rotation = rotation_table(frequencies, 40_960), Rotation(positions, frequencies)
    by_head = qkv[:, : both * HEAD_DIM].view(rows, both, HEAD_DIM)
    wide_norm = norm.expand(both, HEAD_DIM)
    kept = torch.empty_like(by_head)
    page, offset = slots // PAGE_TOKENS, slots % PAGE_TOKENS

    def torch_rotate() -> None:
        rotation.apply(rms_norm(by_head, wide_norm, 1e-6, out=kept), out=by_head)
        heads_kv = qkv[:, heads * HEAD_DIM :].view(rows, 2, kv_heads, HEAD_DIM)
        pool[page, 1, :, offset] = heads_kv

    yield (
        "norm + rotate + append",
        2 * qkv.numel() * 2 + rows * HEAD_DIM * 4,
        lambda: rotate_append(qkv, norm, norm, 1e-6, positions, table, slots, pool, 1),
        torch_rotate,
    )


def sample_cases(
    rows: int,
) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    device = torch.device("cuda")
    draws = KeyedDraws(VOCAB, rows, device)
    seeds, positions = (torch.arange(rows, device=device) for _ in range(2))
    for spread in (1.0, 6.0):
        logits = (torch.randn(rows, VOCAB, device=device) * spread).to(BF16)
        for temperature in (0.0, 0.6):
            warmth = torch.full((rows,), temperature, device=device)
            passes = 1 if temperature == 0 else 2
            yield (
                f"draw, logits +-{spread:.0f}, temperature {temperature}",
                passes * logits.numel() * 2,
                lambda a=logits, t=warmth: draws.sample(a, seeds, positions, t),
                lambda a=logits: a.float().softmax(-1).argmax(-1),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    speed = copy_bytes_a_us()
    found = []
    print(f"{torch.cuda.get_device_name()}, copy {speed * 1e-6:.2f} TB/s")
    for rows in ROWS:
        cases = [("", *case) for case in sample_cases(rows)]
        for model, shape in SHAPES.items():
            cases += [(model, *case) for case in layer_cases(shape, rows)]
        for model, kernel, size, ours, twin in cases:
            row = {
                "kernel": kernel,
                "model": model,
                "rows": rows,
                "us": microseconds(ours),
                "torch_us": microseconds(twin),
                "floor_us": size / speed,
            }
            found.append(row)
            print(
                f"{rows:>4} rows  {model:<5} {kernel:<42} {row['us']:8.2f} us   torch "
                f"{row['torch_us']:8.2f}   floor {row['floor_us']:8.2f}"
            )
        del cases
        torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
