"""Causal attention of many query tokens over gathered K and V, by the bulk copy engine (TMA).

As ops.kernels.prefill_attention, tiles and parts of the walk included, but K and V lie in the
scratch of ops.kernels.gather_kv: whole tiles come to shared memory by a descriptor, so that no
register holds an address, and products of 64 rows a warp group read them there (wgmma).

A tile has the query tokens of one row and HEADS query heads of one kv head. Scores stay as the
product gives them; the factor goes into the exponent, one multiplication and addition a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from holdfast.errors import require
from holdfast.ops.kernels.gather_kv import ALIGN
from holdfast.ops.kernels.paged_kv import INTERPRETED, LOG2_E, padded_head


@triton.jit
def _scores(queries, k, WIDE: tl.constexpr):
    """float32[M, N] of queries [M, D] and keys [N, D]."""
    if WIDE:
        return tl.dot(queries.to(tl.float32), k.to(tl.float32).T, input_precision="ieee")
    return tl.dot(queries, k.T)


@triton.jit
def _step(scores, values, factor, maximum, weight, total, WIDE: tl.constexpr):
    """(maximum, weight, total) after a block; as paged_kv.softmax_step has it, but scores and
    maximum are before `factor`, which brings them to base 2."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    # -inf less -inf is NaN: what has seen nothing counts from 0.
    base = tl.where(higher == float("-inf"), 0.0, higher * factor)
    p = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(maximum * factor - base)
    weight = weight * shrink + tl.sum(p, 1)
    total = total * shrink[:, None]
    if WIDE:
        total = tl.dot(p, values.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(p.to(values.dtype), values, total)
    return higher, weight, total


@triton.jit
def _hidden(scores, last, position, back):
    distance = last[:, None] - position[None, :]
    return tl.where((distance >= 0) & (distance < back), scores, float("-inf"))


@triton.jit
def _walk(
    queries,
    kv,
    keys_at,
    values_at,
    last,
    begin,
    stop,
    back,
    factor,
    maximum,
    weight,
    total,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    SPECIALISED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The softmax after the blocks begin .. stop, both multiples of BLOCK.

    kv: the scratch as [2 * kv_heads * tokens, head_dim], in tiles of BLOCK rows; keys_at,
    values_at: rows of it that hold position 0. AHEAD multiplies the next block's keys while this
    block's softmax runs.
    """
    if AHEAD:
        if begin < stop:
            scores = _scores(queries, kv.load([keys_at + begin, 0]), WIDE)
            for start in tl.range(begin, stop - BLOCK, BLOCK, warp_specialize=SPECIALISED):
                following = _scores(queries, kv.load([keys_at + start + BLOCK, 0]), WIDE)
                if MASKED:
                    scores = _hidden(scores, last, start + tl.arange(0, BLOCK), back)
                v = kv.load([values_at + start, 0])
                maximum, weight, total = _step(scores, v, factor, maximum, weight, total, WIDE)
                scores = following
            if MASKED:
                scores = _hidden(scores, last, stop - BLOCK + tl.arange(0, BLOCK), back)
            v = kv.load([values_at + stop - BLOCK, 0])
            maximum, weight, total = _step(scores, v, factor, maximum, weight, total, WIDE)
    else:
        for start in tl.range(begin, stop, BLOCK, warp_specialize=SPECIALISED):
            scores = _scores(queries, kv.load([keys_at + start, 0]), WIDE)
            if MASKED:
                scores = _hidden(scores, last, start + tl.arange(0, BLOCK), back)
            v = kv.load([values_at + start, 0])
            maximum, weight, total = _step(scores, v, factor, maximum, weight, total, WIDE)
    return maximum, weight, total


@triton.jit(do_not_specialize=["tiles_len", "rows", "tokens_max", "window"])
def _attend_bulk(
    q,
    kv,
    tiles,
    places,
    out,
    tiles_len,
    rows,
    tokens_max,
    window,
    factor,
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES_FIRST: tl.constexpr,
    AHEAD: tl.constexpr,
    SPECIALISED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile and HEADS query heads. tiles: int32[4, tiles_len] of `cut_tiles`; places: int32[3,
    rows] of `place_rows`."""
    if TILES_FIRST:
        tile = tl.program_id(0)
        part_of_heads = tl.program_id(1)
    else:
        part_of_heads = tl.program_id(0)
        tile = tl.program_id(1)
    first_head = part_of_heads * HEADS
    kv_head = first_head // GROUP
    row = tl.load(tiles + tile)
    first_token = tl.load(tiles + tiles_len + tile)
    tokens = tl.load(tiles + 2 * tiles_len + tile)
    first_position = tl.load(tiles + 3 * tiles_len + tile)
    place = tl.load(places + row)

    part = tl.arange(0, ROWS)
    token = part // HEADS
    live = token < tokens
    head = first_head + part % HEADS
    lane = tl.arange(0, HEAD_PAD)
    inside = live[:, None] & (lane < HEAD_DIM)[None, :]
    at_token = first_token.to(tl.int64) + token
    q_at = at_token[:, None] * Q_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    queries = tl.load(q + q_at, mask=inside, other=0.0)

    last = first_position + token
    keys_at = kv_head * tokens_max + place
    values_at = keys_at + KV_HEADS * tokens_max
    end = tl.cdiv(first_position + tokens, BLOCK) * BLOCK
    whole_end = (first_position + 1) // BLOCK * BLOCK
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    back = 0x7FFFFFFF
    whole = 0
    if WINDOWED:
        # From `low` on the first query token sees, from `whole` on all of them do.
        low = tl.maximum(first_position - window + 1, 0) // BLOCK * BLOCK
        back = window
        whole = tl.cdiv(tl.maximum(first_position + tokens - window, 0), BLOCK) * BLOCK
        whole_end = tl.maximum(whole_end, tl.minimum(whole, end))
        maximum, weight, total = _walk(
            queries, kv, keys_at, values_at, last, low, tl.minimum(whole, end), back, factor,
            maximum, weight, total, True, BLOCK, AHEAD, SPECIALISED, WIDE,
        )  # fmt: skip
    maximum, weight, total = _walk(
        queries, kv, keys_at, values_at, last, whole, whole_end, back, factor, maximum, weight,
        total, False, BLOCK, AHEAD, SPECIALISED, WIDE,
    )  # fmt: skip
    maximum, weight, total = _walk(
        queries, kv, keys_at, values_at, last, whole_end, end, back, factor, maximum, weight,
        total, True, BLOCK, AHEAD, SPECIALISED, WIDE,
    )  # fmt: skip

    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    out_at = at_token[:, None] * OUT_STRIDE + head[:, None] * HEAD_DIM + lane[None, :]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class BulkConfig:
    """rows: query rows of a program, a power of two >= 64; block: positions of a tile of K and V,
    at most gather_kv.ALIGN; heads: query heads of a tile, a divisor of the group, or 0 for all of
    it; tiles_first: tiles are the inner dimension of the grid, else heads; ahead: the next scores
    are computed beside a softmax; specialised: warps of a kind are asked of the compiler;
    registers: of a thread at most, 0 for the compiler's choice."""

    rows: int = 128
    block: int = 64
    warps: int = 8
    stages: int = 3
    heads: int = 0
    tiles_first: bool = True
    ahead: bool = False
    specialised: bool = False
    registers: int = 0


class BulkPrefill:
    """Prefill attention of one model's shape over gathered K and V. Has no state of a step."""

    def __init__(
        self, scratch: torch.Tensor, *, heads: int, kv_heads: int, config: BulkConfig | None = None
    ) -> None:
        """scratch: [2, kv_heads, tokens, head_dim], packed, of 16-byte alignment."""
        self.config = config if config is not None else BulkConfig()
        group, config = heads // kv_heads, self.config
        require(heads % kv_heads == 0, f"{heads} query heads for {kv_heads} kv heads")
        require(ALIGN % config.block == 0, f"tiles of {config.block} positions")
        self.scratch, self.head_dim = scratch, scratch.shape[3]
        self.heads, self.kv_heads, self._group = heads, kv_heads, group
        self._heads = config.heads or group
        require(group % self._heads == 0, f"{self._heads} heads a tile in groups of {group}")
        self._rows = max(config.rows, triton.next_power_of_2(self._heads))
        self._scale = self.head_dim**-0.5
        self._kv = TensorDescriptor.from_tensor(
            scratch.view(-1, self.head_dim), [config.block, padded_head(self.head_dim)]
        )

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a tile: what `cut_tiles` is to be given."""
        return self._rows // self._heads

    def run(
        self,
        q: torch.Tensor,
        places: torch.Tensor,
        tiles: torch.Tensor,
        out: torch.Tensor,
        *,
        window: int = 0,
    ) -> None:
        """Attention of the tiles' query tokens over the scratch, on the current stream.

        q, out, window: as DecodeAttention.run has them. tiles: int32[4, T] of `cut_tiles`, rows as
        places names them; places: int32[3, n] of `place_rows`; both on the device, packed.
        """
        config, count = self.config, tiles.shape[1]
        parts = self.heads // self._heads
        options = {"maxnreg": config.registers} if config.registers else {}
        _attend_bulk[(count, parts) if config.tiles_first else (parts, count)](
            q,
            self._kv,
            tiles,
            places,
            out,
            count,
            places.shape[1],
            self.scratch.shape[2],
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
            ROWS=self._rows,
            BLOCK=config.block,
            TILES_FIRST=config.tiles_first,
            AHEAD=config.ahead,
            SPECIALISED=config.specialised,
            WIDE=INTERPRETED or q.dtype == torch.float32 or q.dtype != self.scratch.dtype,
            num_warps=config.warps,
            num_stages=config.stages,
            **options,
        )
