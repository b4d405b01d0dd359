"""x times a weight's transpose for a decode step's few rows: weights streamed at memory's speed.

A step of m rows reads every weight once and computes 2 * m operations on each, so that up to about
a hundred rows memory rules: an 8B model's layers are 13.9 GB, 3.3 ms at the H200's 4.24 TB/s. A
program owns BLOCK_N rows of the weight and a *split* of its columns, so that there are programs
enough for every SM of narrow products too. The splits of a tile are added in the order of their
numbers by whichever arrives last: the same input gives the same bits, whoever that is.

Before it waits for the kernel ahead of it (ops.kernels.dependent) a program has the first lines of
its weights brought to L2: they depend on nothing.

Called by model.kernel_ops. Knows no model; which products are computed here, and how they are cut,
says ops.kernels.matmul_config: cuBLAS keeps the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.dependent import (
    INTERPRETED,
    launch_dependents,
    launch_options,
    wait_for_previous,
)
from holdfast.ops.kernels.launch import ceil_div, launch
from holdfast.ops.kernels.matmul_config import ROWS_MAX, MatmulConfig, choose_config, workspace

# Elements of a row of the weight that are brought to L2 ahead, 128 bytes a line.
_AHEAD_LINES, _LINE = 2, 64


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
    BIASED: tl.constexpr,
    AHEAD: tl.constexpr,
    LINE: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of BLOCK_N outputs of every row, at most ROWS, over one split of K.

    SWAPPED computes the transpose, so that the weight's rows are the tall side of the product: with
    few rows of x that fills Hopper's product of 64 rows.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    PART: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    WHOLE_N: tl.constexpr = N % BLOCK_N == 0
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    begin = split * PART
    stop = tl.minimum(begin + PART, K)
    weight_row = weight + n[:, None].to(tl.int64) * K
    if DEPENDENT:
        if WHOLE_N and PART >= AHEAD * LINE and K % PART == 0:
            _prefetch(weight_row + begin + tl.arange(0, AHEAD)[None, :] * LINE)
        wait_for_previous()

    live = m < rows
    if SWAPPED:
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(begin, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_at = x + m[:, None] * K + k[None, :]
        if WHOLE_K:
            a = tl.load(x_at, mask=live[:, None], other=0.0)
        else:
            a = tl.load(x_at, mask=live[:, None] & (k < K)[None, :], other=0.0)
        if WHOLE_N and WHOLE_K:
            b = tl.load(weight_row + k[None, :], eviction_policy="evict_first")
        else:
            held = (n < N)[:, None] & (k < K)[None, :]
            b = tl.load(weight_row + k[None, :], mask=held, other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if SWAPPED:
            total = tl.dot(b, a.T, total, input_precision="ieee")
        else:
            total = tl.dot(a, b.T, total, input_precision="ieee")

    if DEPENDENT:
        launch_dependents()
    if SWAPPED:
        at = m[None, :] * N + n[:, None]
        inside = (n < N)[:, None] & live[None, :]
    else:
        at = m[:, None] * N + n[None, :]
        inside = live[:, None] & (n < N)[None, :]
    last = True
    if SPLITS > 1:
        part_size = rows.to(tl.int64) * N
        tl.store(partial + split * part_size + at, total, mask=inside)
        # Every thread's part is there before this program says so.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = tl.zeros_like(total)
            for part in range(SPLITS):
                # Past L1, which knows nothing of what other programs stored.
                there = partial + part * part_size + at
                total += tl.load(there, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
        if BIASED:
            added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            total += added[:, None] if SWAPPED else added[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


class SmallMatmul:
    """Products of one model's shapes on one device, with the workspace of all of them.

    Owns partial float32[...], and arrivals int32[tiles], which are 0 between launches. Launches go
    to one stream, one after another. No call allocates.
    """

    def __init__(
        self,
        device: torch.device | str,
        shapes: Iterable[tuple[int, int]],
        rows_max: int,
        *,
        sm_count: int | None = None,
        config_of: Callable[[int, int, int], MatmulConfig | None] | None = None,
    ) -> None:
        """shapes: (n, k) of every weight; rows_max: more rows are never asked for, and more than
        ROWS_MAX never computed here. sm_count: of the device unless given. config_of: (n, k, rows)
        -> MatmulConfig or None, in place of `choose_config`."""
        self.device = torch.device(device)
        if sm_count is None:
            on_gpu = self.device.type == "cuda"
            properties = torch.cuda.get_device_properties(self.device) if on_gpu else None
            sm_count = properties.multi_processor_count if properties is not None else 1
        self.rows_max = min(rows_max, ROWS_MAX)
        self._configs = {
            (n, k): tuple(
                choose_config(n, k, rows, sm_count) if config_of is None else config_of(n, k, rows)
                for rows in range(1, self.rows_max + 1)
            )
            for n, k in shapes
        }
        parts, tiles = workspace(self._configs)
        self._partial = torch.empty(parts, dtype=torch.float32, device=self.device)
        self._arrivals = torch.zeros(tiles, dtype=torch.int32, device=self.device)

    @property
    def workspace_bytes(self) -> int:
        return 4 * (self._partial.numel() + self._arrivals.numel())

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph has of this object: a part of its address manifest."""
        return self._partial.data_ptr(), self._arrivals.data_ptr()

    def config(self, n: int, k: int, rows: int) -> MatmulConfig | None:
        """What a product is computed with here; None for one that is not."""
        if not 0 < rows <= self.rows_max:
            return None
        configs = self._configs.get((n, k))
        return None if configs is None else configs[rows - 1]

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        config: MatmulConfig,
    ) -> torch.Tensor:
        """out [rows, n] = x [rows, k] times weight [n, k] transposed, plus bias [n]; all packed and
        of one type, sums in float32. config: of `config`. Returns out."""
        (rows, k), n = x.shape, weight.shape[0]
        assert weight.shape == (n, k) and out.shape == (rows, n), (x.shape, weight.shape, out.shape)
        assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
        assert rows <= config.rows, (rows, config)
        launch(
            _multiply,
            (ceil_div(n, config.block_n), config.splits),
            x,
            weight,
            weight if bias is None else bias,
            out,
            self._partial,
            self._arrivals,
            rows,
            N=n,
            K=k,
            ROWS=config.rows,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPLITS=config.splits,
            SWAPPED=config.swapped,
            BIASED=bias is not None,
            AHEAD=_AHEAD_LINES,
            LINE=_LINE,
            WIDE=INTERPRETED or weight.dtype == torch.float32,
            num_warps=config.warps,
            num_stages=config.stages,
            **launch_options(x.device),
        )
        return out
