"""Programmatic dependent launch: a kernel begins while the one before it ends.

Between two kernels of a stream the GPU drains, starts the next one's programs and fills its memory
pipes again: one to two microseconds, three hundred times a step. A kernel launched as *dependent*
starts when every program of the one before has called `launch_dependents` or ended, and must call
`wait_for_previous` before it touches anything that a kernel of this step writes.

Invariant: every program of a dependent kernel waits, also one that has nothing to do. A kernel is
complete only after its programs are, so by induction all kernels before it are complete behind the
wait, not the last one alone. In the interpreter both are nothing: programs run one after another.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

__all__ = ["launch_dependents", "wait_for_previous"]
