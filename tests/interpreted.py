"""Kernel modules as Triton's interpreter runs them on a CPU; shared by tests of kernels.

Whether a kernel is interpreted is decided where it is decorated, so a module that something else
imported before is loaded anew. bfloat16 is rounded down there, not to the nearest even.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from holdfast.ops import kernels

MARKS = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
    # numpy's numbers stand for the kernel's there, and say so when they wrap or overflow.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """holdfast.ops.kernels.`name`, interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module(f"holdfast.ops.kernels.{name}")
    from triton.runtime.jit import JITFunction

    if any(isinstance(value, JITFunction) for value in vars(module).values()):
        module = importlib.reload(module)
    return module
