"""A GPU as torch sees it: chosen, set to exact arithmetic, and its errors told from ours.

Owns the process-wide settings of torch for CUDA. Called by proc.worker and `LLM`, once a process,
before any tensor is made. It must not know models, memory slabs or plans.
"""

from __future__ import annotations

import gc

import torch

from holdfast.errors import OptionError


def open_device(name: str) -> torch.device:
    """'cpu', 'cuda' or 'cuda:N' as torch's device, current in this process and with a context.

    Raises OptionError("--device") when this torch cannot use it.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.backends.cuda.is_built():
        raise OptionError(
            "--device", f"torch {torch.__version__} was built without CUDA; install one with it"
        )
    index = device.index or 0
    count = torch.cuda.device_count()
    if index >= count:
        raise OptionError("--device", f"torch sees {count} GPUs, so there is no cuda:{index}")
    device = torch.device("cuda", index)
    make_current(device)
    # The reference is what fast paths are compared with: no shortened products or sums.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.zeros(1, device=device)  # Makes the context, which maps memory from here on.
    return device


def make_current(device: torch.device) -> None:
    """Events, streams and kernels of this thread are the device's from here on: torch and the
    driver know by thread which GPU is current, and begin with cuda:0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def give_back(device: torch.device, failed: bool) -> None:
    """Free what nobody holds any more: graphs and their engine know each other, so they wait for
    Python's collector, and torch keeps a GPU's memory for the next tensor of this process. Of a GPU
    that has `failed` nothing is asked: it may be broken, or busy for ever."""
    gc.collect()
    if device.type == "cuda" and not failed:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def broken(error: BaseException) -> bool:
    """Whether the error is the GPU's: nothing may be asked of it by this process any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    accelerator = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or (
        isinstance(error, RuntimeError) and "CUDA" in str(error)
    )
