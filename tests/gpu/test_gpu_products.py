"""ops.kernels.small_matmul, compiled, against float32 products on the same GPU.

Whatever makes another kernel is met once: tiles of 16, 32 and 64 rows, swapped or not, split or
not, 4 and 8 warps, with a bias and without. The number of rows does not, so its edges are walked
inside a test, by kernels that are compiled already.
"""

from __future__ import annotations

import pytest
import torch

from holdfast.ops.kernels.matmul_config import ROWS_MAX, MatmulConfig

# Neither n nor k is a multiple of a tile; the last split is shorter than the others.
N, K = 1000, 1112
# By tile: the numbers of rows at its edges.
EDGES = {16: (1, 2, 15, 16), 32: (1, 17, 31, 32), 64: (1, 33, 63, 64)}
CONFIGS = [
    MatmulConfig(16, 64, 128, 1, 4, 3, True),
    MatmulConfig(16, 64, 128, 4, 4, 6, True),
    MatmulConfig(32, 64, 128, 3, 4, 6, True),
    MatmulConfig(64, 64, 64, 1, 4, 4, True),
    MatmulConfig(64, 64, 128, 2, 8, 6),
    MatmulConfig(64, 32, 128, 4, 4, 8),
]
SHAPES = [(4096, 4096), (6144, 1024), (1024, 3072), (640, 320)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def small(n: int, k: int, rows: int, config: MatmulConfig | None = None):
    """Of the table's configurations unless one is given; NaN where no part was written."""
    from holdfast.ops.kernels.small_matmul import SmallMatmul

    given = None if config is None else lambda *_: config
    made = SmallMatmul("cuda", [(n, k)], rows, config_of=given)
    made._partial.fill_(float("nan"))
    return made


def check(product, n: int, k: int, rows: int, *, bias: bool) -> None:
    config = product.config(n, k, rows)
    x, weight = normal(rows, k), normal(n, k, seed=1)
    added = normal(n, seed=2) if bias else None
    expected = x.float() @ weight.float().t() + (0 if added is None else added.float())
    # A row more, which nobody may write.
    room = torch.full((rows + 1, n), 7.0, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(5):
        room[:rows] = float("nan")
        product.run(x, weight, added, room[:rows], config)
        assert not product._arrivals.any(), "the next launch would count wrong"
        first = room.clone() if first is None else first
        assert torch.equal(room, first), "the same input, other bits"
    torch.testing.assert_close(room[:rows].float(), expected, atol=0.3, rtol=2e-2)
    assert bool((room[rows] == 7.0).all())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_row_of_a_tile_is_computed_and_no_other(config):
    product = small(N, K, config.rows, config)
    for rows in EDGES[config.rows]:
        check(product, N, K, rows, bias=rows % 2 == 0)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_what_the_table_says_of_a_shape_is_right_at_the_edges_of_its_tiles(n, k):
    product, computed = small(n, k, ROWS_MAX), 0
    for rows in (1, 8, 16, 17, 32, 33, 64):
        if product.config(n, k, rows) is not None:
            check(product, n, k, rows, bias=False)
            computed += 1
    assert computed >= 3, "cuBLAS has them"


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_a_graph_of_norms_and_products_gives_the_eager_bits(rows):
    """Each kernel begins before the one ahead of it ends, and reads what that one wrote."""
    from holdfast.ops.kernels.norm import add_rms_norm

    hidden, layers = 1024, 12
    product = small(hidden, hidden, rows)
    config = product.config(hidden, hidden, rows)
    assert config is not None and config.splits > 1, config
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
