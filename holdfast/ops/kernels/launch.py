"""launch: a kernel again, without asking Triton again which one it is.

Triton looks at every argument of every launch to find the binary that was compiled for its kind: 20
to 30 us of Python, three hundred times a step that is no graph's, which is more than a small model
computes. What decides is little and known here: the types of tensors and whether they begin at a
multiple of 16 bytes (integers of this package specialise nothing and fit 32 bits). So the binary of
each kind is kept, and later launches go to it straight away.

Only for kernels whose constants come behind all other arguments. Whatever is out of the ordinary
(the interpreter, other devices, a profiler's hooks, wide integers) goes Triton's way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from holdfast.ops.kernels.dependent import INTERPRETED

_INT32_MAX = (1 << 31) - 1
# By kernel, device, constants with options, and kinds of arguments: the binary and what it is
# given behind them.
_kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def ceil_div(number: int, divisor: int) -> int:
    """triton.cdiv for the host: Triton's own takes 10 us, as it may be asked by a kernel too."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least that is `number` or more, for number >= 1: triton.next_power_of_2, likewise."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on torch's current stream.

    constants: the kernel's constexprs and launch options, by name; none of them in args.
    """
    device = args[0].device
    if INTERPRETED or device.type != "cuda" or _hooked():
        kernel[grid](*args, **constants)
        return
    # In line, for it is a third of a launch: tensors by type and alignment, the rest by class.
    kinds = tuple(
        [
            (one.dtype, one.data_ptr() & 15) if one.__class__ is torch.Tensor else _kind(one)
            for one in args
        ]
    )
    key = (kernel, device.index, tuple(constants.values()), kinds)
    found = _kept.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if None not in kinds and not _specialises(kernel, args):
            behind = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            _kept[key] = compiled, behind
        return
    compiled, behind = found
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    binary = compiled.function, compiled.packed_metadata
    # Behind them: what Triton tells a profiler, and its hooks.
    compiled.run(*(*grid, 1, 1)[:3], stream, *binary, None, None, None, *args, *behind)


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _specialises(kernel: Any, args: tuple[Any, ...]) -> bool:
    """Whether some integer's value makes another binary."""
    return any(
        isinstance(value, int) and not param.do_not_specialize
        for param, value in zip(kernel.params, args, strict=False)
    )


def _kind(value: Any) -> Any:
    """What of an argument Triton compiles for; None for what is not known here."""
    if value.__class__ is int:
        return int if -_INT32_MAX <= value <= _INT32_MAX else None
    if value.__class__ is float:
        return float
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & 15
    if hasattr(value, "block_shape"):
        # A descriptor for the bulk copy engine; Gluon's has a layout of shared memory besides.
        return value.base.dtype, tuple(value.block_shape), getattr(value, "layout", None)
    return None
