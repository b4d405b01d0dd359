"""What the attention kernels share: where a token's K and V lie, and one step of the softmax.

Device functions, inlined into ops.kernels.decode_attention and prefill_attention, and what both
ask of a head_dim and a pool on the host. A pool is page-major: [pages, layers, 2, page_tokens,
kv_heads, head_dim], K before V. A page of all layers is less than 2**31 elements, a pool may be
more, so a page's offset is 64 bits wide and everything within a page 32.

The home of: NaN that nobody owns stays out. Positions that no query of a program sees are never
loaded (their V is an exact zero, their score -inf), so what lies in free pages, in the tail of a
last page and behind unused columns of a table has no way in, and an id there is no address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from holdfast.errors import require
from holdfast.ops.contracts import INT32_MAX, require_launchable
from holdfast.ops.kernels.launch import power_of_two

LOG2_E = 1.4426950408889634
# Triton's interpreter computes with bfloat16's bits, silently wrong: everything is widened there.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def pages_of(table_row, position, seen, PAGE_TOKENS: tl.constexpr):
    """int32[N] pages of positions int32[N] where `seen`, bool[N]: the table is read there alone."""
    return tl.load(table_row + position // PAGE_TOKENS, mask=seen, other=0)


@triton.jit
def scores_of(q, keys, factor, WIDE: tl.constexpr):
    """float32[M, N]: q [M, D] times keys [D, N], times factor. WIDE computes all in float32."""
    if WIDE:
        scores = tl.dot(q.to(tl.float32), keys.to(tl.float32), input_precision="ieee")
    else:
        scores = tl.dot(q, keys)
    return scores * factor


@triton.jit
def softmax_step(scores, values, maximum, weight, total, WIDE: tl.constexpr):
    """(maximum, weight, total) after the block: scores float32[M, N] in base 2, values [N, D].

    maximum, weight: float32[M]; total: float32[M, D], the sum of values so far, each times 2 to the
    power of its score less the maximum. A row that has seen nothing keeps -inf, 0 and 0.
    """
    higher = tl.maximum(maximum, tl.max(scores, 1))
    # -inf less -inf is NaN: what has seen nothing counts from 0.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(maximum - base)
    weight = weight * shrink + tl.sum(p, 1)
    total = total * shrink[:, None]
    if WIDE:
        total = tl.dot(p, values.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(p.to(values.dtype), values, total)
    return higher, weight, total


def padded_head(head_dim: int) -> int:
    """Lanes a head is computed in: the power of two that holds it, 16 at least."""
    return max(16, power_of_two(head_dim))


def computes_wide(q: torch.Tensor, pool: torch.Tensor) -> bool:
    """Whether products are of float32: always in the interpreter, and where the types say so."""
    return INTERPRETED or pool.dtype == torch.float32 or q.dtype != pool.dtype


def require_pool(pool: torch.Tensor, kv_heads: int, head_dim: int, page_tokens: int) -> None:
    """Raise InvariantError unless the pool is what a kernel was made for.

    Asked where a plan or a graph is made, not in each layer.
    """
    require_launchable("KV pool", pool)
    require(
        pool.dim() == 6 and pool.shape[2:] == (2, page_tokens, kv_heads, head_dim),
        f"KV pool of shape {tuple(pool.shape)}, the kernel is for [pages, layers, 2, "
        f"{page_tokens}, {kv_heads}, {head_dim}]",
    )
    require(pool.stride(0) <= INT32_MAX, f"a page has {pool.stride(0)} elements")
