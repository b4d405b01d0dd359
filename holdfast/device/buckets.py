"""Static buffers: what a decode step of a bucket is computed from and what it leaves, as tensors.

Owns the tensors, made once at their largest; a bucket is the front part of each, so one set of
addresses serves all (as wire.staging has it, whose device twin this is). A captured graph reads and
writes here and nowhere else but pool, weights and row state. Filled by device.device_rows (kernels)
or device.batch.HostRows (wire.staging itself); it knows neither plans nor decoders.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from holdfast.config import Limits


@dataclass(frozen=True, slots=True)
class Bucket:
    """B rows with q query tokens each, G layer groups, tables of W columns; all on the device.

    rows, lengths, samples: int32[B], row of the table, its tokens before the step, whether it
    draws. seen: int32[B], tokens in its pages with the step's own.
    tokens, positions: int64[B * q] of the query tokens, row after row.
    slots: int64[G, B * q]: page * page_tokens + offset, where each token's K and V go; -1: nowhere.
    page_table: int32[G, B, W].
    seeds: int64[B], bits of the uint64; temperature: float32[B]; draw_positions: int64[B] of the
    token that is drawn. drawn: int32[B], what was drawn; finite: int32[B], 0 where logits were not.
    Padding is the trash row: length 0, seen 0, the trash page, slots -1, temperature 0.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    samples: torch.Tensor
    seen: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor
    seeds: torch.Tensor
    temperature: torch.Tensor
    draw_positions: torch.Tensor
    drawn: torch.Tensor
    finite: torch.Tensor

    @classmethod
    def allocate(
        cls, limits: Limits, query_len: int, device: torch.device, results: torch.Tensor
    ) -> Bucket:
        """The largest bucket, all padding. results: int32[2, rows_max], drawn and finite."""
        rows, groups = limits.rows_max, limits.groups
        tokens = rows * query_len

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        within = torch.arange(query_len, dtype=torch.int64, device=device)
        return cls(
            rows=zeros(rows),
            lengths=zeros(rows),
            samples=zeros(rows),
            seen=zeros(rows),
            tokens=zeros(tokens, dtype=torch.int64),
            positions=within.repeat(rows),
            slots=zeros(groups, tokens, dtype=torch.int64) - 1,
            page_table=zeros(groups, rows, limits.table_columns),
            seeds=zeros(rows, dtype=torch.int64),
            temperature=zeros(rows, dtype=torch.float32),
            draw_positions=zeros(rows, dtype=torch.int64) + query_len,
            drawn=results[0],
            finite=results[1],
        )

    def front(self, rows: int) -> Bucket:
        """The buffers as a graph of so many rows sees them: views, never copies."""
        largest = self.rows.numel()
        each = self.tokens.numel() // largest
        return Bucket(
            rows=self.rows[:rows],
            lengths=self.lengths[:rows],
            samples=self.samples[:rows],
            seen=self.seen[:rows],
            tokens=self.tokens[: rows * each],
            positions=self.positions[: rows * each],
            slots=self.slots[:, : rows * each],
            page_table=self.page_table[:, :rows],
            seeds=self.seeds[:rows],
            temperature=self.temperature[:rows],
            draw_positions=self.draw_positions[:rows],
            drawn=self.drawn[:rows],
            finite=self.finite[:rows],
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of every buffer: a part of wire.envelope.Footing."""
        return tuple(getattr(self, field.name).data_ptr() for field in fields(self))
