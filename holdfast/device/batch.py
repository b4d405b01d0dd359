"""StepBatch: what the decoder and the sampler take, made from a plan and the device's row state.

Owns the seam between row state and tensors: `Rows` is what a runner needs of a device's row state,
`HostRows` is the one whose rows lie in host memory (wire.rows.RowTable itself); a CUDA row state
stands behind the same four verbs. Invariants: everything is built in numpy, whole arrays at a time,
and copied once; plan order is kept; a row's entries depend on that row alone. Called by
device.runner after the plan was checked; it must not know the decoder, the pool or the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.checks import check_deltas, check_rows
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.sampler import Pairs, SamplerInputs, seen_pairs
from holdfast.wire.plan import StepPlan
from holdfast.wire.rows import RowTable


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step, t query tokens of n plan rows, k of which draw a token.

    tokens, positions: int64[t], device. attention: see ops.attention.
    drawing: int64[k], host, indices into the plan's rows, rising.
    last_tokens: int64[k], device, index into t of each drawing row's last query token.
    waiting: int64[n - k], host, the other rows; last_waiting: int64[n - k], device, the same of
    them. Whatever is not finite in a chunk is so in its last token too: full attention sees it all.
    sampling: parameters of the k rows. top_count: the largest top_logprobs of the n rows, 0 when
    none asks for alternatives; logprobs_asked: whether any of the n rows asks for logprobs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    drawing: np.ndarray
    last_tokens: torch.Tensor
    waiting: np.ndarray
    last_waiting: torch.Tensor
    sampling: SamplerInputs
    top_count: int
    logprobs_asked: bool


class Rows(Protocol):
    """A device's row state, as a runner uses it: once each a step, in this order."""

    def apply(self, plan: StepPlan, epoch: int, last_step: int) -> None:
        """Check the plan, and apply its deltas. Raises WorkerFault when it is unfit."""

    def digest(self, plan: StepPlan) -> int:
        """Of the rows the step uses, computed from what the device really holds."""

    def stage(self, plan: StepPlan) -> StepBatch:
        """What the step computes; the plan has at least one row."""

    def advance(self, plan: StepPlan, tokens: np.ndarray) -> None:
        """Move past the step: `tokens` int32[n], the drawn ones."""


class HostRows:
    """Row state in host memory."""

    def __init__(self, limits: Limits, device: torch.device | str = "cpu") -> None:
        self.limits = limits
        self.device = torch.device(device)
        self.table = RowTable(limits)

    def apply(self, plan: StepPlan, epoch: int, last_step: int) -> None:
        check_deltas(plan, self.table, epoch, last_step)
        self.table.apply(plan)
        check_rows(plan, self.table)

    def digest(self, plan: StepPlan) -> int:
        return self.table.digest_full(plan)

    def advance(self, plan: StepPlan, tokens: np.ndarray) -> None:
        self.table.advance(plan, tokens)

    def stage(self, plan: StepPlan) -> StepBatch:
        table = self.table
        rows, query_lens = plan.rows, plan.query_lens
        starts = table.length[rows]
        ends = starts + query_lens
        _, positions, tokens = table.inputs(rows, query_lens)
        columns = int(self.limits.pages_for_tokens(int(ends.max())))
        attention = AttentionBatch.build(
            query_lens=query_lens,
            starts=starts,
            # Group 0 is full attention, the only kind there is yet (Limits.groups).
            page_table=table.page_table[0, rows, :columns],
            page_tokens=self.limits.page_tokens,
            device=self.device,
        )
        drawing = np.flatnonzero(plan.samples)
        waiting = np.flatnonzero(plan.samples == 0)
        last = np.cumsum(query_lens) - 1
        top_logprobs = table.records["top_logprobs"][rows]
        most = int(top_logprobs.max())
        return StepBatch(
            tokens=self._staged(tokens),
            positions=self._staged(positions),
            attention=attention,
            drawing=drawing,
            last_tokens=self._staged(last[drawing]),
            waiting=waiting,
            last_waiting=self._staged(last[waiting]),
            sampling=sampler_inputs(table, rows[drawing], ends[drawing]),
            top_count=max(most, 0),
            logprobs_asked=most >= 0,
        )

    def _staged(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device=self.device)


def sampler_inputs(table: RowTable, rows: np.ndarray, positions: np.ndarray) -> SamplerInputs:
    """Sampling parameters of `rows` int32[k], of which each draws the token at its position.

    positions: int32[k]; tokens[row, :position] are known and count for the penalties.
    """
    records = table.records[rows]
    bias, bias_at = _ragged(records["bias_len"])
    stop_len = np.where(positions < records["stop_from"], records["stop_len"], 0)
    stops, stops_at = _ragged(stop_len)
    seen, output_counts = _seen(table, records, rows, positions)
    return SamplerInputs(
        seeds=records["seed"],
        positions=positions.astype(np.int64),
        temperature=records["temperature"],
        top_p=records["top_p"],
        min_p=records["min_p"],
        top_k=records["top_k"],
        repetition=records["repetition_penalty"],
        presence=records["presence_penalty"],
        frequency=records["frequency_penalty"],
        top_logprobs=records["top_logprobs"],
        bias=Pairs(bias, table.bias_ids[rows[bias], bias_at].astype(np.int64)),
        bias_values=table.bias_values[rows[bias], bias_at],
        stops=Pairs(stops, table.stop_ids[rows[stops], stops_at].astype(np.int64)),
        seen=seen,
        output_counts=output_counts,
    )


def _seen(
    table: RowTable, records: np.ndarray, rows: np.ndarray, positions: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """The history that penalties look at: the output's, and for repetition also the prompt's."""
    repeats = records["repetition_penalty"] != 1
    penalised = repeats | (records["presence_penalty"] != 0) | (records["frequency_penalty"] != 0)
    first = np.where(repeats, 0, records["prompt_len"])
    counts = np.where(penalised, np.maximum(positions - first, 0), 0)
    owner, at = _ragged(counts)
    at += first[owner]
    ids = table.tokens[rows[owner], at].astype(np.int64)
    in_output = at >= records["prompt_len"][owner]
    return seen_pairs(owner, ids, in_output, table.limits.vocab_size)


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of counts int[k]: (owner int64[p], index within its owner int64[p]), owners rising."""
    total = int(counts.sum())
    if total == 0:
        empty = np.empty(0, np.int64)
        return empty, empty.copy()
    owner = np.repeat(np.arange(counts.size), counts)
    ends = np.cumsum(counts)
    return owner, np.arange(total) - np.repeat(ends - counts, counts)
