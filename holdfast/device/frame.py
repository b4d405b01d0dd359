"""Frames: what a plan tells the device, packed into one buffer and copied by one copy.

Owns the one buffer in device memory that staging slots (ops.pinned) are copied to; ops.kernels.rows
has the layout. A plan whose deltas are larger than a slot becomes several frames, cut between
deltas and in their order, so memory is bounded whatever a plan brings. Called by device.device_rows
from one thread; it knows no tables and launches no kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.ops.kernels.rows import HEADER, RECORD_WORDS, STEP_ARRAYS
from holdfast.ops.pinned import Ring, Slot
from holdfast.wire.plan import ADMIT, StepPlan

# Room for deltas at least: 16 Ki page writes, so that all but a recovery's plans are one frame.
_DELTA_WORDS = 1 << 16
_ADMIT_WORDS = RECORD_WORDS + 3
_WRITE_WORDS = 4
_NO_ADMITS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Deltas:
    """What one frame holds of a plan: ranges of its clears, admits and page writes."""

    clears: slice
    admits: slice
    writes: slice


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a plan without a common shape lie.

    offsets: int32[n], query tokens of the rows before each. places: int32[n], of each row among the
    last tokens that are looked at: first those that draw, then the others, both in plan order.
    """

    offsets: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, plan: StepPlan) -> Places:
        n = plan.rows.size
        if np.count_nonzero(plan.samples) == n == np.count_nonzero(plan.query_lens == 1):
            order = np.arange(n, dtype=np.int32)  # As nearly every step is; the rest costs 10 us.
            return cls(order, order)
        drawing = plan.samples != 0
        drawn = np.cumsum(drawing)
        waiting = np.cumsum(~drawing)
        places = np.where(drawing, drawn - 1, (drawn[-1] if drawn.size else 0) + waiting - 1)
        return cls(np.cumsum(plan.query_lens) - plan.query_lens, places)


class Frames:
    """The ring and its target. device: int32[words] in device memory, at one address for life."""

    def __init__(
        self, limits: Limits, device: torch.device, *, delta_words: int = _DELTA_WORDS
    ) -> None:
        self._limits = limits
        longest = _ADMIT_WORDS + limits.context_tokens + 2 * limits.bias_entries + limits.stop_ids
        self._room = max(delta_words, longest)
        self._first = HEADER + STEP_ARRAYS * limits.rows_max
        words = self._first + self._room
        self._ring = Ring(device, words)
        self.device = torch.zeros(words, dtype=torch.int32, device=device)
        self._words = words
        self._fronts: dict[int, torch.Tensor] = {}
        # Of the last plan, and the slots that have its arrays.
        self._shape = Places.of(StepPlan(epoch=0, step=0))
        self._laid: set[Slot] = set()

    def upload(self, plan: StepPlan, *, again: bool = False) -> Iterator[Deltas]:
        """Copy the plan, frame by frame; each must be used before the next is asked for.

        The step's own arrays are in every frame, so the last one leaves them there. again: they are
        the last plan's, and a slot that has them is not written them again.
        """
        if not again:
            self._shape, self._laid = Places.of(plan), set()
        for deltas in self._cut(plan):
            slot = self._ring.take()
            if slot not in self._laid:
                self._lay(slot.words, plan, self._shape)
                self._laid.add(slot)
            used = self._write(slot.words, plan, deltas)
            # Of a few sizes, whose views are kept; no kernel reads what lies behind `used`.
            size = min(1 << (used - 1).bit_length(), self._words)
            target = self._fronts.get(size)
            if target is None:
                target = self._fronts[size] = self.device[:size]
            target.copy_(slot.front(size), non_blocking=True)
            slot.copied()
            yield deltas

    def _cut(self, plan: StepPlan) -> list[Deltas]:
        clears, writes = plan.clears.size, plan.page_writes.size
        total, sizes = clears + _WRITE_WORDS * writes, _NO_ADMITS
        if plan.admits.size:
            sizes = _admit_words(plan.admits)
            total += int(sizes.sum())
        if total <= self._room:
            return [Deltas(slice(0, clears), slice(0, plan.admits.size), slice(0, writes))]
        # All deltas in the order in which they apply, each with its words; greedily.
        words = np.concatenate(
            (np.ones(clears, np.int64), sizes, np.full(writes, _WRITE_WORDS, np.int64))
        )
        ends = np.cumsum(words)
        bounds = (0, clears, clears + plan.admits.size, words.size)
        cuts, first = [], 0
        while first < words.size:
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + self._room, side="right"))
            require(last > first, f"a delta of {words[first]} words, {self._room} fit")
            parts = [
                slice(min(max(first, low), high) - low, min(max(last, low), high) - low)
                for low, high in pairwise(bounds)
            ]
            cuts.append(Deltas(*parts))
            first = last
        return cuts

    def _lay(self, words: np.ndarray, plan: StepPlan, shape: Places) -> None:
        """The step's own arrays."""
        rows_max, n = self._limits.rows_max, plan.rows.size
        require(n <= rows_max, f"step {plan.step} has {n} rows, {rows_max} fit")
        step = words[HEADER : self._first].reshape(STEP_ARRAYS, rows_max)
        step[0, :n] = plan.rows
        step[1, :n] = plan.query_lens
        step[2, :n] = plan.samples
        step[3, :n] = shape.offsets
        step[4, :n] = shape.places

    def _write(self, words: np.ndarray, plan: StepPlan, deltas: Deltas) -> int:
        """Fill a slot but for `_lay`'s part; returns the words used."""
        n = plan.rows.size
        clears = plan.clears[deltas.clears]
        admits = plan.admits[deltas.admits]
        writes = plan.page_writes[deltas.writes]
        at = clears_at = self._first
        if clears.size:
            at += clears.size
            words[clears_at:at] = clears
        admits_at = lists_at = at
        if admits.size:
            lists_at += RECORD_WORDS * admits.size
            words[admits_at:lists_at] = admits.view(np.int32)
            at = self._write_lists(words, plan, deltas.admits, lists_at)
        writes_at = at
        if writes.size:
            at += _WRITE_WORDS * writes.size
            words[writes_at:at] = writes.view(np.int32)
        starts = clears_at, admits_at, lists_at, writes_at
        words[:8] = (n, clears.size, admits.size, writes.size, *starts)
        return at

    def _write_lists(self, words: np.ndarray, plan: StepPlan, which: slice, at: int) -> int:
        """The ragged parts of some admits, behind the table of where they begin."""
        admits = plan.admits[which]
        places = words[at : at + 3 * admits.size].reshape(-1, 3)
        at += places.size
        lens = [admits[name].astype(np.int64) for name in ("tokens_len", "bias_len", "stop_len")]
        sizes = np.stack((lens[0], 2 * lens[1], lens[2]), axis=1)
        ends = np.cumsum(sizes).reshape(sizes.shape)
        places[:] = at + ends - sizes
        before = [
            int(plan.admits[name][: which.start].sum())
            for name in ("tokens_len", "bias_len", "stop_len")
        ]
        values = (plan.bias_ids, plan.bias_values.view(np.int32))
        for place, tokens, bias, stops in zip(
            places.tolist(), *map(np.ndarray.tolist, lens), strict=True
        ):
            token_at, bias_at, stop_at = before
            words[place[0] : place[0] + tokens] = plan.admit_tokens[token_at : token_at + tokens]
            for half, source in enumerate(values):
                begin = place[1] + half * bias
                words[begin : begin + bias] = source[bias_at : bias_at + bias]
            words[place[2] : place[2] + stops] = plan.stop_ids[stop_at : stop_at + stops]
            before = [token_at + tokens, bias_at + bias, stop_at + stops]
        return at + int(sizes.sum())


def _admit_words(admits: np.ndarray) -> np.ndarray:
    """int64[a]: words of each admission in a frame, its lists included."""
    lists = admits["tokens_len"].astype(np.int64) + 2 * admits["bias_len"] + admits["stop_len"]
    return lists + _ADMIT_WORDS


assert ADMIT.itemsize == 4 * RECORD_WORDS, ADMIT.itemsize
