"""DeviceMixed: a step with prompts in static buffers, laid out by kernels from row state.

Owns what a graph of such a step reads of it: query tokens with their positions and slots, page
tables in the order of attention's rows, and attention's index arrays (ops.mixed_arrays). The host
works the arrays out and has them copied; all else the device finds in its rows and the plan's
frame. Stands between device.mixed, which knows buckets, and ops; imports triton. On a CPU it runs
in Triton's interpreter, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.batch import Drawing, StepEnds
from holdfast.device.device_rows import DeviceRows
from holdfast.device.mixed import MixedInputs
from holdfast.errors import require
from holdfast.ops.attention import MixedBatch
from holdfast.ops.attention_triton import TritonAttention
from holdfast.ops.mixed_arrays import MixedArrays
from holdfast.ops.mixed_config import decode_rows, prompt_rows
from holdfast.wire.envelope import MixedShape
from holdfast.wire.plan import StepPlan

_NO_ROWS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class _Statics:
    """Of the largest bucket: tokens, positions, slots int64[N]; lasts int64[rows_max], the last
    query token of each row in the order of its place; page_table: int32[r, W]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lasts: torch.Tensor
    page_table: torch.Tensor

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.positions, self.slots, self.lasts, self.page_table


class DeviceMixed:
    """A device.mixed.MixedLayout over rows of a device and the kernels of one attention."""

    name = "triton"
    on_device = True

    def __init__(
        self,
        rows: DeviceRows,
        attention: TritonAttention,
        limits: Limits,
        pool: torch.Tensor,
        dtype: torch.dtype,
        tokens_max: int,
    ) -> None:
        """dtype: of activations; tokens_max: of the largest bucket. Raises InvariantError where
        there is more than full attention."""
        require(limits.groups == 1, f"{limits.groups} layer groups; graphs know one")
        self._rows = rows
        self._limits = limits
        self._arrays = MixedArrays(
            pool.device,
            attention.prompt_cut(pool, dtype),
            rows_max=limits.rows_max,
            tokens_max=tokens_max,
        )
        tables = decode_rows(tokens_max, limits.rows_max) + prompt_rows(tokens_max, limits.rows_max)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=pool.device)

        self._statics = _Statics(
            tokens=zeros(tokens_max),
            positions=zeros(tokens_max),
            slots=zeros(tokens_max) - 1,
            lasts=zeros(limits.rows_max),
            page_table=zeros(tables, limits.table_columns, dtype=torch.int32),
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        own = (buffer.data_ptr() for buffer in self._statics.all)
        return (*own, *self._arrays.addresses, *self._rows.ragged_addresses)

    @property
    def nbytes(self) -> int:
        """Of its buffers, row state left out."""
        return self._arrays.nbytes + sum(buffer.nbytes for buffer in self._statics.all)

    @property
    def gathered_tokens(self) -> int:
        return self._arrays.cut.gathered_tokens

    def shape_of(self, plan: StepPlan) -> MixedShape:
        lens, starts = plan.query_lens, self._rows.table.length[plan.rows]
        return MixedShape(
            tokens=int(lens.sum()),
            prompt_rows=int(np.count_nonzero(lens > 1)),
            gathered_tokens=self._arrays.gathered_tokens(lens, starts),
            seen_max=int((starts + lens).max()),
        )

    def prepare(self, plan: StepPlan | None, tokens: int) -> StepEnds | None:
        if plan is None:
            self._arrays.put(tokens, _NO_ROWS, _NO_ROWS, _NO_ROWS)
            return None
        self._rows.require_past(plan)
        table = self._rows.table
        self._arrays.put(tokens, plan.rows, plan.query_lens, table.length[plan.rows])
        drawing = Drawing.of(table, plan)
        lasts, count = self._statics.lasts[: plan.rows.size], drawing.rows.size
        return StepEnds(last_tokens=lasts[:count], last_waiting=lasts[count:], drawing=drawing)

    def stage(self, tokens: int) -> MixedInputs:
        static, index = self._statics, self._arrays.index(tokens)
        front = static.tokens[:tokens], static.positions[:tokens], static.slots[:tokens]
        page_table = static.page_table[: index.rows.numel()]
        self._rows.launch_ragged(*front, static.lasts)
        self._rows.launch_mixed(index.rows, index.seen, *front, page_table)
        batch = MixedBatch(
            page_table=page_table,
            slots=front[2],
            page_tokens=self._limits.page_tokens,
            index=index,
        )
        return MixedInputs(front[0], front[1], batch)
