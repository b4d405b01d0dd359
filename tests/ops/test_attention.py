"""Paged attention against the same sum written densely, at the edges of pages, tiles and blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.errors import InvariantError
from holdfast.ops import attention
from holdfast.ops.attention import AttentionBatch, Scratch, append_kv, attend, plan_attention

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
LAYERS, LAYER = 3, 1
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pages:
    """A pool full of NaN, and rows of random K and V that were appended to it before."""

    def __init__(self, lengths: list[int], page_tokens: int, seed: int = 0) -> None:
        self.page_tokens = page_tokens
        self.generator = torch.Generator().manual_seed(seed)
        held = [-(-length // page_tokens) for length in lengths]
        pages = sum(held) + 3
        self.pool = torch.full((pages, LAYERS, 2, page_tokens, KV_HEADS, HEAD_DIM), NAN)
        order = np.random.default_rng(seed).permutation(pages - 1).astype(np.int32) + 1
        # Columns a row does not use name page 0 or some other page of NaN.
        self.table = np.zeros((len(lengths), max(held) + 2), np.int32)
        self.table[1::2] = order[-1]
        at = 0
        for row, count in enumerate(held):
            self.table[row, :count] = order[at : at + count]
            at += count
        self.qkv = [torch.randn(n, WIDTH, generator=self.generator) for n in lengths]

    def run(self, starts: list[int], ends: list[int]) -> list[torch.Tensor]:
        """Attention of tokens starts[i]..ends[i] of each row, whose earlier ones are stored."""
        starts_, lens = np.array(starts, np.int32), np.array(ends, np.int32)
        lens = lens - starts_
        batch = AttentionBatch.build(lens, starts_, self.table, self.page_tokens, "cpu")
        qkv = torch.cat([q[s:e] for q, s, e in zip(self.qkv, starts, ends, strict=True)])
        plan = plan_attention(batch, self.pool, HEADS, KV_HEADS, qkv.dtype, Scratch(qkv.device))
        append_kv(plan, self.pool, LAYER, qkv)
        out = torch.full((qkv.shape[0], HEADS * HEAD_DIM), NAN)
        attend(plan, self.pool, LAYER, qkv, out)
        return list(out.split(lens.tolist()))


def dense(qkv: torch.Tensor) -> torch.Tensor:
    """Causal attention of one row in float64: float64[tokens, HEADS * HEAD_DIM]."""
    tokens = qkv.shape[0]
    split = qkv.double().view(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(0, 1)
    q, k, v = split[:HEADS], split[HEADS : HEADS + KV_HEADS], split[HEADS + KV_HEADS :]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
    scores = q @ k.mT / HEAD_DIM**0.5
    scores.masked_fill_(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1)


@pytest.mark.parametrize("page_tokens", [1, 4, 16, 24, 128])
def test_lengths_at_the_edges_of_pages_blocks_and_tiles_match_the_dense_sum(page_tokens) -> None:
    edges = {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129}
    for size in (page_tokens, 2 * page_tokens):
        edges |= {max(1, size - 1), size, size + 1}
    lengths = sorted(edges)
    pages = Pages(lengths, page_tokens)
    got = pages.run([0] * len(lengths), lengths)
    for length, qkv, out in zip(lengths, pages.qkv, got, strict=True):
        torch.testing.assert_close(out.double(), dense(qkv), atol=2e-6, rtol=1e-5, msg=str(length))


def test_decode_rows_and_prefill_chunks_share_a_step() -> None:
    lengths = [40, 130, 1, 65, 64, 97, 16, 63, 64, 127, 128, 129, 80]
    pages = Pages(lengths, 16)
    starts = [39, 60, 0, 64, 32, 0, 15, 62, 63, 126, 127, 128, 62]
    stored = [row for row, start in enumerate(starts) if start]
    for row in stored:
        single = Pages.__new__(Pages)
        single.__dict__ = dict(pages.__dict__)
        single.table, single.qkv = pages.table[row : row + 1], [pages.qkv[row]]
        single.run([0], [starts[row]])
    got = pages.run(starts, lengths)
    for start, qkv, out in zip(starts, pages.qkv, got, strict=True):
        torch.testing.assert_close(out.double(), dense(qkv)[start:], atol=2e-6, rtol=1e-5)


def test_nan_in_page_0_in_unused_pages_and_behind_the_last_token_does_not_enter() -> None:
    for length in (1, 15, 16, 17, 33, 64, 65):
        pages = Pages([length, 3], 16)
        out = torch.cat(pages.run([0, 0], [length, 3]))
        assert bool(pages.pool[:, LAYER].isnan().any()) and not bool(out.isnan().any()), length


def test_nan_of_one_row_stays_in_that_row() -> None:
    pages = Pages([20, 70, 5], 16)
    pages.qkv[1][30] = NAN
    first, second, third = pages.run([0, 0, 0], [20, 70, 5])
    assert not bool(first.isnan().any()) and not bool(third.isnan().any())
    assert bool(second[30:].isnan().all(dim=1).all())


def test_appending_touches_no_other_slot_layer_or_page() -> None:
    pages = Pages([5, 18], 16)
    pages.run([0, 0], [5, 18])
    stored = ~pages.pool.isnan().flatten(start_dim=4).any(-1)
    assert int(stored.sum()) == 2 * (5 + 18)
    assert not bool(stored[:, [0, 2]].any()) and not bool(stored[0].any())
    for row, length in enumerate((5, 18)):
        for position in range(length):
            page = int(pages.table[row, position // 16])
            assert bool(stored[page, LAYER, :, position % 16].all())


def test_a_step_too_large_for_one_part_runs_in_several_with_the_same_bits(monkeypatch) -> None:
    lengths = [150, 40, 1, 90, 64]
    starts = [0, 39, 0, 10, 0]
    results = []
    for elements, group_bytes in ((8 << 20, 4 << 20), (1, 1), (3 * 2 * 96 * 16, 40_000)):
        monkeypatch.setitem(attention.PART_ELEMENTS, "cpu", elements)
        monkeypatch.setitem(attention.GROUP_BYTES, "cpu", group_bytes)
        pages = Pages(lengths, 16)
        pages.run([0] * 5, [max(1, start) for start in starts])
        results.append(torch.cat(pages.run(starts, lengths)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_slots_are_page_times_page_tokens_plus_offset() -> None:
    table = np.array([[7, 3, 0], [5, 0, 0]], np.int32)
    lens, starts = np.array([3, 1], np.int32), np.array([3, 0], np.int32)
    batch = AttentionBatch.build(lens, starts, table, 4, "cpu")
    assert batch.slots.tolist() == [7 * 4 + 3, 3 * 4, 3 * 4 + 1, 5 * 4]
    assert batch.slots.dtype == torch.int64 and batch.tokens == 4


def test_a_table_too_narrow_or_a_page_outside_the_pool_is_our_bug() -> None:
    lens, starts = np.array([5], np.int32), np.array([0], np.int32)
    with pytest.raises(InvariantError):
        AttentionBatch.build(lens, starts, np.zeros((1, 1), np.int32), 4, "cpu")
    with pytest.raises(InvariantError):
        AttentionBatch.build(np.array([0], np.int32), starts, np.ones((1, 9), np.int32), 4, "cpu")
    pool = torch.zeros(3, LAYERS, 2, 4, KV_HEADS, HEAD_DIM)
    for page in (3, -1):
        table = np.array([[1, page]], np.int32)
        with pytest.raises(InvariantError, match="page"):
            batch = AttentionBatch.build(lens, starts, table, 4, "cpu")
            plan_attention(batch, pool, HEADS, KV_HEADS, pool.dtype, Scratch(pool.device))


def test_bfloat16_pages_and_queries_are_served_within_their_precision() -> None:
    pages = Pages([50], 16)
    reference = dense(pages.qkv[0].bfloat16())
    pages.pool = pages.pool.bfloat16()
    batch = AttentionBatch.build(
        np.array([50], np.int32), np.array([0], np.int32), pages.table, 16, "cpu"
    )
    qkv = pages.qkv[0].bfloat16()
    plan = plan_attention(batch, pages.pool, HEADS, KV_HEADS, qkv.dtype, Scratch(qkv.device))
    append_kv(plan, pages.pool, LAYER, qkv)
    out = torch.empty(50, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    attend(plan, pages.pool, LAYER, qkv, out)
    torch.testing.assert_close(out.double(), reference, atol=2e-2, rtol=2e-2)
