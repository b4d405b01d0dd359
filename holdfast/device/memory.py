"""DeviceMemory: the weights slab and the KV slab, seen as tensors without a copy.

Owns the mappings, not the bytes: these lie in the keeper's memfds (or in anonymous memory of this
process, for `LLM` and tests) and outlive it. Invariants: one slab of each kind, all views inside
it; a page's bytes are finite before it is used (fresh memory is zeros, and `zero_pages` makes the
pages of a faulty row so); page-major, so a page is one run of bytes. Used by device.runner and
proc.worker; it knows sizes, and nothing of rows, plans or what a page holds.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.errors import WorkerFault, require
from holdfast.model.spec import ModelSpec, item_bytes
from holdfast.ops.checksum import PageSums

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DeviceMemory:
    """weights: uint8[spec.weights_bytes]; pool: [pages, layers, 2, page_tokens, kv_heads, head_dim]
    of the pool's dtype; page_words: int32[pages, words], the same bytes as the pool."""

    def __init__(
        self,
        spec: ModelSpec,
        limits: Limits,
        weights: torch.Tensor,
        kv: torch.Tensor,
        pool_dtype: str = "float32",
    ) -> None:
        """weights, kv: uint8 1-d slabs, kv of exactly `pool_bytes`."""
        require(
            kv.numel() == pool_bytes(spec, limits, pool_dtype),
            f"KV slab of {kv.numel()} bytes, not {pool_bytes(spec, limits, pool_dtype)}",
        )
        self.weights = weights
        self.kv = kv
        self.pool = pool_view(kv, spec, limits, pool_dtype)
        self.page_words = kv.view(torch.int32).view(limits.pages, -1)
        self._sums = PageSums(self.page_words.shape[1], kv.device)

    @classmethod
    def attach(
        cls,
        spec: ModelSpec,
        limits: Limits,
        *,
        weights_fd: int,
        kv_fd: int,
        dtype: str = "float32",
        pool_dtype: str = "float32",
    ) -> DeviceMemory:
        """Map the keeper's memfds, shared and writable; the descriptors stay the caller's.

        Raises WorkerFault when a memfd is smaller than the model and the limits ask for.
        """
        weights = _map(weights_fd, spec.weights_bytes(dtype), "weights")
        kv = _map(kv_fd, pool_bytes(spec, limits, pool_dtype), "KV pool")
        return cls(spec, limits, weights, kv, pool_dtype)

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        limits: Limits,
        *,
        dtype: str = "float32",
        pool_dtype: str = "float32",
    ) -> DeviceMemory:
        """Anonymous memory of this process; a page of it takes no room before it is written."""
        weights = _anonymous(spec.weights_bytes(dtype))
        kv = _anonymous(pool_bytes(spec, limits, pool_dtype))
        return cls(spec, limits, weights, kv, pool_dtype)

    def seal_sums(self, pages: np.ndarray) -> np.ndarray:
        """uint64[k] checksums (wire.checksum) of whole pages int[k]."""
        return self._sums.of(self.page_words, pages)

    def zero_pages(self, pages: np.ndarray) -> None:
        """Set all bytes of pages int[k] to zero."""
        if pages.size:
            index = torch.from_numpy(pages.astype(np.int64)).to(device=self.kv.device)
            self.page_words[index] = 0


def pool_bytes(spec: ModelSpec, limits: Limits, dtype: str) -> int:
    """Bytes of the KV slab, the trash page included."""
    return limits.pages * limits.page_tokens * spec.kv_token_bytes(dtype)


def pool_view(kv: torch.Tensor, spec: ModelSpec, limits: Limits, dtype: str) -> torch.Tensor:
    """The slab uint8[pool_bytes] as [pages, layers, 2, page_tokens, kv_heads, head_dim]."""
    item_bytes(dtype)  # Raises ModelError on a dtype that is not served.
    shape = (limits.pages, spec.layers, 2, limits.page_tokens, spec.kv_heads, spec.head_dim)
    return kv.view(_DTYPES[dtype]).view(shape)


def _map(fd: int, size: int, name: str) -> torch.Tensor:
    """uint8[size]: the first `size` bytes of a memfd; the tensor keeps the mapping alive."""
    held = os.fstat(fd).st_size
    if held < size:
        raise WorkerFault(f"{name} memory has {held} bytes, {size} are needed")
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _anonymous(size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
