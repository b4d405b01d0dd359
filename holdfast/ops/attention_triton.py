"""TritonAttention: paged attention by our own kernels, for a step of any mix of rows.

Owns the workspace of its kernels and the arithmetic of a plan: rows that are alike and short
(decode, verify) go to the split kernel, which asks nothing of the host but the number of rows; all
others to a prefill kernel, over tiles. On Hopper rows with query tokens enough have their K and V
gathered (ops.kernels.gather_config says which), for the kernel that is faster then; the others, and
those that the scratch has no room for, are read from their pages. The choice is one of shapes. A
MixedBatch, whose grids a graph has baked in, has all its prompts gathered or none (`prompt_cut`).
`plan` and `attend` stand where ops.attention's do;
`decode` takes static buffers, for graphs and for eager steps of the same shape, which so compute
the same bits. Imported only where triton is (ops.kernels.available).

Invariant: every call works on the current stream, waits for nothing (but `plan` for the pinned slot
that it used three plans before) and, `plan` again excepted, allocates nothing. The scratch of
gathered rows is made by the first plan that has some, so an object that only decodes has none.
Padding rows (length 0) give zeros and are never looked up in their table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch

from holdfast.errors import require
from holdfast.ops.attention import AttentionBatch, MixedBatch, Scratch, StaticBatch
from holdfast.ops.contracts import require_launchable
from holdfast.ops.kernels.decode_attention import DecodeAttention, DecodeConfig
from holdfast.ops.kernels.gather_config import ALIGN, QUERY_TOKENS_MIN, fits, scratch_tokens
from holdfast.ops.kernels.gather_kv import PLACE_FIELDS, Gathered, choose_rows, place_rows
from holdfast.ops.kernels.paged_kv import INTERPRETED, require_pool
from holdfast.ops.kernels.prefill_attention import (
    TILE_FIELDS,
    PrefillAttention,
    PrefillConfig,
    tiles_of,
)
from holdfast.ops.mixed_arrays import MixedIndex, PromptCut
from holdfast.ops.pinned import Uploads


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """An AttentionBatch on the device, for all layers of one pool. d decode rows come first.

    page_table: int32[n, W]; lengths: int32[d], with the step's own tokens; query_len: of every
    decode row; first_tokens: int32[d], or None where the decode rows are the whole step; tiles:
    int32[4, T], of the rows that are read from pages; gathered: the others, None without any. Where
    the step's K and V go is no part of it: whoever appends has the slots.
    """

    page_table: torch.Tensor
    lengths: torch.Tensor
    first_tokens: torch.Tensor | None
    query_len: int
    tiles: torch.Tensor
    gathered: Gathered | None = None


class GatheredAttention(Protocol):
    """What computes gathered rows; ops.kernels.warp_prefill.WarpPrefill, or its twin in a test."""

    @property
    def tile_tokens(self) -> int: ...

    def run(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        rows: Gathered,
        out: torch.Tensor,
        *,
        window: int = 0,
    ) -> None: ...


class TritonAttention:
    """Attention of one model's shape on one device. One owner, one stream."""

    on_device = True

    def __init__(
        self,
        device: torch.device | str,
        *,
        rows_max: int,
        query_len_max: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        context_max: int,
        itemsize: int = 2,
        config_of: Callable[[int], DecodeConfig] | None = None,
        prefill_config: PrefillConfig | None = None,
        gather_query_tokens: int = QUERY_TOKENS_MIN,
        make_gathered: Callable[..., GatheredAttention] | None = None,
    ) -> None:
        """query_len_max: query tokens of a decode row, 1 + drafts; gather_query_tokens: of a row
        that is gathered, at least; make_gathered: of (scratch, heads=, kv_heads=), in place of what
        the device has; the others as the kernels'."""
        self.device = torch.device(device)
        self._decode = DecodeAttention(
            device,
            rows_max=rows_max,
            query_len_max=query_len_max,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_tokens=page_tokens,
            context_max=context_max,
            itemsize=itemsize,
            config_of=config_of,
        )
        self._prefill = PrefillAttention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_tokens=page_tokens,
            itemsize=itemsize,
            config=prefill_config,
        )
        # A table, lengths and first tokens of every row, and a tile for each and as many more.
        columns = -(-context_max // page_tokens)
        self._gather_query_tokens = gather_query_tokens
        self._gather_tokens = scratch_tokens(rows_max, context_max)
        self._upload_words = rows_max * (columns + 2 + PLACE_FIELDS + 2 * TILE_FIELDS)
        self._upload_words += self._gather_tokens // ALIGN + 1
        # Pinned by the first step that is laid out here, one of a warm-up. Attention of graphs has
        # static batches alone, and never any.
        self._uploads: Uploads | None = None
        if make_gathered is None and _has_warp_groups(self.device):
            make_gathered = _warp_prefill
        self._make_gathered = make_gathered if fits(heads, kv_heads, head_dim, itemsize) else None
        self._gathered: GatheredAttention | None = None
        self._gather_scratch: torch.Tensor | None = None

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph has of this object: a part of its address manifest."""
        gathered = () if self._gather_scratch is None else (self._gather_scratch.data_ptr(),)
        return (*self._decode.addresses, *gathered)

    @property
    def workspace_bytes(self) -> int:
        return self._decode.workspace_bytes

    def prompt_cut(self, pool: torch.Tensor, dtype: torch.dtype) -> PromptCut:
        """How the prompts of a MixedBatch are computed, activations of `dtype` over this pool:
        gathered wherever they can be. Makes what that takes."""
        if self._gathers(pool, dtype):
            return PromptCut(self._gathered_attention(pool).tile_tokens, self._gather_tokens)
        return PromptCut(self._prefill.tile_tokens, 0)

    def plan(
        self,
        batch: AttentionBatch | MixedBatch | StaticBatch,
        pool: torch.Tensor,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        scratch: Scratch,
    ) -> TritonPlan:
        """Lay a step out: its index arrays go to the device in one copy, from pinned memory and
        into memory of the plan's own. Of a static batch they lie there, and nothing is launched.

        The arguments are those of ops.attention.plan_attention; scratch is left alone.
        Raises InvariantError when the step is not of the shape this object was made for, or a row
        uses a page that the pool does not have.
        """
        decode = self._decode
        require(
            (heads, kv_heads, batch.page_tokens)
            == (decode.heads, decode.kv_heads, decode.page_tokens),
            f"{heads} query and {kv_heads} kv heads in pages of {batch.page_tokens}, made for "
            f"{decode.heads}, {decode.kv_heads} and {decode.page_tokens}",
        )
        require_pool(pool, kv_heads, decode.head_dim, batch.page_tokens)
        if isinstance(batch, StaticBatch):
            return self._static_plan(batch)
        if isinstance(batch, MixedBatch):
            return self._mixed_plan(batch)
        lens, starts = batch.query_lens, batch.starts
        rows, query_len = self._decode_rows(lens)
        others = np.setdiff1d(np.arange(lens.size), rows, assume_unique=True)
        taken = self._gathered_rows(lens[others], starts[others], pool, dtype)
        paged, gathered = others[~taken], others[taken]
        tiles = tiles_of(lens, starts, paged, self._prefill.tile_tokens)
        tiles[0] += rows.size
        order = np.concatenate((rows, paged, gathered))
        table = self._table(batch, pool.shape[0])[order]
        arrays = [table, (starts + lens)[rows], np.cumsum(lens)[rows] - lens[rows], tiles]
        if gathered.size:
            assert self._gathered is not None
            arrays += place_rows((starts + lens)[gathered], starts[gathered])
            arrays.append(tiles_of(lens, starts, gathered, self._gathered.tile_tokens))
        if self._uploads is None:
            self._uploads = Uploads(self.device, self._upload_words)
        table_arg, lengths, first_tokens, tiles_arg, *of_gathered = self._uploads.put(
            *(array.astype(np.int32, copy=False) for array in arrays)
        )
        behind = rows.size + paged.size
        return TritonPlan(
            page_table=table_arg,
            lengths=lengths,
            first_tokens=first_tokens if others.size else None,
            query_len=query_len,
            tiles=tiles_arg,
            gathered=Gathered(table_arg[behind:], *of_gathered) if of_gathered else None,
        )

    def attend(
        self,
        plan: TritonPlan,
        pool: torch.Tensor,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        window: int = 0,
    ) -> None:
        """Attention of the step's tokens over their pages, the appended ones included.

        qkv: [>= t, (heads + 2 * kv_heads) * head_dim]; out: [>= t, heads * head_dim], of which the
        first t rows are written. window: positions a token sees, itself included; 0 for all.
        """
        rows = plan.lengths.numel()
        if rows:
            self._decode.run(
                qkv,
                pool,
                layer,
                plan.page_table[:rows],
                plan.lengths,
                out,
                query_len=plan.query_len,
                window=window,
                first_tokens=plan.first_tokens,
            )
        if plan.tiles.numel():
            self._prefill.run(qkv, pool, layer, plan.page_table, plan.tiles, out, window=window)
        if plan.gathered is not None:
            assert self._gathered is not None
            self._gathered.run(qkv, pool, layer, plan.gathered, out, window=window)

    def decode(
        self,
        pool: torch.Tensor,
        layer: int,
        qkv: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        query_len: int = 1,
        window: int = 0,
    ) -> None:
        """A bucket from static buffers: row i's query tokens are rows i * query_len .. of qkv.

        page_table: int32[bucket, W]; lengths: int32[bucket], tokens in the pages with the step's
        own, 0 for padding; both on the device, read there alone. May be captured; `require_static`
        says once whether the buffers will do.
        """
        self._decode.run(
            qkv, pool, layer, page_table, lengths, out, query_len=query_len, window=window
        )

    def require_static(
        self,
        pool: torch.Tensor,
        qkv: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        query_len: int,
    ) -> None:
        """Raise InvariantError unless `decode` may be launched on these buffers."""
        decode, rows = self._decode, lengths.numel()
        require_pool(pool, decode.kv_heads, decode.head_dim, decode.page_tokens)
        for name, tensor, dtype in (
            ("page_table", page_table, torch.int32),
            ("lengths", lengths, torch.int32),
            ("qkv", qkv, qkv.dtype),
            ("out", out, qkv.dtype),
        ):
            require_launchable(name, tensor, packed=tensor.dim() == 1, align_bytes=4)
            require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}")
            require(tensor.stride(-1) == 1, f"{name}: strides {tensor.stride()}")
        for name, tensor in (("qkv", qkv), ("out", out)):
            require(tensor.data_ptr() % 16 == 0, f"{name} begins at {tensor.data_ptr():#x}")
        width, tokens = decode.heads * decode.head_dim, rows * query_len
        require(
            0 < rows <= decode.rows_max
            and 0 < query_len <= decode.query_len_max
            and page_table.shape[0] >= rows
            and min(qkv.shape[0], out.shape[0]) >= tokens
            and qkv.shape[1] >= width
            and out.shape[1] == width,
            f"{rows} rows of {query_len} query tokens: tables {tuple(page_table.shape)}, qkv "
            f"{tuple(qkv.shape)}, out {tuple(out.shape)}",
        )

    def _static_plan(self, batch: StaticBatch) -> TritonPlan:
        return TritonPlan(
            page_table=batch.page_table,
            lengths=batch.lengths,
            first_tokens=None,
            query_len=batch.query_len,
            tiles=batch.lengths.new_empty((TILE_FIELDS, 0)),
        )

    def _mixed_plan(self, batch: MixedBatch) -> TritonPlan:
        index: MixedIndex = batch.index
        rows, table = index.first_tokens.numel(), batch.page_table
        gathered, tiles = None, index.tiles
        if index.used.numel():
            own = index.places, index.owners, index.used, index.tiles
            gathered, tiles = Gathered(table[rows:], *own), tiles[:, :0]
        return TritonPlan(
            page_table=table,
            lengths=index.seen[:rows],
            first_tokens=index.first_tokens,
            query_len=1,
            tiles=tiles,
            gathered=gathered,
        )

    def _decode_rows(self, lens: np.ndarray) -> tuple[np.ndarray, int]:
        """(int64[d] rows for the split kernel, the query tokens of each).

        All rows where they are alike and short; else those of one token: beside chunks of prompts
        nobody drafts.
        """
        query_len = int(lens[0])
        alike = query_len <= self._decode.query_len_max and bool((lens == query_len).all())
        rows = np.arange(lens.size) if alike else np.flatnonzero(lens == 1)
        require(rows.size <= self._decode.rows_max, f"{rows.size} rows to decode")
        return rows, query_len if alike else 1

    def _gathered_rows(
        self, lens: np.ndarray, starts: np.ndarray, pool: torch.Tensor, dtype: torch.dtype
    ) -> np.ndarray:
        """bool[n]: which of these rows are gathered. Makes what computes them where it has to."""
        if not self._gathers(pool, dtype):
            return np.zeros(lens.size, bool)
        taken = choose_rows(lens, starts, self._gather_tokens, self._gather_query_tokens)
        if taken.any():
            self._gathered_attention(pool)
        return taken

    def _gathers(self, pool: torch.Tensor, dtype: torch.dtype) -> bool:
        return self._make_gathered is not None and dtype == pool.dtype

    def _gathered_attention(self, pool: torch.Tensor) -> GatheredAttention:
        if self._gathered is None:
            assert self._make_gathered is not None
            heads, kv_heads, head_dim = self._decode.heads, pool.shape[4], pool.shape[5]
            scratch = pool.new_empty((2, kv_heads, self._gather_tokens, head_dim))
            self._gathered = self._make_gathered(scratch, heads=heads, kv_heads=kv_heads)
            self._gather_scratch = scratch
        return self._gathered

    def _table(self, batch: AttentionBatch, pages: int) -> np.ndarray:
        """int32[n, W]: the columns that the step uses at most. Only used entries are judged."""
        used = -(-(batch.starts.astype(np.int64) + batch.query_lens) // batch.page_tokens)
        table = batch.page_table[:, : int(used.max())]
        held = table[np.arange(table.shape[1]) < used[:, None]]
        require(
            int(held.min()) >= 0 and int(held.max()) < pages,
            f"a step reads pages {held.min()} to {held.max()} of a pool of {pages}",
        )
        return table


@cache
def _has_warp_groups(device: torch.device) -> bool:
    """Whether the device multiplies by warp groups (wgmma): Hopper, which alone has them."""
    compiles = device.type == "cuda" and not INTERPRETED
    return compiles and torch.cuda.get_device_capability(device) == (9, 0)


def _warp_prefill(scratch: torch.Tensor, *, heads: int, kv_heads: int) -> GatheredAttention:
    # Here, since a GPU without warp groups has no use for Gluon.
    from holdfast.ops.kernels.warp_prefill import WarpPrefill

    return WarpPrefill(scratch, heads=heads, kv_heads=kv_heads)
