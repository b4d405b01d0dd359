"""Causal attention over gathered K and V by warp groups and bulk copies: prefill on Hopper.

Owns the descriptor of the scratch of ops.kernels.gather_kv and the choice of a configuration; the
kernel, and why it waits for nothing for ever, is ops.kernels.warp_attend.

On an H200 (triton 3.6, 32/8 heads of 128): 601 TFLOP/s at 4 x 8,192 causal tokens, 568 with the
gather; prefill_attention has 385, FlashInfer's fa3 511 (tools/gpu/tune_prefill.py). Called by
ops.attention_triton. Does not run in Triton's interpreter, nor on other GPUs (wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from holdfast.errors import require
from holdfast.ops.kernels.gather_config import ALIGN, TILE_ROWS, fits
from holdfast.ops.kernels.gather_kv import Gathered, gather_kv
from holdfast.ops.kernels.launch import launch
from holdfast.ops.kernels.paged_kv import LOG2_E, padded_head
from holdfast.ops.kernels.warp_attend import attend_warps


@dataclass(frozen=True, slots=True)
class WarpConfig:
    """block: positions of a tile of K and V, a divisor of gather_config.ALIGN; stages: tiles of
    each that shared memory holds; heads: query heads of a tile, a divisor of the group, or 0 for
    all of it; tiles_first: tiles are the inner dimension of the grid, else heads; persistent: a
    program an SM, which walks tiles, with the next one's K and V on their way while the last one
    ends, instead of a program a tile; registers: of a thread that multiplies."""

    block: int = 128
    stages: int = 2
    heads: int = 0
    tiles_first: bool = True
    persistent: bool = False
    registers: int = 240


# With a window the masks of both edges and scores of 128 positions do not fit the registers.
_WINDOW_CONFIG = WarpConfig(block=64, stages=4)


class WarpPrefill:
    """Prefill attention of one model's shape over gathered K and V. Has no state of a step."""

    def __init__(
        self, scratch: torch.Tensor, *, heads: int, kv_heads: int, config: WarpConfig | None = None
    ) -> None:
        """scratch: [2, kv_heads, tokens, head_dim], packed, of 2-byte floats; config: with and
        without a window, in place of the measured ones."""
        kv_heads_, head_dim = scratch.shape[1], scratch.shape[3]
        group = heads // kv_heads
        self._config = config if config is not None else WarpConfig()
        self._window_config = config if config is not None else _WINDOW_CONFIG
        self._heads = self._config.heads or group
        require(
            heads % kv_heads == 0
            and kv_heads == kv_heads_
            and group % self._heads == 0
            and fits(heads, kv_heads, head_dim, scratch.element_size()),
            f"{heads} query heads, {self._heads} a tile, and {kv_heads} kv heads over a scratch of "
            f"{tuple(scratch.shape)}, {scratch.dtype}",
        )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self._group = group
        self._scale = head_dim**-0.5
        self._scratch = scratch
        self._tiles_of = {
            block: _descriptor(scratch, block)
            for block in {self._config.block, self._window_config.block}
        }

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a tile: what `cut_tiles` is to be given."""
        return TILE_ROWS // self._heads

    def run(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        rows: Gathered,
        out: torch.Tensor,
        *,
        window: int = 0,
    ) -> None:
        """Gather a layer's K and V, and attention of the rows' query tokens over them, on the
        current stream; other rows of out stay.

        q, pool, out, window: as DecodeAttention.run has them; q, pool, out of the scratch's type.
        """
        gather_kv(pool, layer, rows, self._scratch, window=window)
        self.attend(q, rows, out, window=window)

    def attend(
        self, q: torch.Tensor, rows: Gathered, out: torch.Tensor, *, window: int = 0
    ) -> None:
        """`run` without the gather."""
        config = self._window_config if window else self._config
        count = rows.tiles.shape[1]
        programs = count * (self.heads // self._heads)
        if config.persistent:
            programs = min(programs, _sm_count(q.device))
        launch(
            attend_warps,
            (programs,),
            q,
            self._tiles_of[config.block],
            rows.tiles,
            rows.places,
            out,
            count,
            self._scratch.shape[2],
            window,
            self._scale * LOG2_E,
            WINDOWED=window > 0,
            KV_HEADS=self.kv_heads,
            GROUP=self._group,
            HEADS=self._heads,
            HEAD_DIM=self.head_dim,
            HEAD_PAD=padded_head(self.head_dim),
            Q_STRIDE=q.stride(0),
            OUT_STRIDE=out.stride(0),
            BLOCK=config.block,
            STAGES=config.stages,
            TILES_FIRST=config.tiles_first,
            PERSISTENT=config.persistent,
            REGISTERS=config.registers,
            num_warps=4,
            # Of the whole program before its groups share them anew: 3 x 128 threads.
            maxnreg=168,
        )


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(scratch: torch.Tensor, block: int) -> TensorDescriptor:
    """The scratch as rows of K and V, in tiles of `block` of them."""
    require(ALIGN % block == 0, f"tiles of {block} positions")
    tile = [block, padded_head(scratch.shape[3])]
    dtype = gl.bfloat16 if scratch.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
    return TensorDescriptor.from_tensor(scratch.view(-1, scratch.shape[3]), tile, layout)
