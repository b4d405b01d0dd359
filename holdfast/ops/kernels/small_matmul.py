"""x times a weight's transpose for a decode step's few rows: weights streamed at memory's speed.

A step of m rows reads every weight once and computes 2 * m operations on each, so that up to about
a hundred rows memory rules: an 8B model's products are 15.1 GB, 3.6 ms at the H200's 4.24 TB/s,
where cuBLAS streams them at 3.4. A program owns BLOCK_N rows of the weight and a *split* of its
columns; the splits of one tile add up in the order of their numbers, done by whichever of them
arrives last, so that the sum does not depend on who that is: the same input gives the same bits.

Before it waits for the kernel ahead of it (ops.kernels.dependent) a program has its first weights
brought to L2: they depend on nothing.

Called by model.kernel_ops through SmallMatmul. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from holdfast.ops.kernels.dependent import launch_dependents, launch_options, wait_for_previous

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Bytes that one prefetch brings.
_LINE_BYTES = 128


@triton.jit
def _prefetch(pointers):
    """Bring the lines of pointers to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x,
    weight,
    weight_at,
    bias,
    out,
    partial,
    arrivals,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAPPED: tl.constexpr,
    BULK: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of BLOCK_N outputs of every row, over one split of K.

    weight: [N, K], or [2 * N, K] with GATED; a descriptor of it with BULK. SWAPPED computes the
    transpose, so that the weight's rows are the tall side of the product.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_K)
    PART: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    WHOLE_N: tl.constexpr = N % BLOCK_N == 0
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    begin = split * PART
    stop = tl.minimum(begin + PART, K)
    if PREFETCHED > 0:
        LINE: tl.constexpr = 64
        line = begin + tl.arange(0, PREFETCHED) * LINE
        _prefetch(weight_at + n[:, None].to(tl.int64) * K + line[None, :])
        if GATED:
            _prefetch(weight_at + (n[:, None].to(tl.int64) + N) * K + line[None, :])
    if DEPENDENT:
        if EARLY:
            launch_dependents()
        wait_for_previous()

    if SWAPPED:
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
        total_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_N], tl.float32)
        total_up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    live = m < rows
    for start in range(begin, stop, BLOCK_K):
        k = start + lane
        if BULK:
            # What lies outside a descriptor's tensor is read as zeros.
            a = x.load([0, start])
            b = weight.load([tile * BLOCK_N, start])
            if GATED:
                up = weight.load([N + tile * BLOCK_N, start])
        else:
            x_at = x + m[:, None] * K + k[None, :]
            if WHOLE_K:
                a = tl.load(x_at, mask=live[:, None], other=0.0)
            else:
                a = tl.load(x_at, mask=live[:, None] & (k < K)[None, :], other=0.0)
            at = n[:, None].to(tl.int64) * K + k[None, :]
            if WHOLE_N and WHOLE_K:
                b = tl.load(weight + at, eviction_policy="evict_first")
                if GATED:
                    up = tl.load(weight + N * K + at, eviction_policy="evict_first")
            else:
                held = (n < N)[:, None] & (k < K)[None, :]
                b = tl.load(weight + at, mask=held, other=0.0, eviction_policy="evict_first")
                if GATED:
                    up = tl.load(
                        weight + N * K + at, mask=held, other=0.0, eviction_policy="evict_first"
                    )
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if SWAPPED:
            total = tl.dot(b, a.T, total, input_precision="ieee")
        else:
            total = tl.dot(a, b.T, total, input_precision="ieee")
        if GATED:
            if WIDE:
                up = up.to(tl.float32)
            if SWAPPED:
                total_up = tl.dot(up, a.T, total_up, input_precision="ieee")
            else:
                total_up = tl.dot(a, up.T, total_up, input_precision="ieee")

    if DEPENDENT:
        if not EARLY:
            launch_dependents()
    if SWAPPED:
        at = m[None, :] * N + n[:, None]
        inside = (n < N)[:, None] & live[None, :]
    else:
        at = m[:, None] * N + n[None, :]
        inside = live[:, None] & (n < N)[None, :]
    last = True
    if SPLITS > 1:
        tl.store(partial + split * ROWS * N + at, total, mask=inside)
        if GATED:
            tl.store(partial + (SPLITS + split) * ROWS * N + at, total_up, mask=inside)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        last = arrived == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = tl.zeros_like(total)
            total_up = tl.zeros_like(total_up)
            for part in range(SPLITS):
                total += tl.load(
                    partial + part * ROWS * N + at, mask=inside, other=0.0, cache_modifier=".cg"
                )
                if GATED:
                    total_up += tl.load(
                        partial + (SPLITS + part) * ROWS * N + at,
                        mask=inside,
                        other=0.0,
                        cache_modifier=".cg",
                    )
            tl.store(arrivals + tile, 0)
        if BIASED:
            added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            total += added[:, None] if SWAPPED else added[None, :]
        if GATED:
            gate = total.to(out.dtype.element_ty).to(tl.float32)
            up = total_up.to(out.dtype.element_ty).to(tl.float32)
            total = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How a product is cut. rows: of a tile, a power of two >= 16; block_n, block_k: of a tile of
    the weight; splits: parts of K; bulk: whether tiles come by the bulk copy engine (TMA);
    prefetch: lines of 128 bytes a weight row that are brought to L2 ahead of the wait."""

    rows: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    swapped: bool = False
    bulk: bool = False
    prefetch: int = 0
    early: bool = True


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: MatmulConfig,
    partial: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    gated: bool = False,
    dependent: bool = False,
) -> torch.Tensor:
    rows, k = x.shape
    n = out.shape[1]
    blocks = triton.cdiv(n, config.block_n)
    x_given, described = x, weight
    if config.bulk:
        x_given = TensorDescriptor.from_tensor(x, [config.rows, config.block_k])
        described = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    options = {"launch_pdl": True} if dependent else {}
    _multiply[(blocks, config.splits)](
        x_given,
        described,
        weight,
        weight if bias is None else bias,
        out,
        partial,
        arrivals,
        rows,
        N=n,
        K=k,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        SWAPPED=config.swapped,
        BULK=config.bulk,
        GATED=gated,
        BIASED=bias is not None,
        PREFETCHED=config.prefetch,
        EARLY=config.early,
        DEPENDENT=dependent,
        WIDE=INTERPRETED or weight.dtype == torch.float32,
        num_warps=config.warps,
        num_stages=config.stages,
        **options,
    )
    return out
