"""Programmatic dependent launch: a kernel begins while the one before it ends.

Between two kernels of a stream the GPU drains, starts the next one's programs and fills its memory
pipes again: one to two microseconds, three hundred times a decode step. A kernel launched as
*dependent* may start once every program of the one before has called `launch_dependents` or ended,
and calls `wait_for_previous` before it touches anything that a step writes. On Hopper and later;
elsewhere, and in the interpreter, kernels run one after another as ever.

Invariant: every program of a dependent kernel waits, also one that has nothing to do. A kernel is
complete only after its programs are, so by induction all kernels before it are complete behind the
wait, and not only the last one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED:

    @triton.jit
    def wait_for_previous():
        pass

    @triton.jit
    def launch_dependents():
        pass

else:
    from triton.language.extra.cuda import gdc_launch_dependents as launch_dependents
    from triton.language.extra.cuda import gdc_wait as wait_for_previous

__all__ = ["launch_dependents", "launch_options", "wait_for_previous"]


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a kernel of this package that knows DEPENDENT is launched with on a device."""
    return _OPTIONS if _capable(device) else _NO_OPTIONS


_OPTIONS: dict[str, Any] = {"DEPENDENT": True, "launch_pdl": True}
_NO_OPTIONS: dict[str, Any] = {"DEPENDENT": False}


@cache
def _capable(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not INTERPRETED
        and torch.cuda.get_device_capability(device)[0] >= 9
    )
