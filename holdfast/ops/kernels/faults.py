"""Kernels that break the context they run in, each in its own way: for drills, and nothing else.

What the field's reports show (docs/gpu-faults.md has the times): an address that is not mapped, an
instruction that the hardware refuses (a bulk tensor copy through a descriptor of zeros; `trap` on
GPUs before Hopper), a misaligned load, and a kernel that never ends. Compiled by `prepare`, so that
a drill times the fault and not the compiler. Called by device.provoke_cuda alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARPS = 1
_HOPPER = (9, 0)
_DESCRIPTOR_BYTES = 128


@triton.jit
def _store(address, LANES: tl.constexpr):
    """Write where nothing is mapped; `address` is a number, so the compiler cannot know."""
    lane = tl.arange(0, LANES)
    target = (address + lane * 4).to(tl.pointer_type(tl.int32))
    tl.store(target, lane)


@triton.jit
def _misaligned(words, out, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    found = tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];",
        "=r,l",
        args=[words.to(tl.int64) + lane * 4 + 1],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out + lane, found)


@triton.jit
def _trap(out, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    found = tl.inline_asm_elementwise(
        "mov.b32 $0, $1; trap;", "=r,r", args=[lane], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(out + lane, found)


@triton.jit
def _tensor_copy(descriptor, out, LANES: tl.constexpr):
    """A bulk tensor copy (TMA) whose descriptor says nothing: CUDA_ERROR_ILLEGAL_INSTRUCTION."""
    lane = tl.arange(0, LANES)
    found = tl.inline_asm_elementwise(
        """{
        .shared .align 128 .b8 tile[1024];
        .shared .align 8 .b64 barrier;
        .reg .b32 to, bar;
        .reg .b32 zero;
        mov.u32 to, tile;
        mov.u32 bar, barrier;
        mov.b32 zero, 0;
        mbarrier.init.shared::cta.b64 [bar], 1;
        fence.proxy.async.shared::cta;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [to], [$1, {zero, zero}], [bar];
        mov.b32 $0, zero;
        }""",  # noqa: E501 (one instruction)
        "=r,l",
        args=[descriptor.to(tl.int64) + lane * 0],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out + lane, found)


@triton.jit
def _spin(flag, out):
    """Until somebody writes the flag, which nobody does."""
    count = 0
    while tl.load(flag, volatile=True) == 0:
        count += 1
    tl.store(out, count)


class Faults:
    """The kernels, compiled for the present device, and a little memory of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.zeros(64, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(_DESCRIPTOR_BYTES, dtype=torch.int32, device=device)
        self.hopper = torch.cuda.get_device_capability(device) >= _HOPPER
        options = {"grid": (1,), "num_warps": _WARPS}
        # Half of the address space is the driver's to give, none of it at 2**44 + 4.
        self._nowhere = (1 << 44) + (1 << 21)
        _store.warmup(self._nowhere, LANES=32, **options)
        _misaligned.warmup(self._zeros, self._out, LANES=32, **options)
        _trap.warmup(self._out, LANES=32, **options)
        if self.hopper:
            _tensor_copy.warmup(self._zeros, self._out, LANES=32, **options)
        _spin.warmup(self._zeros, self._out, **options)

    def address(self) -> None:
        _store[(1,)](self._nowhere, LANES=32, num_warps=_WARPS)

    def misaligned(self) -> None:
        _misaligned[(1,)](self._zeros, self._out, LANES=32, num_warps=_WARPS)

    def instruction(self) -> None:
        if self.hopper:
            _tensor_copy[(1,)](self._zeros, self._out, LANES=32, num_warps=_WARPS)
        else:
            _trap[(1,)](self._out, LANES=32, num_warps=_WARPS)

    def trap(self) -> None:
        _trap[(1,)](self._out, LANES=32, num_warps=_WARPS)

    def spin(self) -> None:
        _spin[(1,)](self._zeros, self._out, num_warps=_WARPS)
