"""What lies between the q, k, v product and attention, in one pass: norm, rotate, append.

A program has some heads of one token. q and k heads are normed (where the family has it) and
rotated, q goes back to where it was, k and v go to their page of the pool. All in float32 with one
rounding at the end, where the torch reference rounds after each of its steps.

Cosines and sines come from a table that torch made once (`rotation_table`): the angle of position
131,071 is a float32 product with an error of its own, and sines computed in a kernel would differ
in it from the reference's. A position outside the table gives NaN, so a row that has one fails by
itself (ROW_NOT_FINITE) and reads nothing that is not its own.

Called by model.kernel_ops. Head counts, head size, page size and layer count are constants of the
engine and compiled in; the layer is an argument that never specialises. Offsets into the pool are
64 bits wide. Floor: (heads + 2 kv heads) * head_dim elements read and written a token, 24 KiB of an
8B model in bfloat16, and head_dim * 4 bytes of table: 0.4 us at 64 tokens, so a launch rules.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.dependent import launch_dependents, launch_options, wait_for_previous
from holdfast.ops.kernels.launch import ceil_div, launch, power_of_two

# Pairs of dimensions of a program, over its heads: 8 a lane with 4 warps.
_PAIRS = 1024
_WARPS = 4


@triton.jit(
    do_not_specialize=["layer", "context"],
    do_not_specialize_on_alignment=["positions", "slots"],
)
def _rotate_append(
    qkv,
    q_norm,
    k_norm,
    positions,
    table,
    slots,
    pool,
    eps,
    layer,
    context,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        launch_dependents()
        wait_for_previous()
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    lane = tl.arange(0, HALF_BLOCK)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    inside = (head < ALL)[:, None] & (lane < HALF)[None, :]

    own = qkv + row * (ALL * HEAD_DIM) + head[:, None] * HEAD_DIM + lane[None, :]
    first = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(own + HALF, mask=inside, other=0.0).to(tl.float32)
    # A pair of dimensions as it is rotated; values are stored as they came.
    a = first
    b = second
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)[:, None]
        q_first = tl.load(q_norm + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        q_second = tl.load(q_norm + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        k_first = tl.load(k_norm + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        k_second = tl.load(k_norm + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        a = first * scale * tl.where(is_query[:, None], q_first[None, :], k_first[None, :])
        b = second * scale * tl.where(is_query[:, None], q_second[None, :], k_second[None, :])

    position = tl.load(positions + row).to(tl.int64)
    known = (lane < HALF) & (position >= 0) & (position < context)
    angle = table + position * HEAD_DIM + lane
    cos = tl.load(angle, mask=known, other=float("nan"))[None, :]
    sin = tl.load(angle + HALF, mask=known, other=float("nan"))[None, :]
    turned = tl.where(is_value[:, None], first, a * cos - b * sin)
    turned_second = tl.where(is_value[:, None], second, b * cos + a * sin)

    back = inside & is_query[:, None]
    tl.store(own, turned.to(qkv.dtype.element_ty), mask=back)
    tl.store(own + HALF, turned_second.to(qkv.dtype.element_ty), mask=back)

    slot = tl.load(slots + row)
    page = slot // PAGE_TOKENS
    token = (page * LAYERS + layer) * (2 * PAGE_TOKENS) + slot % PAGE_TOKENS
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    # Values lie behind the page's keys.
    token_of_head = token + tl.where(is_value, PAGE_TOKENS, 0)
    kept = inside & (head >= HEADS)[:, None] & (slot >= 0)
    target = (token_of_head * KV_HEADS + kv_head) * HEAD_DIM
    there = pool + target[:, None] + lane[None, :]
    tl.store(there, turned.to(pool.dtype.element_ty), mask=kept)
    tl.store(there + HALF, turned_second.to(pool.dtype.element_ty), mask=kept)


def rotation_table(frequencies: torch.Tensor, context_tokens: int) -> torch.Tensor:
    """float32[context_tokens, head_dim]: cosines, then sines, of each position's angles.

    frequencies: float32[head_dim / 2]. As model.layers.Rotation computes them; 64 MiB for 131,072
    positions of 128 dimensions.
    """
    positions = torch.arange(context_tokens, dtype=torch.float32, device=frequencies.device)
    angles = positions[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate_append(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
) -> None:
    """Rotate q in place and store k (rotated) and v of the first t rows in `layer`'s pages.

    qkv: [>= t, (heads + 2 kv_heads) * head_dim], packed; q_norm, k_norm: [head_dim] or both None.
    positions: int32 or int64[t]; table: of `rotation_table`; slots: int64[t], page * page_tokens +
    offset, below 0 for a row that stores nothing. pool: [pages, layers, 2, page_tokens, kv_heads,
    head_dim], packed. k and v are left in qkv as the product gave them.
    """
    _, layers, _, page_tokens, kv_heads, head_dim = pool.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert (heads + 2 * kv_heads) * head_dim == qkv.shape[1] and heads > 0, tuple(qkv.shape)
    assert table.shape[1] == head_dim and table.dtype == torch.float32, tuple(table.shape)
    assert 0 <= layer < layers and positions.numel() == slots.numel() <= qkv.shape[0], layer
    assert qkv.is_contiguous() and pool.is_contiguous() and table.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    half_block = power_of_two(head_dim // 2)
    heads_block = heads_of_program(half_block)
    launch(
        _rotate_append,
        (slots.numel(), ceil_div(heads + 2 * kv_heads, heads_block)),
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        positions,
        table,
        slots,
        pool,
        float(eps),
        layer,
        table.shape[0],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        LAYERS=layers,
        NORM=q_norm is not None,
        HEADS_BLOCK=heads_block,
        HALF_BLOCK=half_block,
        num_warps=_WARPS,
        **launch_options(qkv.device),
    )


def heads_of_program(half_block: int) -> int:
    """Heads that one program has, a power of two."""
    return max(1, _PAIRS // half_block)
