"""MixedArrays: how a step with prompts lies in attention's grids, in buffers of graphs.

Owns the index arrays of TritonAttention for steps of any mix of rows, static, and the pinned slots
they come from: the host lays a step out in numpy and one copy brings all of it, in the order of the
stream, so what the step before still reads is never written under it. A bucket of tokens has a
fixed room (ops.mixed_config); what a step leaves of it is empty, and a kernel's program that finds
an empty entry leaves at once:

    rows of one token        length 0
    tiles of prompts         no token
    positions to gather      behind `used`

Where prompts are gathered all of them are, however short: a row is read once either way, and two
kernels would be two grids of empty programs. Page tables come from row state, by who stages the
step. Imports triton (through the kernels that it cuts tiles for); called by device.mixed_kernels
from one thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch

from holdfast.errors import require
from holdfast.ops.kernels.gather_config import ALIGN
from holdfast.ops.kernels.gather_kv import PLACE_FIELDS, place_rows, positions_of
from holdfast.ops.kernels.prefill_attention import TILE_FIELDS, tiles_of
from holdfast.ops.mixed_config import decode_rows, prompt_rows
from holdfast.ops.pinned import Ring

# int32 of a 16-byte line: kernels are compiled for aligned pointers.
_LINE_WORDS = 4
# No row of row state.
NO_ROW = -1


@dataclass(frozen=True, slots=True)
class PromptCut:
    """How a backend computes prompts. tile_tokens: query tokens of a tile; gathered_tokens:
    positions of the scratch that K and V are gathered in, 0 where they are read from pages."""

    tile_tokens: int
    gathered_tokens: int


@dataclass(frozen=True, slots=True)
class MixedIndex:
    """The arrays of one bucket, int32, device: d rows of one token, then p of more.

    rows: [d + p], which row of row state, NO_ROW for none; seen: [d + p], tokens in its pages with
    the step's own, 0 for none; first_tokens: [d]; tiles: [4, T] of cut_tiles, rows counted from the
    first of more than one token where they are gathered and from the first of all elsewhere;
    places: [3, p], owners: [B], used: [1], of place_rows, empty where nothing is gathered.
    """

    rows: torch.Tensor
    seen: torch.Tensor
    first_tokens: torch.Tensor
    tiles: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    used: torch.Tensor


class _Span(NamedTuple):
    """Words begin .. stop of a bucket's buffer; the next array begins at `end`, on a line."""

    name: str
    begin: int
    stop: int
    end: int
    shape: tuple[int, ...]


class MixedArrays:
    """Of all buckets of one engine, which share their memory: a step has one at a time."""

    def __init__(
        self, device: torch.device, cut: PromptCut, *, rows_max: int, tokens_max: int
    ) -> None:
        """tokens_max: of the largest bucket."""
        self.cut = cut
        self._rows_max = rows_max
        self._spans: dict[int, tuple[_Span, ...]] = {}
        words = self._spans_of(tokens_max)[-1].end
        self._buffer = torch.zeros(words, dtype=torch.int32, device=device)
        self._ring = Ring(device, words)
        self._index: dict[int, MixedIndex] = {}

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph has of this object: a part of its address manifest."""
        return (self._buffer.data_ptr(),)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def gathered_tokens(self, query_lens: np.ndarray, starts: np.ndarray) -> int:
        """Positions of the scratch that a step takes of its int32[n] rows."""
        prompts = query_lens > 1
        return positions_of((starts + query_lens)[prompts]) if self.cut.gathered_tokens else 0

    def index(self, tokens: int) -> MixedIndex:
        """The static arrays of a bucket."""
        found = self._index.get(tokens)
        if found is None:
            spans = self._spans_of(tokens)
            views = (self._buffer[at.begin : at.stop].view(at.shape) for at in spans)
            found = self._index[tokens] = MixedIndex(*views)
        return found

    def put(self, tokens: int, rows: np.ndarray, lens: np.ndarray, starts: np.ndarray) -> None:
        """Lay a step out in a bucket that has room for it; kernels launched from here on, on the
        current stream, see it. No row: all is empty.

        rows: int32[n] of row state; lens, starts: int32[n], query tokens and tokens before them.
        Raises InvariantError when there is no room.
        """
        spans = self._spans_of(tokens)
        words = spans[-1].end
        slot = self._ring.take(words)
        # Empty, before the step is filled in.
        slot.words[:words] = 0
        host = {at.name: slot.words[at.begin : at.stop].reshape(at.shape) for at in spans}
        self._fill(host, rows, lens, starts)
        self._buffer[:words].copy_(slot.tensor[:words], non_blocking=True)
        slot.copied()

    def _fill(
        self,
        to: dict[str, np.ndarray],
        rows: np.ndarray,
        lens: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        to["rows"][:] = NO_ROW
        if rows.size == 0:
            return
        decode, prompts = np.flatnonzero(lens == 1), np.flatnonzero(lens != 1)
        room, held = to["first_tokens"].size, to["rows"].size - to["first_tokens"].size
        require(
            decode.size <= room and prompts.size <= held,
            f"{decode.size} rows of one token and {prompts.size} prompts in {room} and {held}",
        )
        ends, first = starts + lens, np.cumsum(lens, dtype=np.int64) - lens
        for which, begin in ((decode, 0), (prompts, room)):
            to["rows"][begin : begin + which.size] = rows[which]
            to["seen"][begin : begin + which.size] = ends[which]
        to["first_tokens"][: decode.size] = first[decode]
        tiles = tiles_of(lens, starts, prompts, self.cut.tile_tokens)
        if not self.cut.gathered_tokens:
            tiles[0] += room
        require(tiles.shape[1] <= to["tiles"].shape[1], f"{tiles.shape[1]} tiles")
        to["tiles"][:, : tiles.shape[1]] = tiles
        if self.cut.gathered_tokens and prompts.size:
            places, owners, used = place_rows(ends[prompts], starts[prompts])
            require(owners.size <= to["owners"].size, f"{owners.size} pieces of the scratch")
            to["places"][:, : prompts.size] = places
            to["owners"][: owners.size] = owners
            to["used"][:] = used

    def _spans_of(self, tokens: int) -> tuple[_Span, ...]:
        """Where the fields of MixedIndex lie in a bucket, in their order."""
        found = self._spans.get(tokens)
        if found is not None:
            return found
        ones, prompts = decode_rows(tokens, self._rows_max), prompt_rows(tokens, self._rows_max)
        # Whole tiles are as many as the tokens make, and each prompt has one more at most.
        tiles = tokens // self.cut.tile_tokens + prompts
        gathers = self.cut.gathered_tokens > 0
        shapes: dict[str, tuple[int, ...]] = {
            "rows": (ones + prompts,),
            "seen": (ones + prompts,),
            "first_tokens": (ones,),
            "tiles": (TILE_FIELDS, tiles),
            "places": (PLACE_FIELDS, prompts if gathers else 0),
            "owners": (self.cut.gathered_tokens // ALIGN,),
            "used": (int(gathers),),
        }
        spans, begin = [], 0
        for field in fields(MixedIndex):
            shape = shapes[field.name]
            stop = begin + math.prod(shape)
            end = -(-stop // _LINE_WORDS) * _LINE_WORDS
            spans.append(_Span(field.name, begin, stop, end, shape))
            begin = end
        self._spans[tokens] = tuple(spans)
        return self._spans[tokens]
