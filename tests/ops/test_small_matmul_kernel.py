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


@pytest.mark.parametrize("rows", [65, 127, 128, 129, 200, 256])
@pytest.mark.parametrize("tall", [64, 128])
@pytest.mark.parametrize(
    "how",
    [{"splits": 2}, {"swapped": True, "kept": True}, {"bulk": True, "splits": 3}],
    ids=["split", "swapped", "bulk"],
)
def test_rows_of_several_tiles_are_computed_and_each_tile_adds_its_own_parts(
    module, splits_last, how, tall, rows
):
    # The last tiles of both sides, and the last block of K, are not whole.
    found, expected = product(module, 100, 104, rows, rows=tall, block_n=64, times=2, **how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_tiles_by_the_bulk_copy_engine_give_the_same_bits(module, swapped):
    how = {"rows": 128, "block_n": 64, "splits": 2, "swapped": swapped, "bias": True}
    plain, _ = product(module, 70, 96, 130, **how)
    bulk, _ = product(module, 70, 96, 130, bulk=True, **how)
    assert torch.equal(plain, bulk)


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


def test_a_workspace_holds_the_parts_of_every_tile_of_rows():
    plain = matmul_config.MatmulConfig(64, 64, 64, splits=3)
    warps = matmul_config.MatmulConfig(128, 192, 64, splits=4, groups=3)
    unsplit = matmul_config.MatmulConfig(64, 64, 64)
    # 100 rows of a weight are two tiles of 64, or one of 192; 129 rows of x three of 64 or two.
    assert matmul_config.workspace({(100, 64): [plain] * 129}) == (3 * 128 * 192, 2 * 3)
    assert matmul_config.workspace({(100, 64): [warps] * 129}) == (4 * 192 * 256, 2 * 3)
    assert matmul_config.workspace({(100, 64): [unsplit] * 129}) == (1, 1)
