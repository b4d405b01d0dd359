"""ops.kernels.small_matmul and warp_matmul, compiled, against float32 products on the same GPU."""

from __future__ import annotations

import pytest
import torch

from holdfast.ops.kernels.matmul_config import MatmulConfig

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="warp groups are Hopper's",
)
ROWS = [1, 63, 64, 65, 127, 128, 129, 200, 255, 256]
# Neither n nor k is a multiple of a tile; the last split is shorter than the others.
N, K = 1000, 1112
WARPS = [
    MatmulConfig(256, 192, 64, groups=3, stages=3),
    MatmulConfig(256, 192, 32, splits=3, groups=3, stages=7),
    MatmulConfig(64, 64, 64, groups=1, stages=8),
    MatmulConfig(64, 128, 128, splits=2, groups=2, stages=3),
    MatmulConfig(128, 128, 64, groups=2, stages=3),
    MatmulConfig(128, 192, 64, groups=3, stages=5),
    MatmulConfig(128, 192, 64, splits=6, groups=3, stages=5),
    MatmulConfig(256, 64, 128, splits=3, groups=1, stages=3),
    MatmulConfig(256, 128, 64, splits=4, groups=2, stages=4),
]
PLAIN = [
    MatmulConfig(128, 128, 64, 1, 8, 4),
    MatmulConfig(128, 128, 64, 2, 8, 4, bulk=True, kept=True),
    MatmulConfig(64, 128, 128, 3, 8, 4, swapped=True, kept=True),
    MatmulConfig(128, 64, 64, 4, 4, 5, swapped=True, bulk=True),
    MatmulConfig(64, 64, 128, 2, 4, 6, True),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def small(n: int, k: int, rows: int, config: MatmulConfig):
    from holdfast.ops.kernels.small_matmul import SmallMatmul

    made = SmallMatmul("cuda", [(n, k)], rows, config_of=lambda *_: config)
    made._partial.fill_(float("nan"))
    return made


def check(config: MatmulConfig, n: int, k: int, rows: int, *, bias: bool, dtype=torch.bfloat16):
    product = small(n, k, rows, config)
    x, weight = normal(rows, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
    added = normal(n, seed=2, dtype=dtype) if bias else None
    expected = x.float() @ weight.float().t() + (0 if added is None else added.float())
    # A row more, which nobody may write.
    room = torch.full((rows + 1, n), 7.0, device="cuda", dtype=dtype)
    first = None
    for _ in range(5):
        room[:rows] = float("nan")
        product.run(x, weight, added, room[:rows], config)
        assert not product._arrivals.any(), "the next launch would count wrong"
        first = room.clone() if first is None else first
        assert torch.equal(room, first), "the same input, other bits"
    torch.testing.assert_close(room[:rows].float(), expected, atol=0.3, rtol=2e-2)
    assert bool((room[rows] == 7.0).all())


@hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", WARPS, ids=str)
def test_warp_groups_compute_every_row_and_no_other(config, rows):
    check(config, N, K, rows, bias=rows % 2 == 0)


@hopper
@pytest.mark.parametrize("k", [8, 64, 72, 192, 320])
def test_warp_groups_walk_fewer_blocks_than_stages(k):
    check(MatmulConfig(128, 192, 64, groups=3, stages=5), 192, k, 128, bias=False)
    check(MatmulConfig(128, 128, 64, splits=2, groups=2, stages=4), 333, k, 130, bias=False)


@hopper
def test_warp_groups_compute_in_half_precision():
    config = MatmulConfig(128, 192, 64, splits=2, groups=3, stages=5)
    check(config, N, K, 100, bias=True, dtype=torch.float16)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", PLAIN, ids=str)
def test_tiles_of_rows_are_computed_and_no_other_row(config, rows):
    check(config, N, K, rows, bias=rows % 2 == 0)


@hopper
@pytest.mark.parametrize("config", [WARPS[1], WARPS[5], WARPS[6], WARPS[8], PLAIN[1]], ids=str)
def test_a_graph_of_norms_and_products_gives_the_eager_bits(config):
    """Each kernel begins before the one ahead of it ends, and reads what that one wrote."""
    from holdfast.ops.kernels.norm import add_rms_norm

    rows, hidden, layers = 200, 1024, 12
    product = small(hidden, hidden, rows, config)
    weights = [normal(hidden, hidden, seed=seed) / 32 for seed in range(layers)]
    scale = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    stream, x, delta = (torch.empty_like(normal(rows, hidden)) for _ in range(3))

    def steps() -> None:
        delta.zero_()
        for weight in weights:
            add_rms_norm(stream, delta, scale, 1e-6, x)
            product.run(x, weight, None, delta, config)

    start = normal(rows, hidden, seed=3)
    stream.copy_(start)
    steps()
    torch.cuda.synchronize()
    eager = delta.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for _ in range(20):
        stream.copy_(start)
        graph.replay()
        assert torch.equal(delta, eager)
    expected = start.float()
    added = torch.zeros_like(expected)
    for weight in weights:
        expected = (expected + added).bfloat16().float()
        normed = expected * torch.rsqrt(expected.square().mean(1, keepdim=True) + 1e-6)
        added = normed.bfloat16().float() @ weight.float().t()
    error = (eager.float() - added).norm() / added.norm()
    assert float(error) < 2e-2, float(error)
