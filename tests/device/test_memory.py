"""device.memory: one slab, many views, shared with whoever maps the same bytes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from devicekit import LIMITS

from holdfast.device.memory import DeviceMemory, pool_bytes
from holdfast.errors import InvariantError, ModelError, WorkerFault


@pytest.fixture
def memfds(spec):
    sizes = (spec.weights_bytes("float32"), pool_bytes(spec, LIMITS, "float32"))
    fds = [os.memfd_create("test", os.MFD_CLOEXEC) for _ in sizes]
    for fd, size in zip(fds, sizes, strict=True):
        os.ftruncate(fd, size)
    yield fds
    for fd in fds:
        os.close(fd)


def attach(spec, fds) -> DeviceMemory:
    return DeviceMemory.attach(spec, LIMITS, weights_fd=fds[0], kv_fd=fds[1])


def test_two_mappings_of_one_memfd_are_the_same_bytes(spec, memfds):
    first, second = attach(spec, memfds), attach(spec, memfds)
    first.pool[3, 1, 0, 2] = 1.5
    first.weights[10] = 77
    assert torch.equal(second.pool, first.pool)
    assert second.weights[10] == 77
    del first
    assert second.pool[3, 1, 0, 2, 0, 0] == 1.5


def test_a_page_is_one_run_of_bytes_in_every_view(spec):
    memory = DeviceMemory.allocate(spec, LIMITS)
    shape = (LIMITS.pages, spec.layers, 2, LIMITS.page_tokens, spec.kv_heads, spec.head_dim)
    assert memory.pool.shape == shape
    assert memory.pool.is_contiguous()
    memory.pool[5] = 1.0
    words = memory.page_words
    assert bool((words[5] == np.float32(1.0).view(np.int32)).all())
    assert not words[4].any()
    assert not words[6].any()
    page_bytes = spec.kv_token_bytes("float32") * LIMITS.page_tokens
    assert memory.kv.nonzero().min() >= 5 * page_bytes
    assert memory.kv.nonzero().max() < 6 * page_bytes


def test_a_bfloat16_pool_has_half_the_bytes_and_the_same_pages(spec):
    memory = DeviceMemory.allocate(spec, LIMITS, pool_dtype="bfloat16")
    assert memory.pool.dtype == torch.bfloat16
    assert memory.kv.numel() * 2 == pool_bytes(spec, LIMITS, "float32")
    assert memory.page_words.shape[0] == LIMITS.pages


def test_fresh_memory_is_zeros_and_zeroed_pages_are_again(spec):
    memory = DeviceMemory.allocate(spec, LIMITS)
    assert not memory.pool.any()
    memory.pool[:] = torch.nan
    memory.zero_pages(np.array([2, 7], np.int32))
    assert not memory.pool[[2, 7]].any()
    assert bool(memory.pool[[1, 3, 6, 8]].isnan().all())


@pytest.mark.parametrize("which", [0, 1])
def test_a_memfd_that_is_too_small_is_refused(spec, memfds, which):
    os.ftruncate(memfds[which], os.fstat(memfds[which]).st_size - 1)
    with pytest.raises(WorkerFault, match="are needed"):
        attach(spec, memfds)


def test_a_larger_memfd_is_used_up_to_what_is_needed(spec, memfds):
    """Memfds are rounded up to whole pages of the machine."""
    os.ftruncate(memfds[1], os.fstat(memfds[1]).st_size + 4096)
    assert attach(spec, memfds).kv.numel() == pool_bytes(spec, LIMITS, "float32")


def test_slabs_and_dtypes_that_do_not_fit_are_refused(spec):
    with pytest.raises(InvariantError, match="KV slab of 8 bytes"):
        DeviceMemory(spec, LIMITS, torch.zeros(8), torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ModelError, match="float16"):
        DeviceMemory.allocate(spec, LIMITS, pool_dtype="float16")
