"""ops.checksum: the twin equals the definition in wire.checksum, on host and device paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.ops import checksum as twin
from holdfast.ops.checksum import BLOCK_BYTES, PageSums, PendingSums, SlabSum, slab_sum
from holdfast.wire import checksum


def random_pool(pages: int, words: int) -> np.ndarray:
    return np.random.default_rng(words).integers(0, 1 << 32, (pages, words), np.uint32)


def test_constants_are_those_of_the_definition():
    assert (twin.SEED, twin.GOLDEN) == (checksum.SEED, checksum.GOLDEN)


@pytest.mark.parametrize("words", [1, 2, 7, 64, 8191, 8193, 28672])
def test_sums_equal_the_definition_on_random_bytes(words):
    pool = random_pool(9, words)
    pages = np.array([8, 0, 3, 3], np.int64)
    expected = checksum.page_sums(pool[pages], checksum.weights(words))
    sums = PageSums(words)
    tensor = torch.from_numpy(pool.view(np.int32))
    assert np.array_equal(sums.of(tensor, pages), expected)


@pytest.mark.parametrize("words", [1, 64, 8193])
def test_device_path_equals_the_definition(words, monkeypatch):
    monkeypatch.setattr(twin, "_DEVICE_WORDS", 3 * words)
    pool = random_pool(9, words)
    pages = np.arange(8, -1, -1)
    sums = PageSums(words)
    parts = sums._of_device(torch.from_numpy(pool.view(np.int32)), torch.from_numpy(pages))
    assert len(parts) == 3
    found = torch.cat(parts).numpy().view(np.uint64) + sums._constant
    assert np.array_equal(found, checksum.page_sums(pool[pages], checksum.weights(words)))


def test_a_zero_page_has_the_sum_of_the_definition():
    expected = checksum.page_sums(np.zeros((1, 128), np.uint32), checksum.weights(128))
    pool = torch.zeros(2, 128, dtype=torch.int32)
    assert np.array_equal(PageSums(128).of(pool, np.array([1])), expected)


def test_any_changed_bit_and_any_swap_change_the_sum():
    pool = torch.from_numpy(random_pool(1, 256).view(np.int32))
    sums, page = PageSums(256), np.array([0])
    before = sums.of(pool, page)[0]
    for word, bit in ((0, 0), (17, 31), (255, 15)):
        pool[0, word] ^= -(1 << 31) if bit == 31 else 1 << bit
        assert sums.of(pool, page)[0] != before
        pool[0, word] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert sums.of(pool, page)[0] == before
    pool[0, [3, 4]] = pool[0, [4, 3]]
    assert sums.of(pool, page)[0] != before


def test_no_pages_have_no_sums():
    assert PageSums(4).of(torch.zeros(2, 4, dtype=torch.int32), np.empty(0, np.int64)).size == 0


@pytest.mark.parametrize("size", [4, 1000, 1 << 20, (1 << 20) + 4, (2 << 20) + 64])
def test_slab_sums_equal_the_chained_definition(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    seen = []
    found = slab_sum(torch.from_numpy(data), lambda done, total: seen.append((done, total)))
    assert found == checksum.bytes_sum(data)
    assert seen[-1] == (size, size)


def test_a_slab_is_summed_in_blocks_over_and_over():
    data = np.random.default_rng(7).integers(0, 256, (2 << 20) + 64, np.uint8)
    slab = torch.from_numpy(data)
    whole = SlabSum(slab)
    right = checksum.bytes_sum(data)
    assert [whole.advance() for _ in range(6)] == [None, None, right, None, None, right]
    assert whole.advance() is None and whole.done == 1 << 20
    slab[5] ^= 1  # read already: this pass does not see it, the next one does
    assert [whole.advance() for _ in range(2)] == [None, right]
    assert [whole.advance() for _ in range(3)][-1] not in (None, right)


@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_a_slab_read_some_blocks_at_a_time_has_the_sum_of_the_definition_pass_after_pass(blocks):
    data = np.random.default_rng(blocks).integers(0, 256, 5 * BLOCK_BYTES + 24, np.uint8)
    sums = SlabSum(torch.from_numpy(data))
    expected = checksum.bytes_sum(data)
    for _ in range(2):
        found = None
        while found is None:
            before = sums.done
            found = sums.advance(blocks)
            assert found is not None or before < sums.done <= before + blocks * BLOCK_BYTES
        assert found == expected
        assert sums.done == 0


class Landed:
    """An event whose copy is over."""

    def __init__(self, device: torch.device) -> None: ...

    def query(self) -> bool:
        return True

    def record(self) -> None: ...


def test_memory_that_sums_come_to_is_used_again_only_after_they_were_taken(monkeypatch) -> None:
    """On a GPU it is pinned; here only who holds it is looked at."""
    monkeypatch.setattr(twin, "_pinned", lambda words: torch.zeros(words, dtype=torch.int64))
    monkeypatch.setattr(twin, "DeviceEvent", Landed)
    sums = PageSums(8)

    def begin(first: int) -> PendingSums:
        landing = sums._land(3)
        landing.sums[:3] = torch.arange(first, first + 3)
        return PendingSums(landing.sums[:3], np.uint64(0), landing)

    one, two = begin(10), begin(20)
    assert two.take().tolist() == [20, 21, 22]
    three = begin(30)  # in the memory of `two`
    assert one.take().tolist() == [10, 11, 12]
    assert three.take().tolist() == [30, 31, 32]
    three.take()
    assert len(sums._free) == 2, "taken twice, but free once"
    begin(40)
    assert sums._land(100).sums.numel() == 128 and not sums._free, "what is too small goes"
