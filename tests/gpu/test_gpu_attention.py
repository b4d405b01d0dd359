"""The compiled attention kernels against the torch reference, at the edges the interpreter tests
have; tools/gpu/bench_attention.py judges them at real shapes, beyond 2**31 elements."""

from __future__ import annotations

import pytest
import torch
from attention_twin import LAYER, NAN, Shape, Step

from holdfast.ops.attention import Scratch

SHAPES = [
    Shape(group=4, kv_heads=2, head_dim=128, page_tokens=16),
    Shape(group=3, kv_heads=2, head_dim=64, page_tokens=16),
    Shape(group=7, kv_heads=1, head_dim=80, page_tokens=3),
    Shape(group=1, kv_heads=2, head_dim=96, page_tokens=1),
    Shape(group=8, kv_heads=1, head_dim=256, page_tokens=24),
]
EDGES = [1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 130, 200, 257, 600]


def attended(
    step: Step, window: int = 0, *, rows_max: int = 64, context_max: int = 4096
) -> torch.Tensor:
    """out of TritonAttention on the GPU, on the host."""
    from holdfast.ops.attention_triton import TritonAttention

    device = torch.device("cuda:0")
    shape = step.shape
    attention = TritonAttention(
        device,
        rows_max=rows_max,
        query_len_max=4,
        context_max=context_max,
        itemsize=step.pool.element_size(),
        **shape.made_for(),
    )
    pool, qkv, out = (tensor.to(device) for tensor in (step.pool, step.qkv, step.out()))
    scratch = Scratch(device)
    heads = (shape.heads, shape.kv_heads)
    plan = attention.plan(step.batch("cuda:0"), pool, *heads, qkv.dtype, scratch)
    attention.attend(plan, pool, LAYER, qkv, out, window)
    return out.cpu()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


# Five kernels a case are compiled, a second each. float32's tiles differ by head size alone: a
# power of two, one that is not, and the widest.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.bfloat16) for shape in SHAPES]
    + [(SHAPES[at], torch.float32) for at in (0, 2, 4)],
    ids=lambda one: str(one) if isinstance(one, torch.dtype) else f"{one.head_dim}x{one.group}",
)
def test_decode_verify_prefill_and_mixed_steps_match_the_reference(shape, dtype) -> None:
    decode = Step(shape, [1] * len(EDGES), [n - 1 for n in EDGES], dtype=dtype)
    close(attended(decode), decode.reference())
    verify = Step(shape, [4] * len(EDGES), EDGES, dtype=dtype)
    close(attended(verify), verify.reference())
    mixed = Step(shape, [1, 140, 33, 1, 64, 2], [600, 0, 100, 0, 64, 15], dtype=dtype)
    close(attended(mixed), mixed.reference())


@pytest.mark.parametrize(("rows", "context_max"), [(1, 4096), (256, 4096), (256, 1024)])
def test_one_row_and_256_match_the_reference_in_parts_and_in_one(rows, context_max) -> None:
    starts = [600] if rows == 1 else [EDGES[row % len(EDGES)] - 1 for row in range(rows)]
    step = Step(SHAPES[0], [1] * rows, starts, dtype=torch.bfloat16)
    close(attended(step, rows_max=rows, context_max=context_max), step.reference())


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 100])
def test_a_window_sees_as_many_positions_and_never_reads_what_it_forgot(window) -> None:
    shape = SHAPES[0]
    for lens in ([1] * len(EDGES), [30, 1, 150, 64]):
        starts = [n - 1 for n in EDGES] if lens[0] == 1 else [0, 400, 90, window]
        step = Step(shape, lens, starts)
        expected = step.windowed(window)
        step.forget([max(0, start - window + 1) for start in starts], column_page=0)
        close(attended(step, window), expected)


def test_one_graph_is_right_for_every_length_and_padding_is_zero() -> None:
    from holdfast.ops.attention_triton import TritonAttention

    shape, device, rows = SHAPES[0], torch.device("cuda:0"), 8
    attention = TritonAttention(
        device, rows_max=rows, query_len_max=1, context_max=4096, **shape.made_for()
    )
    steps = [
        Step(shape, [1] * rows, starts, dtype=torch.bfloat16, seed=seed)
        for seed, starts in enumerate(([0, 14, 15, 16, 62, 63, 64, 300], [700] * 8, [5] * 8))
    ]
    pages = max(step.pool.shape[0] for step in steps)
    pool = torch.full((pages, *steps[0].pool.shape[1:]), NAN, dtype=torch.bfloat16, device=device)
    table = torch.zeros((rows, 256), dtype=torch.int32, device=device)
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    qkv, out = steps[0].qkv.to(device), steps[0].out().to(device)
    attention.require_static(pool, qkv, table, lengths, out, 1)
    launch = lambda: attention.decode(pool, LAYER, qkv, table, lengths, out)  # noqa: E731
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for step in steps:
        for live in (rows, 3):
            pool.fill_(NAN)
            pool[: step.pool.shape[0]] = step.pool.to(device)
            table[:, : step.table.shape[1]] = torch.from_numpy(step.table).to(device)
            lengths.copy_(torch.from_numpy(step.lengths))
            lengths[live:] = 0
            qkv.copy_(step.qkv)
            out.fill_(NAN)
            graph.replay()
            close(out[:live].cpu(), step.reference()[:live])
            assert bool((out[live:] == 0).all())
