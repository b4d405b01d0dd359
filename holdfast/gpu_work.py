"""What a process that computes takes of a GPU beside weights, pages and its context.

Pure arithmetic over a model's dimensions and the limits, so that `holdfast plan` knows it before
anything is loaded; tests hold it against the buffers that are really made (tests/cli, on a CPU) and
against torch's own peak (tests/gpu). Called by sizing. No torch, no triton.
"""

from __future__ import annotations

from typing import Protocol

from holdfast.config import Limits
from holdfast.ops.kernels import gather_config, matmul_config
from holdfast.ops.kernels.decode_config import splits_max
from holdfast.ops.mixed_config import (
    decode_rows,
    layer_parameters,
    prompt_rows,
    row_elements,
    token_buckets,
)

MIB = 1 << 20

# What a step of the torch reference needs at most, besides what grows with the model: the scratch
# of attention (ops.attention: 128 MiB gathered in two types, partial results of 128 MiB in three
# copies, scores and index arrays).
REFERENCE_SCRATCH_BYTES = 1 << 30
# Bytes a row and word of the vocabulary in the sampler: logits, edited logits, noise, scores and
# probabilities in float32, keys in int64 twice, sorted.
_SAMPLER_BYTES = 48
# Bytes a query token and hidden element, or element of the gated layer: the stream, its norms,
# q, k, v, attended and products; both halves of the gate, in the model's type and in float32.
_HIDDEN_BYTES, _GATED_BYTES = 64, 20
# torch's allocator takes memory in pieces of 2 and 20 MiB and more, and keeps what a smaller step
# left: room for a dozen of the larger. An estimate.
_PIECES_BYTES = 256 * MIB
# cuBLAS keeps a workspace a stream: 32 MiB on Hopper. The first stream's is part of a context.
_CUBLAS_BYTES = 32 * MIB
# A node of an instantiated graph, its kernel's arguments included, and nodes a layer (four
# launches, four products of up to two kernels, attention). An estimate until it is measured.
_NODE_BYTES, _LAYER_NODES = 16 << 10, 16
# Fields of a row of one token, of a prompt, and of a tile in ops.mixed_arrays.
_ONE_WORDS, _PROMPT_WORDS, _TILE_WORDS = 3, 5, 4
# More than the GPUs of today have (H200 132, B200 148, RTX PRO 6000 188): more SMs, more splits.
_SM_COUNT = 192
# ops.kernels.sample: 16 bytes for each tile of 4,096 ids of a row.
_DRAW_TILE, _DRAW_BYTES = 4096, 16
# device.frame: 16 Ki page writes at least, 16 words of a header and five arrays of the rows.
_FRAME_WORDS, _FRAME_HEADER, _FRAME_ARRAYS = 1 << 16, 16, 5
# wire.plan's ADMIT and what stands beside it in a frame, in words of 4 bytes.
_RECORD_WORDS, _ADMIT_WORDS = 20, 23


class Dimensions(Protocol):
    """What the arithmetic needs of a model; model.spec.ModelSpec has it."""

    vocab_size: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int


def work_bytes(
    model: Dimensions, limits: Limits, *, itemsize: int, kernels: str, graphs: bool
) -> int:
    """Of one process. itemsize: bytes of a number of weights and pages; kernels: of
    config.KERNELS."""
    step = step_bytes(model, limits)
    if kernels == "reference":
        return REFERENCE_SCRATCH_BYTES + step
    assert kernels == "triton", kernels
    shape = attention_workspace_bytes(model, limits, itemsize) + rotation_bytes(model, limits)
    if itemsize == 2:
        shape += product_workspace_bytes(model, limits)
    work = _PIECES_BYTES + step + shape + gather_bytes(model, limits, itemsize, graphs=graphs)
    if not graphs:
        return work
    # Graphs have a decoder of their own: its workspace, its table and its scratch.
    own = shape + _tokens_bytes(model) * limits.rows_max + _CUBLAS_BYTES
    own += mixed_buffer_bytes(model, limits, itemsize) + mixed_graph_bytes(model, limits)
    return work + own + row_state_bytes(limits) + graph_pool_bytes(model, limits, itemsize)


def step_bytes(model: Dimensions, limits: Limits) -> int:
    """Scratch of the largest step of prompts and of the general sampler, attention's left out."""
    sampler = _SAMPLER_BYTES * limits.rows_max * model.vocab_size
    return sampler + _tokens_bytes(model) * limits.prefill_tokens


def _tokens_bytes(model: Dimensions) -> int:
    """Of one query token."""
    return _HIDDEN_BYTES * model.hidden_size + _GATED_BYTES * 2 * model.intermediate_size


def attention_workspace_bytes(
    model: Dimensions, limits: Limits, itemsize: int, sm_count: int = _SM_COUNT
) -> int:
    """ops.kernels.decode_attention's at most: a partial result and its weight, in float32, for each
    split of each query head of a row, in the bucket that has most of them."""
    context = limits.table_columns * limits.page_tokens
    shape = model.kv_heads, model.head_dim, itemsize, context, sm_count
    splits = max(rows * splits_max(rows, *shape) for rows in range(1, limits.rows_max + 1))
    arrivals = limits.rows_max * model.kv_heads
    return 4 * (splits * model.heads * (model.head_dim + 1) + arrivals)


def gather_bytes(model: Dimensions, limits: Limits, itemsize: int, *, graphs: bool = False) -> int:
    """ops.attention_triton's scratch of gathered rows, which Hopper alone makes: where a step may
    have a row with query tokens enough, or graphs of steps with prompts, which gather all rows.
    Eager steps and graphs have one."""
    longest = min(limits.prefill_tokens, limits.context_tokens)
    all_rows = graphs and bool(_token_ladder(model, limits))
    if longest < gather_config.QUERY_TOKENS_MIN and not all_rows:
        return 0
    context = limits.table_columns * limits.page_tokens
    shape = model.heads, model.kv_heads, model.head_dim
    return gather_config.scratch_bytes(*shape, itemsize, limits.rows_max, context)


def product_workspace_bytes(model: Dimensions, limits: Limits, sm_count: int = _SM_COUNT) -> int:
    """ops.kernels.small_matmul's: the parts of the largest product that is split, in float32."""
    products = matmul_config.layer_products(vocab=model.vocab_size, **_layer(model))
    rows = range(1, min(limits.rows_max, matmul_config.ROWS_MAX) + 1)
    return 4 * sum(
        matmul_config.workspace(
            {
                (n, k): [matmul_config.choose_config(n, k, count, sm_count) for count in rows]
                for n, k in products
            }
        )
    )


def layer_weights(model: Dimensions) -> int:
    """Numbers in the products of all layers; a token takes two operations on each."""
    return model.layers * layer_parameters(**_layer(model))


def _layer(model: Dimensions) -> dict[str, int]:
    """A layer's dimensions, by the names that the pure tables of ops have for them."""
    return {
        "hidden": model.hidden_size,
        "intermediate": model.intermediate_size,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }


def rotation_bytes(model: Dimensions, limits: Limits) -> int:
    """ops.kernels.rope's table: float32[context, head_dim]."""
    return 4 * limits.context_tokens * model.head_dim


def row_state_bytes(limits: Limits) -> int:
    """device.device_rows' tables and the frame, and the static buffers of device.buckets."""
    rows, groups, columns = limits.rows_total, limits.groups, limits.table_columns
    lists = 2 * limits.bias_entries + limits.stop_ids
    row = _RECORD_WORDS + 1 + groups * (columns + 1) + limits.context_tokens + 1 + lists
    longest = _ADMIT_WORDS + limits.context_tokens + lists
    frame = _FRAME_HEADER + _FRAME_ARRAYS * limits.rows_max + max(_FRAME_WORDS, longest)
    # Results in four arrays, table widths, and of a bucket: rows, lengths, samples, seen and
    # temperature in four bytes; tokens, positions, slots, seeds and draw positions in eight.
    bucket = 4 + groups + 5 + groups * columns + 2 * (4 + groups)
    return 4 * (rows * row + frame + limits.rows_max * bucket)


def graph_pool_bytes(model: Dimensions, limits: Limits, itemsize: int) -> int:
    """What captures allocate, the largest first in one pool, and the graphs themselves.

    A body leaves the hidden states, a tail the logits, both in the model's type; the next capture
    takes what the last one freed, or as much again where it does not fit. Besides the buffer that
    hidden states are kept in, and the workspace of draws.
    """
    # Here, since it has numpy, which `--help` does not wait for.
    from holdfast.wire.envelope import buckets

    rows = limits.rows_max
    captured = 2 * rows * (model.vocab_size + 2 * model.hidden_size) * itemsize
    hidden = rows * model.hidden_size * itemsize
    nodes = len(buckets(rows)) * (_LAYER_NODES * model.layers + 32)
    return captured + hidden + draw_bytes(model, limits) + nodes * _NODE_BYTES


def mixed_buffer_bytes(model: Dimensions, limits: Limits, itemsize: int) -> int:
    """device.mixed's at most, of the largest bucket: its scratch; tokens, positions and slots in
    eight bytes each, and the last token of each row; page tables and index arrays. Attention, its
    workspace and the table of rotations are the eager steps'."""
    ladder = _token_ladder(model, limits)
    if not ladder:
        return 0
    tokens, rows_max = ladder[-1], limits.rows_max
    row = itemsize * row_elements(**_layer(model))
    ones, prompts = decode_rows(tokens, rows_max), prompt_rows(tokens, rows_max)
    context = limits.table_columns * limits.page_tokens
    # A tile has a token at least; each array begins on a line of its own.
    words = (ones + prompts) * limits.table_columns + _ONE_WORDS * ones + _PROMPT_WORDS * prompts
    words += _TILE_WORDS * (tokens + prompts) + 64
    words += gather_config.scratch_tokens(rows_max, context) // gather_config.ALIGN
    return tokens * (row + 3 * 8) + 8 * rows_max + 4 * words


def mixed_graph_bytes(model: Dimensions, limits: Limits) -> int:
    """The graphs of device.mixed themselves; their captures allocate nothing."""
    nodes = len(_token_ladder(model, limits)) * (_LAYER_NODES * model.layers + 32)
    return nodes * _NODE_BYTES


def _token_ladder(model: Dimensions, limits: Limits) -> tuple[int, ...]:
    return token_buckets(
        layers=model.layers,
        **_layer(model),
        prefill_tokens=limits.prefill_tokens,
        rows_max=limits.rows_max,
    )


def draw_bytes(model: Dimensions, limits: Limits) -> int:
    """ops.kernels.sample's workspace, with a token and a flag for each row."""
    return limits.rows_max * (_DRAW_BYTES * -(-model.vocab_size // _DRAW_TILE) + 9)
