"""Capture: work that is recorded once and run again, the same kernels on the same buffers.

`CudaCapture` records CUDA graphs; `Rerun` stands for it where there are none and simply runs the
bound function again, so that everything around a replay (admission, padding, the manifest) is the
same code on a CPU. Called by device.graphs and device.mixed; it knows no steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from holdfast.errors import require

Work = Callable[[], None]


class Capture(Protocol):
    """bakes: a replay uses the addresses that the work's *inner* buffers had when it was captured,
    and not only those that the work was bound to."""

    bakes: bool

    def capture(self, work: Work, rehearsal: Work | None = None) -> Work:
        """Record the work; what is returned replays it. The work takes nothing and returns nothing,
        allocates nothing that outlives it and never waits for the device.

        rehearsal: runs once before, in place of the work, and launches every kernel of it, or
        nothing where another work has; None: the work itself."""
        ...


def require_on_device(capture: Capture, attention: str, *, on_device: bool) -> None:
    """Raise InvariantError where attention that plans on the host would be baked into a graph."""
    require(
        on_device or not capture.bakes,
        f"{attention} attention plans on the host and cannot be captured",
    )


class Rerun:
    """A replay is the work itself."""

    bakes = False

    def capture(self, work: Work, rehearsal: Work | None = None) -> Work:
        (rehearsal or work)()
        return work


class CudaCapture:
    """CUDA graphs of one device, captured on a stream of their own; all share one memory pool.

    Captured largest first, the smaller ones fit into what the largest one freed. A replay runs on
    the stream that is current then, so replays follow each other and never share the pool at once.
    """

    bakes = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device=device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work, rehearsal: Work | None = None) -> Work:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Compiles, loads kernels and makes this stream's workspaces: none of it is captured.
            (rehearsal or work)()
            # torch.cuda.graph() also empties the allocator's cache each time; seventy times that
            # is seconds. Its own threads may go on: a standby captures beside its control channel.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay
