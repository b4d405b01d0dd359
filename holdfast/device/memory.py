"""DeviceMemory: the weights slab and the KV slab, seen as tensors without a copy.

Owns the views, not the bytes: these lie in the keeper's memfds or GPU memory (or in memory of this
process: `LLM`, tests, and where a GPU's memory cannot be shared) and outlive it. Invariants: one
slab of each kind, all views inside it; a page's bytes are finite before it is used (fresh memory is
zeros, and `zero_pages` makes the pages of a faulty row so); page-major, so a page is one run of
bytes. Used by device.runner and proc.worker; it knows sizes, and nothing of rows, plans or what a
page holds.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.errors import OptionError, WorkerFault, require
from holdfast.model.spec import ModelSpec, item_bytes
from holdfast.ops.checksum import PageSums, PendingSums, slab_sum

# One whole block of a slab's sum (ops.checksum), where the weights have as much.
_WARM_UP_BYTES = 1 << 20
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
        device: torch.device | str = "cpu",
    ) -> DeviceMemory:
        """Zeroed memory of this process; on the CPU a page takes no room before it is written.

        Raises OptionError("--kv-pages") when a GPU has no room for it.
        """
        weights = _allocated(spec.weights_bytes(dtype), device)
        kv = _allocated(pool_bytes(spec, limits, pool_dtype), device)
        return cls(spec, limits, weights, kv, pool_dtype)

    @classmethod
    def over(
        cls,
        spec: ModelSpec,
        limits: Limits,
        weights: Addressed,
        kv: Addressed,
        *,
        device: torch.device,
        dtype: str,
        pool_dtype: str,
    ) -> DeviceMemory:
        """Over GPU memory that is mapped already; the tensors keep the mappings alive.

        Raises WorkerFault when a mapping is smaller than the model and the limits ask for.
        """
        slabs = []
        for name, mapped, size in (
            ("weights", weights, spec.weights_bytes(dtype)),
            ("KV pool", kv, pool_bytes(spec, limits, pool_dtype)),
        ):
            if mapped.size < size:
                raise WorkerFault(f"{name} memory has {mapped.size} bytes, {size} are needed")
            slabs.append(torch.as_tensor(CudaArray(mapped, size), device=device))
        return cls(spec, limits, *slabs, pool_dtype)

    @property
    def checksum_kernel(self) -> str:
        """What computes sums: numpy | triton | torch; the last is slow, and no other choice."""
        if self.kv.device.type == "cpu":
            return "numpy"
        return "triton" if self._sums.kernel else "torch"

    def seal_sums(self, pages: np.ndarray) -> np.ndarray:
        """uint64[k] checksums (wire.checksum) of whole pages int[k]."""
        return self._sums.of(self.page_words, pages)

    def begin_seal_sums(self, pages: np.ndarray) -> PendingSums:
        """The same, launched now and fetched later."""
        return self._sums.begin(self.page_words, pages)

    def warm_up_sums(self) -> None:
        """Sum the trash page and a piece of the weights, so that nothing is compiled later."""
        self.seal_sums(np.zeros(1, np.int64))
        slab_sum(self.weights[:_WARM_UP_BYTES])

    def zero_pages(self, pages: np.ndarray) -> None:
        """Set all bytes of pages int[k] to zero."""
        if pages.size:
            index = torch.from_numpy(pages.astype(np.int64))
            if self.kv.device.type != "cpu":
                # From pinned memory a copy waits for nothing that was launched before it.
                index = index.pin_memory().to(device=self.kv.device, non_blocking=True)
            self.page_words.index_fill_(0, index, 0)


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


def _allocated(size: int, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    try:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        raise OptionError("--kv-pages", f"{size} bytes of GPU memory: {message}") from None


class Addressed(Protocol):
    """Mapped memory: proc.cuda_memory.Mapping."""

    address: int
    size: int


class CudaArray:
    """uint8[size] at an address, by the protocol that torch reads without a copy."""

    def __init__(self, mapped: Addressed, size: int) -> None:
        self._mapped = mapped  # torch holds this object as long as the tensor lives.
        # Said to be writable: torch refuses what is not. The hardware knows better.
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (mapped.address, False),
            "version": 2,
            "strides": None,
        }
