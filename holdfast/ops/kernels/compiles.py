"""CompileCount: how many kernels this process has compiled, so that "none after ready" is a fact.

Triton compiles where a kernel is first launched with a new kind of argument, which in a step is a
stall of seconds. The count is of the whole process; the runner asks it before and after. Without
triton nothing compiles. Called by device.runner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.ops import kernels


class CompileCount:
    """count: kernels compiled since this was made; last: the name of the last one."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""
        if kernels.available():
            import triton

            self._before: Callable[..., Any] | None = triton.knobs.runtime.jit_post_compile_hook
            triton.knobs.runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, *positional: Any, **facts: Any) -> Any:
        """Triton's hook; whoever had it before us is asked too."""
        self.count += 1
        self.last = str(facts.get("repr", ""))
        if self._before is not None:
            return self._before(*positional, **facts)
        return None
