"""ops.kernels.checksum through Triton's interpreter: the kernel's arithmetic, without a GPU.

What the interpreter cannot show (that it compiles, how fast it is) is tests/gpu's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.ops import kernels
from holdfast.ops.checksum import SEED, PageSums
from holdfast.wire import checksum

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernel"),
    # numpy scalars in the interpreter say so when uint64 wraps, which is what it is for.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Read where the module's kernels are decorated.
    from holdfast.ops.kernels import checksum as module

    monkeypatch.setattr(module, "_TILE", 64)
    monkeypatch.setattr(module, "_TILES", 2)
    return module


def random_rows(rows: int, words: int) -> np.ndarray:
    return np.random.default_rng(words).integers(0, 1 << 32, (rows, words), np.uint32)


# One part, a part that is not full, two parts and a little: 256 words a part as set above.
@pytest.mark.parametrize("words", [4, 64, 252, 256, 516, 1024])
def test_the_kernel_sums_rows_as_the_definition_does(kernel, words):
    pool = random_rows(5, words)
    pages = np.array([4, 0, 2, 2])
    found = kernel.row_sums(torch.from_numpy(pool.view(np.int32)), torch.from_numpy(pages))
    expected = checksum.page_sums(pool[pages], checksum.weights(words))
    constant = PageSums(words)._constant
    assert np.array_equal(found.numpy().view(np.uint64) + constant, expected)


def test_the_kernel_sums_rows_that_lie_apart(kernel):
    pool = random_rows(3, 96)
    view = torch.from_numpy(pool.view(np.int32))[:, :64]
    found = kernel.row_sums(view, torch.tensor([2, 1]))
    expected = checksum.page_sums(np.ascontiguousarray(pool[[2, 1], :64]), checksum.weights(64))
    assert np.array_equal(found.numpy().view(np.uint64) + PageSums(64)._constant, expected)


def test_the_largest_words_wrap_as_the_definition_does(kernel):
    pool = np.full((1, 512), 0xFFFF_FFFF, np.uint32)
    found = kernel.row_sums(torch.from_numpy(pool.view(np.int32)), torch.zeros(1, dtype=torch.long))
    expected = checksum.page_sums(pool, checksum.weights(512))
    assert np.array_equal(found.numpy().view(np.uint64) + PageSums(512)._constant, expected)


def test_the_kernels_constant_is_the_definitions(kernel):
    assert (kernel.GOLDEN, SEED) == (checksum.GOLDEN, checksum.SEED)


def test_rows_that_are_no_whole_lines_are_refused():
    from holdfast.ops.kernels.checksum import fits

    assert fits(8, 16)
    assert not fits(6, 8)
    assert not fits(8, 10)
    assert not fits(1 << 31, 1 << 31)
