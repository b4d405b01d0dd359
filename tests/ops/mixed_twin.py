"""Steps of attention_twin laid out as a graph of steps with prompts has them: in a bucket that is
larger, over index arrays that are mostly empty. For tests of ops.mixed_arrays, interpreted and on a
GPU; imported where there is triton."""

from __future__ import annotations

import numpy as np
import torch
from attention_twin import LAYER, NAN, NO_PAGE, Step

from holdfast.ops.attention import MixedBatch, Scratch
from holdfast.ops.mixed_arrays import MixedArrays


class Bucket:
    """One bucket of one TritonAttention. Step after step is computed in the same arrays."""

    def __init__(self, attention, pool: torch.Tensor, *, tokens: int, rows_max: int) -> None:
        """pool: of the steps' shape and type."""
        cut = attention.prompt_cut(pool, pool.dtype)
        self.attention, self.tokens = attention, tokens
        self.arrays = MixedArrays(pool.device, cut, rows_max=rows_max, tokens_max=tokens)

    def put(self, step: Step) -> None:
        rows = np.arange(step.lens.size, dtype=np.int32)
        self.arrays.put(self.tokens, rows, step.lens, step.starts)

    def attend(self, step: Step, window: int = 0) -> torch.Tensor:
        """float32[N, heads * head_dim], host: rows of padding too, which are NaN before."""
        self.put(step)
        index = self.arrays.index(self.tokens)
        device = index.rows.device
        table = torch.full((index.rows.numel(), step.table.shape[1]), NO_PAGE, dtype=torch.int32)
        for at, row in enumerate(index.rows.tolist()):
            if row >= 0:
                table[at] = torch.from_numpy(step.table[row])
        count = step.qkv.shape[0]
        qkv = torch.full((self.tokens, step.shape.width), NAN).to(step.qkv.dtype)
        qkv[:count] = step.qkv
        out = torch.full((self.tokens, step.shape.heads * step.shape.head_dim), NAN)
        out = out.to(qkv.dtype).to(device)
        batch = MixedBatch(
            page_table=table.to(device),
            slots=torch.full((self.tokens,), -1, dtype=torch.int64, device=device),
            page_tokens=step.shape.page_tokens,
            index=index,
        )
        heads = step.shape.heads, step.shape.kv_heads
        pool, qkv = step.pool.to(device), qkv.to(device)
        plan = self.attention.plan(batch, pool, *heads, qkv.dtype, Scratch(device))
        self.attention.attend(plan, pool, LAYER, qkv, out, window)
        return out.cpu().float()
