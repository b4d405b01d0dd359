"""ops.kernels.small_matmul against float64 products, interpreted (compiled on a GPU: tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from holdfast.ops import kernels
from holdfast.ops.kernels import matmul_config

pytestmark = pytest.mark.skipif(not kernels.available(), reason="triton is not installed")


@pytest.fixture
def module():
    from holdfast.ops.kernels import small_matmul

    return small_matmul


@pytest.fixture
def splits_last(monkeypatch):
    """The interpreter walks a grid's last dimension first, so that all splits of a tile follow each
    other; with this, all tiles' first splits come first, as they may on a GPU."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx

    def turned(x: int, y: int, z: int) -> None:
        width, height, depth = builder.grid_dim
        number = (x * height + y) * depth + z
        plain(number % width, number // width % height, number // (width * height))

    monkeypatch.setattr(builder, "set_grid_idx", turned)


def product(module, n: int, k: int, count: int, *, bias: bool = False, times: int = 1, **config):
    """(what the kernel gave, in float64 what it should) of random numbers; the output and the
    workspace are NaN before it."""
    generator = torch.Generator().manual_seed(n * k + count)
    x, weight, added = (
        torch.randn(shape, generator=generator) for shape in ((count, k), (n, k), (n,))
    )
    chosen = matmul_config.MatmulConfig(**{"rows": 16, "block_n": 32, "block_k": 16} | config)
    small = module.SmallMatmul("cpu", [(n, k)], count, sm_count=4, config_of=lambda *_: chosen)
    small._partial.fill_(float("nan"))
    for _ in range(times):
        out = torch.full((count, n), float("nan"))
        small.run(x, weight, added if bias else None, out, small.config(n, k, count))
        assert not small._arrivals.any(), "the next launch would count wrong"
    expected = x.double() @ weight.double().t()
    return out.double(), expected + added if bias else expected


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(
    ("n", "k"), [(64, 64), (96, 112), (100, 72), (33, 16)], ids=lambda size: str(size)
)
def test_a_product_is_right_however_it_is_cut(module, n, k, splits, swapped):
    block_n = 64 if swapped else 32
    found, expected = product(module, n, k, 5, splits=splits, swapped=swapped, block_n=block_n)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 64])
def test_rows_of_every_tile_are_computed_and_no_other_is_written(module, rows):
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    found, expected = product(module, 64, 64, rows, rows=tall, splits=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_each_tile_adds_its_own_parts_whichever_comes_first(module, splits_last, swapped):
    how = {"splits": 3, "block_n": 64, "swapped": swapped}
    found, expected = product(module, 200, 104, 5, times=2, **how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_bias_is_added_once(module, swapped, splits):
    found, expected = product(
        module, 70, 96, 3, bias=True, splits=splits, swapped=swapped, block_n=64
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_workspace_serves_one_launch_after_another(module):
    found, expected = product(module, 64, 96, 4, splits=3, times=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_table_cuts_every_shape_into_whole_parts_that_fit_an_sm():
    for n in (64, 1000, 1024, 4096, 24_576, 151_936):
        for k in (64, 320, 1024, 4096, 12_288):
            for rows in range(1, 65):
                config = matmul_config.choose_config(n, k, rows, 132)
                if config is None:
                    continue
                assert config.rows >= rows and config.splits >= 1
                # No part of K is empty: a program that has nothing to add costs all the same.
                part = -(-k // (config.block_k * config.splits)) * config.block_k
                assert part * (config.splits - 1) < k, (n, k, config)
                tile = (config.block_n + config.rows) * config.block_k * 2
                assert tile * config.stages <= 227 << 10, config


def test_products_of_more_rows_and_other_weights_are_left_to_cublas(module):
    small = module.SmallMatmul("cpu", [(1024, 1024)], 40, sm_count=132)
    assert small.config(1024, 1024, 40) is not None
    assert small.config(1024, 1024, 41) is None and small.config(1024, 1024, 0) is None
    assert small.config(1024, 2048, 8) is None
    large = module.SmallMatmul("cpu", [(1024, 1024)], 4096, sm_count=132)
    assert large.config(1024, 1024, 65) is None
    for rows in (65, 128, 256, 4096):
        assert matmul_config.choose_config(4096, 4096, rows, 132) is None


def test_a_workspace_holds_the_parts_of_the_product_that_has_the_most():
    split = matmul_config.MatmulConfig(64, 64, 64, splits=3)
    unsplit = matmul_config.MatmulConfig(64, 64, 64)
    # 100 rows of a weight are two tiles of 64; 500 rows that are not split need nothing.
    shapes = {(100, 64): [None, split], (30, 64): [split], (500, 64): [unsplit]}
    assert matmul_config.workspace(shapes) == (3 * 64 * 100, 2)
    assert matmul_config.workspace({(500, 64): [unsplit, None]}) == (1, 1)


def test_rows_beyond_the_tile_are_refused_and_never_left_out(module):
    config = matmul_config.MatmulConfig(16, 32, 16)
    small = module.SmallMatmul("cpu", [(32, 16)], 40, config_of=lambda *_: config)
    with pytest.raises(AssertionError, match="17, MatmulConfig"):
        small.run(torch.ones(17, 16), torch.ones(32, 16), None, torch.ones(17, 32), config)
