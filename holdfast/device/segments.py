"""Segments: steps with prompts, computed in graphs that are broken at attention.

Between two attentions a step computes norms and products of its token rows, and nothing there
knows more of the step than how many rows there are (model.decoder `segment`). So that is captured,
once for each bucket of tokens (ops.segment_config) and boundary of layers:

    segment 0 -> attention of layer 0 -> segment 1 -> .. -> attention of layer L - 1 -> segment L

Attention, with the rotation and the append before it, is launched eagerly, on the step's own t
tokens, lengths and tables: it takes what is in the static `qkv` and leaves what the next segment
reads. Rotation and append stay outside since they are of t tokens, as the attention kernels behind
them are: no position and no slot of padding has to be made up, and padding stores nothing.

Rows t .. of a bucket are padding: token 0 at the front, then whatever `attended` holds there, which
is what a step before left. That is safe, also where it is not finite, since everything in a segment
works row by row: nothing of a padded row reaches a row of the step, or the pool, or a result.

`admit_tokens` of wire.envelope decides. What is not admitted and fits a bucket runs the very same
functions eagerly on the same padded rows, so it computes the same bits; a step of more tokens than
any bucket is the runner's. The manifest is every buffer that a segment's kernels are given. Called
by device.graphs from one thread, one step at a time. Knows no plans and no results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from holdfast.device.batch import StepBatch
from holdfast.device.capture import Capture, Work
from holdfast.errors import require
from holdfast.model.decoder import Stream
from holdfast.model.layer_ops import Step
from holdfast.ops.attention import AttentionBatch
from holdfast.wire.envelope import (
    Footing,
    Refusal,
    TokenEnvelope,
    admit_tokens,
    bucket_of,
)

LAYOUT = "page-major"


class SegmentDecoder(Protocol):
    """What segments need of model.decoder.Decoder, one `beside` the eager steps'.

    segments: how many a step has. addresses: of the buffers of its ops, which are as large as they
    get after the largest bucket.
    """

    addresses: tuple[int, ...]
    segments: int

    def stream(self, tokens: torch.Tensor, rows: int) -> Stream: ...
    def segment(self, index: int, stream: Stream) -> None: ...
    def begin(
        self, positions: torch.Tensor, attention: AttentionBatch, pool: torch.Tensor, rows: int
    ) -> Step: ...
    def attend(self, index: int, stream: Stream, step: Step, pool: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class _Captured:
    """The segments of one bucket, in order, and the stream that they have baked in."""

    stream: Stream
    segments: tuple[Work, ...]


class Segments:
    """The token buckets of one process, the largest last in `ladder`."""

    def __init__(
        self,
        decoder: SegmentDecoder,
        ladder: Sequence[int],
        pool: torch.Tensor,
        weights: torch.Tensor,
        *,
        capture: Capture,
    ) -> None:
        """ladder: tokens of the buckets, rising, one at least. pool, weights: the memory that the
        decoder reads."""
        require(len(ladder) > 0, "segments of no bucket")
        self.ladder = tuple(ladder)
        self._decoder = decoder
        self._pool = pool
        self._weights = weights
        self._capture = capture
        self._tokens = torch.zeros(self.ladder[-1], dtype=torch.int64, device=pool.device)
        self._captured: dict[int, _Captured] = {}
        self._envelopes: list[TokenEnvelope] = []

    @property
    def captures(self) -> int:
        """Graphs of all buckets."""
        return len(self.ladder) * self._decoder.segments

    @property
    def footing(self) -> Footing:
        """What holds now; epochs as device.graphs has them. The pool and what attention alone is
        given are no part of it, but for the workspaces among the addresses of the decoder."""
        addresses = (
            self._weights.data_ptr(),
            self._tokens.data_ptr(),
            # A rerun takes its scratch anew each time; a graph has it baked in.
            *(self._decoder.addresses if self._capture.bakes else ()),
        )
        return Footing(1, 1, LAYOUT, "between", addresses)

    @torch.inference_mode()
    def capture(self, progress: Callable[[int], None], rest: Callable[[], None]) -> None:
        """Capture every bucket, the largest first. progress(done) of captures; rest: called after
        each bucket. Touches no page."""
        done = 0
        for tokens in reversed(self.ladder):
            self._captured[tokens] = self._capture_bucket(tokens)
            done += self._decoder.segments
            rest()
            progress(done)
        footing = self.footing
        self._envelopes = [TokenEnvelope(tokens, footing) for tokens in self.ladder]

    def _capture_bucket(self, tokens: int) -> _Captured:
        decoder = self._decoder
        stream = self._stream(tokens)
        # Memory of nobody's, of which the first steps read what lies behind their tokens.
        stream.attended.zero_()
        last, found, places = decoder.segments - 1, [], set()
        for index in range(decoder.segments):
            # Segments 1 .. L - 1 take the same kernels: one of them is computed, none of the rest.
            rehearsal = None if index in (0, 1, last) else _rehearsed
            found.append(self._capture.capture(self._work(index, stream), rehearsal))
            if stream.qkv is not None:
                places.add(stream.qkv.data_ptr())
        require(
            not self._capture.bakes or len(places) == 1,
            f"segments leave q, k and v in {len(places)} places, and attention reads one",
        )
        return _Captured(stream, tuple(found))

    def holds(self, tokens: int) -> bool:
        """Whether a bucket has room for a step of so many query tokens."""
        return tokens <= self.ladder[-1]

    def admit(self, tokens: int) -> TokenEnvelope | Refusal:
        """For a step of so many query tokens, now."""
        return admit_tokens(tokens, self.footing, self._envelopes)

    @torch.inference_mode()
    def run(self, batch: StepBatch, found: TokenEnvelope | Refusal) -> torch.Tensor:
        """Hidden states [>= t, hidden] of a step's t tokens, which some bucket holds, and its K and
        V in the pool; found: what `admit` said of it. Valid until the next step."""
        count = batch.tokens.numel()
        replay = isinstance(found, TokenEnvelope)
        rows = found.tokens if replay else bucket_of(count, self.ladder)
        self._tokens[:count].copy_(batch.tokens)
        self._tokens[count:rows].zero_()
        captured = self._captured[rows] if replay else self._eager(rows)
        decoder, stream = self._decoder, captured.stream
        step = decoder.begin(batch.positions, batch.attention, self._pool, rows)
        *before, last = captured.segments
        for index, segment in enumerate(before):
            segment()
            decoder.attend(index, stream, step, self._pool)
        last()
        return stream.hidden

    def _eager(self, rows: int) -> _Captured:
        """The functions themselves in a bucket's place, over what the buffers are now."""
        stream = self._stream(rows)
        indices = range(self._decoder.segments)
        return _Captured(stream, tuple(self._work(index, stream) for index in indices))

    def _work(self, index: int, stream: Stream) -> Work:
        return functools.partial(self._decoder.segment, index, stream)

    def _stream(self, rows: int) -> Stream:
        return self._decoder.stream(self._tokens[:rows], rows)


def _rehearsed() -> None:
    """Stands for a segment whose kernels another one has launched."""
