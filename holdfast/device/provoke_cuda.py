"""Faults of a CUDA device, made on purpose: what a drill orders, each ending this context.

    address      a store where nothing is mapped            -> illegal memory access
    instruction  a bulk tensor copy without a descriptor    -> illegal instruction
    trap         the instruction that means "stop here"     -> launch failure
    misaligned   a 4-byte load at an odd address            -> misaligned address
    assert       torch's own check of an index              -> device-side assert
    dma          a graph's copy into memory it outlived     -> launch failure
    spin         a kernel that never ends                   -> nothing, for ever

Imported only by a worker that was started with drills. `Provoker` compiles everything, so that a
drill does not time a compiler; `fault` launches and waits, and so does not return from `spin`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from holdfast.cuda_driver import READ_WRITE, Driver
from holdfast.device.memory import CudaArray
from holdfast.errors import InvariantError
from holdfast.ops.kernels.faults import Faults

KINDS = ("address", "instruction", "trap", "misaligned", "assert", "dma", "spin")
_COPY_BYTES = 2 << 20


class _Address(NamedTuple):
    """Mapped memory, as device.memory asks for it."""

    address: int
    size: int


class Provoker:
    """Of the present device of this process."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._faults = Faults(self._device)

    def fault(self, kind: str) -> None:
        """Break this context. Raises torch's error for it; `spin` hangs instead."""
        if kind == "assert":
            torch.zeros(1, device=self._device)[torch.tensor([5], device=self._device)]
        elif kind == "dma":
            self._dead_copy().replay()
        elif kind in KINDS:
            getattr(self._faults, kind)()
        else:
            raise InvariantError(f"no fault {kind!r}")
        torch.cuda.synchronize(self._device)

    def _dead_copy(self) -> torch.cuda.CUDAGraph:
        """A graph of one copy engine's copy, whose target is unmapped before it runs again.

        It runs once before: the driver looks at the target when a graph is first launched, and
        refuses the copy, or crashes. The addresses stay reserved.
        """
        driver, ordinal = Driver(), self._device.index
        handle = driver.create(_COPY_BYTES, ordinal)
        where = _Address(driver.reserve(_COPY_BYTES, _COPY_BYTES), _COPY_BYTES)
        driver.map(where.address, where.size, handle)
        driver.allow(where.address, where.size, ordinal, READ_WRITE)
        target = torch.as_tensor(CudaArray(where, where.size), device=self._device)
        # The graph reads it as long as it lives.
        self._source = torch.zeros(_COPY_BYTES, dtype=torch.uint8).pin_memory()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)):
            target.copy_(self._source, non_blocking=True)
        graph.replay()
        torch.cuda.synchronize(self._device)
        driver.unmap(where.address, where.size)
        driver.release(handle)
        return graph
