"""Launch contracts: what must hold of a tensor before a kernel may see it, checked once.

A view is made once and used by every step, so its strides, alignment and reach are settled where it
is made and never asked again. Pure functions: the predicates answer with a named reason or None,
`require_launchable` turns a reason into an InvariantError. Callers: model, device, ops. Knows no
model and no kernel.

Why strides of size-1 dimensions: torch calls any stride contiguous there, TMA descriptors do not
(vLLM issue 40737: an illegal instruction). Why 32 bits: kernels multiply page index by page stride
in int32 (flashinfer issue 3136: a wrong page, silently).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

from holdfast.errors import require

INT32_MAX = (1 << 31) - 1


class Reason(enum.Enum):
    """Why a tensor may not be launched on."""

    STRIDE_OF_SIZE_ONE = "a dimension of size 1 has another stride than a packed tensor has"
    NOT_PACKED = "the elements do not lie one behind another"
    MISALIGNED = "the first byte is not aligned"
    BEYOND_INT32 = "an element offset does not fit 32 bits"
    NEGATIVE_OR_ZERO_STRIDE = "two indices reach one element"


def packed_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a packed row-major tensor; a size of 0 counts as 1."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def canonical_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides with those of size-1 dimensions replaced by what the dimension behind implies.

    The stride of the last dimension becomes 1 when its size is 1. Addresses of elements do not
    change: a size-1 dimension is only ever indexed with 0.
    """
    found = list(strides)
    behind = 1
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] == 1:
            found[axis] = behind
        behind = found[axis] * max(shape[axis], 1)
    return tuple(found)


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same elements whose size-1 dimensions have canonical strides."""
    strides = canonical_strides(tensor.shape, tensor.stride())
    if strides == tensor.stride():
        return tensor
    return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """One past the largest element offset, counted from the view's first element."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def strides_reason(shape: Sequence[int], strides: Sequence[int], packed: bool) -> Reason | None:
    """None when the strides are canonical, do not overlap, and (if asked) are packed."""
    if tuple(strides) != canonical_strides(shape, strides):
        return Reason.STRIDE_OF_SIZE_ONE
    if any(stride <= 0 for size, stride in zip(shape, strides, strict=True) if size > 1):
        return Reason.NEGATIVE_OR_ZERO_STRIDE
    if packed and tuple(strides) != packed_strides(shape):
        return Reason.NOT_PACKED
    return None


def alignment_reason(address: int, align_bytes: int) -> Reason | None:
    return Reason.MISALIGNED if address % align_bytes else None


def int32_reason(shape: Sequence[int], strides: Sequence[int]) -> Reason | None:
    """None when every element offset fits a signed 32-bit integer."""
    return Reason.BEYOND_INT32 if reach(shape, strides) - 1 > INT32_MAX else None


def launch_reason(
    tensor: torch.Tensor, *, packed: bool = True, align_bytes: int = 16, int32: bool = False
) -> Reason | None:
    """The first reason not to launch on `tensor`, or None."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    reason = strides_reason(shape, strides, packed)
    if reason is None:
        reason = alignment_reason(tensor.data_ptr(), align_bytes)
    if reason is None and int32:
        reason = int32_reason(shape, strides)
    return reason


def require_launchable(
    name: str,
    tensor: torch.Tensor,
    *,
    packed: bool = True,
    align_bytes: int = 16,
    int32: bool = False,
) -> None:
    """Raise InvariantError, with the numbers, when `tensor` may not be launched on."""
    reason = launch_reason(tensor, packed=packed, align_bytes=align_bytes, int32=int32)
    require(
        reason is None,
        f"{name}: {reason.value if reason else ''} (shape {tuple(tensor.shape)}, strides "
        f"{tuple(tensor.stride())}, address {tensor.data_ptr():#x})",
    )
