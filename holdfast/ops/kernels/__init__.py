"""Triton kernels, each beside the torch expression that it must equal (tests/ops).

A module here imports triton at its top; who uses it imports it only where triton is (`available`).
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    """Whether triton is installed; it is not where torch was built for the CPU alone."""
    return importlib.util.find_spec("triton") is not None
