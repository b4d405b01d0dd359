"""The kernel of ops.kernels.small_matmul for 64 to 256 rows: warp groups with parts of their own.

x times a weight's transpose (Hopper, Gluon). One warp has tiles of the weight and of x copied to
shared memory (TMA); GROUPS warp groups multiply, each 64 rows of the weight with all rows of x in
the tile. Three groups make tiles of 192 rows of the weight, a size that plain Triton has not, and
that cuts an 8B model's gate and up into 128 programs for 132 SMs.

The copying warp fills all its stages with weights before it waits for the kernel ahead of it
(ops.kernels.dependent): they depend on nothing. x follows behind the wait.

Nothing waits for ever: the copying warp and the groups walk the same blocks in the same order. A
stage is filled again once every group has said that its product of that stage is done; a group says
so of a block after the next one's product has begun, hence of all blocks but the last, which nobody
waits for. A block's number gives its stage and the parity of its turn, the same to all.

Does not run in Triton's interpreter, nor on other GPUs (wgmma).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Its name until triton 3.6, and since 3.7.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def _copy_weights(
    weight, held, ready, stage, n, k, GROUPS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(
            weight, [n + group * 64, k], ready.index(stage), held.index(group * STAGES + stage)
        )


@gluon.jit
def _copy_x(
    x, x_held, ready, stage, first_row, k,
    ROWS: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for half in gl.static_range(HALVES):
        tma.async_copy_global_to_shared(
            x, [first_row + half * ROWS, k], ready.index(stage), x_held.index(half * STAGES + stage)
        )


@gluon.jit
def _produce(
    x, weight, x_held, held, ready, empty, first_row, n, begin, blocks,
    ROWS: gl.constexpr, HALVES: gl.constexpr, BLOCK_K: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Have blocks 0 .. blocks - 1 copied, from column `begin` on."""
    BYTES: gl.constexpr = HALVES * x.block_type.nbytes + GROUPS * weight.block_type.nbytes
    ahead = gl.minimum(blocks, STAGES)
    for block in range(0, ahead):
        mbarrier.expect(ready.index(block), BYTES)
        _copy_weights(weight, held, ready, block, n, begin + block * BLOCK_K, GROUPS, STAGES)
    if DEPENDENT:
        gdc_wait()
    for block in range(0, ahead):
        k = begin + block * BLOCK_K
        _copy_x(x, x_held, ready, block, first_row, k, ROWS, HALVES, STAGES)
    for block in range(STAGES, blocks):
        stage = block % STAGES
        k = begin + block * BLOCK_K
        mbarrier.wait(empty.index(stage), (block // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        _copy_x(x, x_held, ready, stage, first_row, k, ROWS, HALVES, STAGES)
        _copy_weights(weight, held, ready, stage, n, k, GROUPS, STAGES)
    if DEPENDENT:
        gdc_launch_dependents()


@gluon.jit
def _consume(
    bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row, n, place, split,
    blocks,
    N: gl.constexpr, ROWS: gl.constexpr, HALVES: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, BIASED: gl.constexpr, DEPENDENT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Rows n + 64 * GROUP .. of the weight, times the tile's rows of x. place: of group 0's result
    in the workspace."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    total = gl.zeros([64, ROWS], gl.float32, layout)
    other = gl.zeros([64, ROWS], gl.float32, layout)
    for block in range(0, blocks):
        stage = block % STAGES
        mbarrier.wait(ready.index(stage), block // STAGES & 1)
        mine = held.index(GROUP * STAGES + stage)
        x_tile = x_held.index(stage).permute((1, 0))
        total = warpgroup_mma(mine, x_tile, total, is_async=True)
        if HALVES == 2:
            x_tile = x_held.index(STAGES + stage).permute((1, 0))
            other = warpgroup_mma(mine, x_tile, other, is_async=True)
            total, other = warpgroup_mma_wait(2, deps=(total, other))
        else:
            total = warpgroup_mma_wait(1, deps=(total,))
        # The block before is done with, this one is not.
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), count=1, pred=block > 0)
    if HALVES == 2:
        total, other = warpgroup_mma_wait(0, deps=(total, other))
    else:
        total = warpgroup_mma_wait(0, deps=(total,))

    if DEPENDENT:
        gdc_wait()
    first = n + GROUP * 64
    last = True
    if SPLITS > 1:
        PART: gl.constexpr = HALVES * ROWS * 64
        m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
        lane = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        at = m[None, :] * 64 + lane[:, None]
        parts = partial + (place + GROUP).to(gl.int64) * (SPLITS * PART)
        gl.store(parts + split * PART + at, total)
        if HALVES == 2:
            gl.store(parts + split * PART + ROWS * 64 + at, other)
        # Every thread's part is there before this group says so.
        _barrier()
        last = gl.atomic_add(arrivals + place + GROUP, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = _added(parts + at, SPLITS, PART, ROWS, layout)
        _store(total, bias, out, rows, first_row, first, N, ROWS, BIASED, layout)
        if HALVES == 2:
            if SPLITS > 1:
                other = _added(parts + ROWS * 64 + at, SPLITS, PART, ROWS, layout)
            _store(other, bias, out, rows, first_row + ROWS, first, N, ROWS, BIASED, layout)
        if SPLITS > 1:
            gl.store(arrivals + place + GROUP, 0)


@gluon.jit
def _added(
    parts, SPLITS: gl.constexpr, PART: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The splits' parts, in the order of their numbers. parts: pointers to those of the first."""
    total = gl.zeros([64, ROWS], gl.float32, layout)
    for part in range(0, SPLITS):
        # Past L1, which knows nothing of what other programs stored.
        total += gl.load(parts + part * PART, cache_modifier=".cg")
    return total


@gluon.jit
def _store(
    total, bias, out, rows, first_row, first, N: gl.constexpr, ROWS: gl.constexpr,
    BIASED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """total [64, ROWS] to out, whose rows are total's columns, 16 bytes a thread."""
    if BIASED:
        lane = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        total += gl.load(bias + lane, mask=lane < N, other=0.0).to(gl.float32)[:, None]
    packed: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    result = gl.convert_layout(total.to(out.dtype.element_ty), packed)
    n = first + gl.arange(0, 64, layout=gl.SliceLayout(1, packed))
    m = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, packed))
    at = m.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(out + at, result, mask=(n < N)[:, None] & (m < rows)[None, :])


@gluon.jit(do_not_specialize=["rows"])
def multiply_warps(
    out,
    x,
    weight,
    bias,
    partial,
    arrivals,
    rows,
    N: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUPS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    BIASED: gl.constexpr,
    REGISTERS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """A tile of HALVES * ROWS rows of x and 64 * GROUPS rows of the weight, over one split of K.

    HALVES: 1 or 2 products a block and group. x, weight: descriptors of tiles [ROWS, BLOCK_K] and
    [64, BLOCK_K]; what lies outside of either reads 0. partial: [tiles, tiles of rows, GROUPS,
    SPLITS, HALVES, ROWS, 64]."""
    row_tile = gl.program_id(0)
    tile = gl.program_id(1)
    split = gl.program_id(2)
    BLOCKS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PART: gl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    blocks = gl.maximum(gl.minimum(BLOCKS - split * PART, PART), 0)
    begin = split * PART * BLOCK_K
    first_row = row_tile * (HALVES * ROWS)
    n = tile * (64 * GROUPS)
    place = (tile * gl.num_programs(0) + row_tile) * GROUPS

    x_held = gl.allocate_shared_memory(x.dtype, [HALVES * STAGES, ROWS, BLOCK_K], x.layout)
    held = gl.allocate_shared_memory(weight.dtype, [GROUPS * STAGES, 64, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    # Written out for each number of groups: constants out of a tuple are none to the compiler.
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 0,
                    ),
                ),
                (
                    _produce,
                    (
                        x, weight, x_held, held, ready, empty, first_row, n, begin, blocks, ROWS,
                        HALVES, BLOCK_K, GROUPS, STAGES, DEPENDENT,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 1,
                    ),
                ),
                (
                    _produce,
                    (
                        x, weight, x_held, held, ready, empty, first_row, n, begin, blocks, ROWS,
                        HALVES, BLOCK_K, GROUPS, STAGES, DEPENDENT,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 1,
                    ),
                ),
                (
                    _consume,
                    (
                        bias, out, partial, arrivals, x_held, held, ready, empty, rows, first_row,
                        n, place, split, blocks, N, ROWS, HALVES, SPLITS, STAGES, BIASED,
                        DEPENDENT, 2,
                    ),
                ),
                (
                    _produce,
                    (
                        x, weight, x_held, held, ready, empty, first_row, n, begin, blocks, ROWS,
                        HALVES, BLOCK_K, GROUPS, STAGES, DEPENDENT,
                    ),
                ),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip


# By groups: registers of a thread of the program before its groups share them anew, 64 Ki of them
# by 128 threads a group and as many around the copying warp; and of a thread that multiplies then.
REGISTERS = {1: (248, 240), 2: (168, 240), 3: (128, 160)}


def describe(tensor: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    """A packed [rows, k] of 2-byte floats, k a multiple of 8, in tiles of it."""
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
    return TensorDescriptor.from_tensor(tensor, tile, layout)
