"""PinnedCopies: a checkpoint's tensors to a GPU, at the speed at which the files can be read.

A copy from pageable memory waits for the driver's own small buffers. Here a piece is read from the
mapped file into a pinned buffer while the copy engine takes the piece before from another; what has
another type of numbers is converted on the GPU. Used by model.weights while it loads. Invariant: a
buffer is written again only after its copy is over.
"""

from __future__ import annotations

import torch

# Two pieces are in the air at once; 32 MiB take 0.6 ms of the bus.
PIECE_BYTES = 32 << 20


class PinnedCopies:
    """Into tensors of one GPU. One owner, one thread; `finish` before the targets are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8).pin_memory() for _ in (0, 1)]
        self._done = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target: packed, on the GPU; source: of the same shape, on the CPU, of any float type."""
        into, data = target.view(-1), source.reshape(-1)
        step = PIECE_BYTES // data.element_size()
        for first in range(0, data.numel(), step):
            self._piece(into[first : first + step], data[first : first + step])

    def finish(self) -> None:
        """Wait until every copy is over. Raises what the GPU has to say of them."""
        torch.cuda.synchronize(self._device)

    def _piece(self, into: torch.Tensor, data: torch.Tensor) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        self._done[turn].synchronize()
        pinned = self._buffers[turn][: data.numel() * data.element_size()].view(data.dtype)
        pinned.copy_(data)
        if data.dtype == into.dtype:
            into.copy_(pinned, non_blocking=True)
        else:
            into.copy_(pinned.to(self._device, non_blocking=True))
        self._done[turn].record()
