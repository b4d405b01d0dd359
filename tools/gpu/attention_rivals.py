"""FlashInfer's attention over the same pages, for bench_attention.py, where it is installed.

`decode` and `prefill` yield (name, launch of a layer) of each rival that can be set up; one that
cannot says why on stderr and is left out. KV of a layer is pool[:, layer], [pages, 2, page_tokens,
kv_heads, head_dim], page-major: nothing is copied.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch

Launch = Callable[[int], object]
WORKSPACE_BYTES = 256 << 20


def decode(
    pool: torch.Tensor, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> Iterator[tuple[str, Launch]]:
    """q: [rows, heads, head_dim]; table: int32[rows, W]; lengths: int32[rows]; on the device."""
    if importlib.util.find_spec("flashinfer") is None:
        return
    for name, make in (("flashinfer fa2", _decode_fa2), ("flashinfer xqa", _decode_xqa)):
        yield from _tried(name, lambda make=make: make(pool, q, table, lengths))


def prefill(
    pool: torch.Tensor, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, query_len: int
) -> Iterator[tuple[str, Launch]]:
    """q: [rows * query_len, heads, head_dim], the last tokens of each row."""
    if importlib.util.find_spec("flashinfer") is None:
        return
    for backend in ("fa2", "fa3"):
        yield from _tried(
            f"flashinfer {backend}",
            lambda backend=backend: _prefill(pool, q, table, lengths, query_len, backend),
        )


def _tried(name: str, make: Callable[[], Launch]) -> Iterator[tuple[str, Launch]]:
    try:
        launch = make()
        launch(0)
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        print(f"{name}: left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return
    yield name, launch


def _pages(table: torch.Tensor, lengths: torch.Tensor, page_tokens: int) -> tuple:
    """(indptr, last page's tokens) int32 on the host, (pages of all rows) int32 on the device."""
    host, counts = table.cpu(), -(-lengths.cpu() // page_tokens)
    indices = torch.cat([row[:count] for row, count in zip(host, counts, strict=True)])
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    last = (lengths.cpu() - 1) % page_tokens + 1
    return indptr, last.to(torch.int32), indices.to(table.device)


def _decode_fa2(pool, q, table, lengths) -> Launch:
    import flashinfer

    _, _, _, page_tokens, kv_heads, head_dim = pool.shape
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, kv_layout="NHD", use_tensor_cores=True, backend="fa2"
    )
    indptr, last, indices = _pages(table, lengths, page_tokens)
    wrapper.plan(
        indptr,
        indices,
        last,
        q.shape[1],
        kv_heads,
        head_dim,
        page_tokens,
        q_data_type=q.dtype,
        kv_data_type=pool.dtype,
    )
    out = torch.empty_like(q)
    return lambda layer: wrapper.run(q, pool[:, layer], out=out)


def _decode_xqa(pool, q, table, lengths) -> Launch:
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    length_max = int(lengths.max())
    return lambda layer: trtllm_batch_decode_with_kv_cache(
        query=q,
        kv_cache=pool[:, layer],
        workspace_buffer=workspace,
        block_tables=table,
        seq_lens=lengths,
        max_seq_len=length_max,
        bmm1_scale=scale,
        bmm2_scale=1.0,
        kv_layout="NHD",
        backend="xqa",
        out=out,
    )


def _prefill(pool, q, table, lengths, query_len, backend) -> Launch:
    import flashinfer

    _, _, _, page_tokens, kv_heads, head_dim = pool.shape
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace, kv_layout="NHD", backend=backend
    )
    indptr, last, indices = _pages(table, lengths, page_tokens)
    rows = lengths.numel()
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32) * query_len,
        indptr,
        indices,
        last,
        q.shape[1],
        kv_heads,
        head_dim,
        page_tokens,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=pool.dtype,
    )
    out = torch.empty_like(q)
    return lambda layer: wrapper.run(q, pool[:, layer], out=out)
