"""`holdfast bench start`: seconds from the start of a server's process to its first word of ready.

Cold: every folder in which compilers and libraries keep what they built is new and empty. Second:
the same folders, as the first start left them. Files of weights are in the page cache or not as the
machine has it; drawn weights (`--load dummy`) are never read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from holdfast.bench.process import Server

# Where torch, Triton, FlashInfer, the CUDA driver, vLLM and we keep builds; the rest of them follow
# XDG_CACHE_HOME.
CACHES = (
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "CUDA_CACHE_PATH",
    "VLLM_CACHE_ROOT",
)
KINDS = ("cold start", "second start")

Report = Callable[[str, int, int], None]


def measure(server: Server, found: dict[str, list[float]], *, repeats: int, report: Report) -> None:
    """Add the seconds of each start to `found`, by its kind, as it is ready.

    Raises OperatorError with the server's words.
    """
    total, done = repeats * len(KINDS), 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="holdfast-start-") as folder:
            caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
            for path in caches.values():
                Path(path).mkdir()
            for kind in KINDS:
                report(f"start, {server.name}", done, total)
                with server.running(**caches) as started:
                    found.setdefault(kind, []).append(started.seconds)
                done += 1
    report(f"start, {server.name}", total, total)
