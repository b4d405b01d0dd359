"""A pool of poison and a step over it, computed by the torch reference and by a kernel of ours.

Free pages, tails of last pages and other layers hold NaN, unused columns of the table ids that are
no pages at all: what reads there shows it, or dies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from holdfast.ops.attention import AttentionBatch, Scratch, append_kv, attend, plan_attention

LAYERS, LAYER = 2, 1
NAN = float("nan")
# Far outside any pool, and so far that reading there ends the process rather than going unnoticed.
NO_PAGE = 0x3FFF_FFFF


@dataclass(frozen=True)
class Shape:
    """Heads and pages of a test."""

    group: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    page_tokens: int = 4

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def made_for(self) -> dict[str, int]:
        """The keywords of the kernels' classes."""
        names = ("heads", "kv_heads", "head_dim", "page_tokens")
        return {name: getattr(self, name) for name in names}


class Step:
    """One step: query_lens[i] new tokens behind starts[i] cached ones, all K and V stored.

    pool: float32 or `dtype`; qkv: [t, width], the step's; table: int32[n, columns] with NO_PAGE in
    the columns that are not used; padding rows have no page and query_len 0.
    """

    def __init__(
        self,
        shape: Shape,
        query_lens: list[int],
        starts: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.lens = np.array(query_lens, np.int32)
        self.starts = np.array(starts, np.int32)
        lengths = self.starts + self.lens
        held = -(-lengths // shape.page_tokens)
        pages = int(held.sum()) + 3
        dims = (pages, LAYERS, 2, shape.page_tokens, shape.kv_heads, shape.head_dim)
        self.pool = torch.full(dims, NAN, dtype=dtype)
        rng = np.random.default_rng(seed)
        order = rng.permutation(pages - 1).astype(np.int32) + 1
        self.table = np.full((lengths.size, int(held.max()) + 2), NO_PAGE, np.int32)
        generator = torch.Generator().manual_seed(seed)
        self.qkv = torch.randn(int(self.lens.sum()), shape.width, generator=generator).to(dtype)
        at = 0
        for row, count in enumerate(held):
            self.table[row, :count] = order[at : at + count]
            at += count
            # What is cached, and then the step's own over it.
            page = torch.from_numpy(self.table[row].astype(np.int64))
            kv = torch.randn(
                int(lengths[row]), 2, shape.kv_heads, shape.head_dim, generator=generator
            )
            for position in range(int(self.starts[row])):
                of = page[position // shape.page_tokens]
                self.pool[of, LAYER, :, position % shape.page_tokens] = kv[position].to(dtype)
        self._append()

    @property
    def lengths(self) -> np.ndarray:
        """int32[n]: tokens in the pages, the step's own included."""
        return self.starts + self.lens

    def batch(self, device: str = "cpu") -> AttentionBatch:
        return AttentionBatch.build(
            self.lens, self.starts, self.table, self.shape.page_tokens, device
        )

    def forget(self, before: list[int], column_page: int = NO_PAGE) -> None:
        """Poison the pages that lie wholly before position before[i] and give their columns away,
        as a window group does, which leaves the trash page 0 there: it is full of NaN here."""
        for row, position in enumerate(before):
            for column in range(position // self.shape.page_tokens):
                self.pool[int(self.table[row, column])] = NAN
                self.table[row, column] = column_page

    def out(self) -> torch.Tensor:
        """Where a kernel is to write, full of NaN."""
        return torch.full((self.qkv.shape[0], self.shape.heads * self.shape.head_dim), NAN).to(
            self.qkv.dtype
        )

    def reference(self) -> torch.Tensor:
        """float32[t, heads * head_dim] by ops.attention, without a window."""
        out = torch.empty(self.qkv.shape[0], self.shape.heads * self.shape.head_dim)
        attend(self._plan(), self.pool, LAYER, self.qkv, out)
        return out

    def windowed(self, window: int) -> torch.Tensor:
        """The same with a window, as a dense sum in float64: the reference has none."""
        shape, out, at = self.shape, [], 0
        for row, count in enumerate(self.lens):
            page = torch.from_numpy(self.table[row].astype(np.int64))
            for token in range(int(count)):
                last = int(self.starts[row]) + token
                positions = torch.arange(max(0, last - window + 1), last + 1)
                of, offset = page[positions // shape.page_tokens], positions % shape.page_tokens
                kv = self.pool[of, LAYER, :, offset].double()
                kv = kv.repeat_interleave(shape.group, dim=2)
                q = self.qkv[at, : shape.heads * shape.head_dim].double().view(shape.heads, -1)
                scores = torch.einsum("hd,phd->hp", q, kv[:, 0]) / shape.head_dim**0.5
                out.append(torch.einsum("hp,phd->hd", scores.softmax(-1), kv[:, 1]).reshape(-1))
                at += 1
        return torch.stack(out).float()

    def _plan(self):
        return plan_attention(
            self.batch(),
            self.pool,
            self.shape.heads,
            self.shape.kv_heads,
            self.qkv.dtype,
            Scratch(self.qkv.device),
        )

    def _append(self) -> None:
        live = self.lens > 0
        lens, starts, table = self.lens, self.starts, self.table
        self.lens, self.starts, self.table = lens[live], starts[live], table[live]
        append_kv(self._plan(), self.pool, LAYER, self.qkv)
        self.lens, self.starts, self.table = lens, starts, table


def close(found: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Equal to what float32 sums of another order allow; NaN never is."""
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5, msg=lambda m: f"{what}: {m}")
