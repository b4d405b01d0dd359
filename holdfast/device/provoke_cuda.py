"""Faults of a CUDA device, made on purpose: what a drill orders, each ending this context.

    address      a store where nothing is mapped            -> illegal memory access
    instruction  a bulk tensor copy without a descriptor    -> illegal instruction
    trap         the instruction that means "stop here"     -> launch failure
    misaligned   a 4-byte load at an odd address            -> misaligned address
    assert       torch's own check of an index              -> device-side assert
    dma          a graph's copy into memory that was freed  -> illegal memory access
    spin         a kernel that never ends                   -> nothing, for ever

Imported only by a worker that was started with drills. `Provoker` prepares everything, so that a
drill does not time a compiler; `fault` launches and waits, and so does not return from `spin`.
"""

from __future__ import annotations

import torch

from holdfast.errors import InvariantError
from holdfast.ops.kernels.faults import Faults

KINDS = ("address", "instruction", "trap", "misaligned", "assert", "dma", "spin")
# More than the allocator keeps in a shared segment, so that freeing unmaps it.
_COPY_BYTES = 64 << 20


class Provoker:
    """Of the present device of this process."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._faults = Faults(self._device)
        self._copy = self._dead_copy()

    def fault(self, kind: str) -> None:
        """Break this context. Raises torch's error for it; `spin` hangs instead."""
        if kind == "assert":
            torch.zeros(1, device=self._device)[torch.tensor([5], device=self._device)]
        elif kind == "dma":
            self._copy.replay()
        elif kind in KINDS:
            getattr(self._faults, kind)()
        else:
            raise InvariantError(f"no fault {kind!r}")
        torch.cuda.synchronize(self._device)

    def _dead_copy(self) -> torch.cuda.CUDAGraph:
        """A graph of one copy engine's copy, whose target is given back before it is replayed."""
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8).pin_memory()
        target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=self._device)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.graph(graph, stream=stream):
            target.copy_(source, non_blocking=True)
        self._source = source  # The graph reads it as long as it lives.
        del target
        torch.cuda.empty_cache()
        return graph
