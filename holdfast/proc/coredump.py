"""GPU core dumps: what a worker's environment says so that the CUDA driver writes one at a fault.

The driver reads these variables when the worker's first context is made, so they are the
supervisor's to set. The dump is a light one: registers, the faulting instruction and the stacks of
all warps, without global, shared, local and constant memory and without the modules' images, hence
without weights and KV cache (a full one of an H200 writes up to 141 GB while streams wait). It is
off by default because the worker is held for as long as the dump is written, and because a worker
that hangs without a fault is noticed that much later (WRITING_S).
"""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import OptionError

OPTION = "--gpu-coredump"
# While the driver writes, the faulted step gives neither a result nor an error, as a hang does: so
# much longer a step may take. Without it a worker of an H200 was killed for hung 0.5 s after its
# fault, before there was a file. An estimate of what a light dump takes.
WRITING_S = 15.0
_LIGHT = (
    "skip_nonrelocated_elf_images",
    "skip_global_memory",
    "skip_shared_memory",
    "skip_local_memory",
    "skip_constbank_memory",
    # The worker goes on to say what the driver told it, and then ends by itself; else it would be
    # aborted without a word.
    "skip_abort",
)


def coredump_environment(folder: Path) -> dict[str, str]:
    """Variables for a worker that dumps into `folder`, one file a process (%h host, %p pid, %t
    seconds since 1970, put in by the driver)."""
    return {
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1",
        "CUDA_COREDUMP_GENERATION_FLAGS": ",".join(_LIGHT),
        "CUDA_COREDUMP_FILE": str(folder.resolve() / "gpu-core-%h-%p-%t"),
    }


def check_device(device: str) -> None:
    """Raises OptionError for a device whose faults no driver dumps."""
    if device.partition(":")[0] != "cuda":
        raise OptionError(OPTION, f"is for --device cuda; a worker on {device} has no GPU to dump")


def make_folder(folder: Path) -> None:
    """The driver makes none. Raises OptionError when it cannot be had."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(OPTION, f"{folder} cannot be made: {error.strerror}") from error
