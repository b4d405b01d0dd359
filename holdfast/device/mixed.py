"""MixedGraphs: steps with prompts, each computed by the replay of one graph.

Owns a capture for each bucket of query tokens (ops.mixed_config): stage the step in static buffers
-> forward, attention included -> hidden states. What is new in each step, its lengths, tables and
tiles, lies in static buffers as well, as many as the bucket has room for; a kernel's program that
finds nothing there ends (ops.mixed_arrays). So the host works a step out in numpy, has that copied,
and launches once.

`admit_mixed` of wire.envelope decides. What is not admitted and has room in a bucket runs the very
same function eagerly in it, so it computes the same bits; a step that no bucket has room for is the
runner's. The manifest is every buffer that a kernel of the graph is given. Padding is token 0 that
is stored nowhere, and behind each attention whatever lay there, finite or not: all but attention
works row by row, and attention reads no padding, so nothing of it reaches a row of the step, a page
or a result.

Called by device.graphs from one thread, one step at a time, on one stream: buffers are written for
a step when the step before is over there. Knows no results.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.batch import Rows, StepEnds
from holdfast.device.capture import Capture, Work, require_on_device
from holdfast.errors import require
from holdfast.model.decoder import Stream
from holdfast.model.layer_ops import Step
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.mixed_config import prompt_rows
from holdfast.wire.envelope import (
    Footing,
    MixedEnvelope,
    MixedShape,
    Refusal,
    admit_mixed,
    has_room,
)
from holdfast.wire.plan import StepPlan

LAYOUT = "page-major"


class MixedInputs(NamedTuple):
    """A staged step, N = its bucket. tokens: int64[N]; positions: int64[t], t <= N; attention: of t
    tokens, as model.decoder takes it."""

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: Any


class MixedLayout(Protocol):
    """How steps lie in static buffers.

    name: of the attention that reads them, a part of the footing. on_device: `stage` asks the host
    nothing of the step, so it may be captured. addresses: of all buffers. gathered_tokens: as
    MixedEnvelope has it.
    """

    name: str
    on_device: bool

    @property
    def addresses(self) -> tuple[int, ...]: ...
    @property
    def gathered_tokens(self) -> int: ...
    def shape_of(self, plan: StepPlan) -> MixedShape:
        """Of a plan that was applied, with a row at least."""
        ...

    def prepare(self, plan: StepPlan | None, tokens: int) -> StepEnds | None:
        """What the host does before `stage` in that bucket; where the rows end, once it was
        computed. None: a step of no row, whose K and V touch the trash page at most."""
        ...

    def stage(self, tokens: int) -> MixedInputs:
        """Fill the bucket on the device."""
        ...


class MixedDecoder(Protocol):
    """What these graphs need of model.decoder.Decoder, one `beside` the eager steps'. addresses: of
    the buffers of its ops, attention's included, as large as they get after the largest bucket.
    embed: [vocab, hidden]."""

    addresses: tuple[int, ...]
    embed: torch.Tensor

    def stream(self, tokens: torch.Tensor, rows: int, hidden: torch.Tensor) -> Stream: ...
    def begin(
        self, positions: torch.Tensor, attention: Any, pool: torch.Tensor, rows: int
    ) -> Step: ...
    def compute(self, stream: Stream, step: Step, pool: torch.Tensor) -> None: ...


class HostMixed:
    """A MixedLayout planned on the host by Rows' own `stage`: for a `Rerun` alone."""

    name = "reference"
    on_device = False
    gathered_tokens = 0

    def __init__(self, rows: Rows, limits: Limits, device: torch.device, tokens_max: int) -> None:
        self._rows = rows
        self._limits = limits
        self._device = device
        self._tokens = torch.zeros(tokens_max, dtype=torch.int64, device=device)
        self._positions = torch.zeros(0, dtype=torch.int64, device=device)
        self._attention: AttentionBatch | None = None

    @property
    def addresses(self) -> tuple[int, ...]:
        return (self._tokens.data_ptr(),)

    def shape_of(self, plan: StepPlan) -> MixedShape:
        lens = plan.query_lens
        return MixedShape(
            tokens=int(lens.sum()),
            prompt_rows=int(np.count_nonzero(lens > 1)),
            gathered_tokens=0,
            seen_max=int((self._rows.table.length[plan.rows] + lens).max()),
        )

    def prepare(self, plan: StepPlan | None, tokens: int) -> StepEnds | None:
        front = self._tokens[:tokens].zero_()
        if plan is None:
            self._positions = torch.zeros_like(front)
            self._attention = AttentionBatch.build(
                query_lens=np.ones(tokens, np.int32),
                starts=np.zeros(tokens, np.int32),
                page_table=np.zeros((tokens, 1), np.int32),
                page_tokens=self._limits.page_tokens,
                device=self._device,
            )
            return None
        batch = self._rows.stage(plan)
        front[: batch.tokens.numel()].copy_(batch.tokens)
        self._positions, self._attention = batch.positions, batch.attention
        return batch

    def stage(self, tokens: int) -> MixedInputs:
        return MixedInputs(self._tokens[:tokens], self._positions, self._attention)


class MixedGraphs:
    """The token buckets of one process, the largest last in `ladder`."""

    def __init__(
        self,
        limits: Limits,
        decoder: MixedDecoder,
        ladder: Sequence[int],
        layout: MixedLayout,
        pool: torch.Tensor,
        weights: torch.Tensor,
        *,
        capture: Capture,
        rehearsal: MixedDecoder | None = None,
    ) -> None:
        """ladder: tokens of the buckets, rising, one at least. pool, weights: the memory that the
        decoder reads. rehearsal: runs before a capture in the decoder's place, with its scratch,
        and takes the same kernels; None: the decoder itself."""
        require(len(ladder) > 0, "graphs of no bucket")
        require_on_device(capture, layout.name, on_device=layout.on_device)
        self.ladder = tuple(ladder)
        self._limits = limits
        self._decoder = decoder
        self._rehearsal = decoder if rehearsal is None else rehearsal
        self._layout = layout
        self._pool = pool
        self._weights = weights
        self._capture = capture
        self._hidden = torch.zeros(
            (self.ladder[-1], decoder.embed.shape[1]),
            dtype=decoder.embed.dtype,
            device=pool.device,
        )
        self._bodies: dict[int, Work] = {}
        self._envelopes: list[MixedEnvelope] = []

    @property
    def footing(self) -> Footing:
        """What holds now; epochs as device.graphs has them."""
        addresses = (
            self._pool.data_ptr(),
            self._weights.data_ptr(),
            self._hidden.data_ptr(),
            *self._layout.addresses,
            # A rerun takes its scratch anew each time; a graph has it baked in.
            *(self._decoder.addresses if self._capture.bakes else ()),
        )
        return Footing(1, 1, LAYOUT, self._layout.name, addresses)

    @torch.inference_mode()
    def capture(self, progress: Callable[[int], None], rest: Callable[[], None]) -> None:
        """Capture every bucket, the largest first, on no row. progress(done) of captures; rest:
        called after each. Writes the trash page and no other."""
        for done, tokens in enumerate(reversed(self.ladder), 1):
            self._layout.prepare(None, tokens)
            self._bodies[tokens] = self._capture.capture(
                functools.partial(self._body, tokens, self._decoder),
                functools.partial(self._body, tokens, self._rehearsal),
            )
            rest()
            progress(done)
        footing = self.footing
        self._envelopes = [self._envelope(tokens, footing) for tokens in self.ladder]

    def _envelope(self, tokens: int, footing: Footing) -> MixedEnvelope:
        limits = self._limits
        return MixedEnvelope(
            tokens=tokens,
            prompt_rows=prompt_rows(tokens, limits.rows_max),
            gathered_tokens=self._layout.gathered_tokens,
            context_tokens=limits.table_columns * limits.page_tokens,
            footing=footing,
        )

    def shape_of(self, plan: StepPlan) -> MixedShape:
        """Of a plan that was applied, with a row at least."""
        return self._layout.shape_of(plan)

    def admit(self, shape: MixedShape) -> MixedEnvelope | Refusal:
        """For a step, now."""
        return admit_mixed(shape, self.footing, self._envelopes)

    def holds(self, shape: MixedShape) -> bool:
        """Whether some bucket has room for a step, whether or not it may be replayed."""
        return self._bucket(shape) is not None

    def _bucket(self, shape: MixedShape) -> MixedEnvelope | None:
        """The smallest with room."""
        at = bisect_left(self._envelopes, shape.tokens, key=lambda one: one.tokens)
        return next((one for one in self._envelopes[at:] if has_room(shape, one)), None)

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, shape: MixedShape, found: MixedEnvelope | Refusal
    ) -> tuple[torch.Tensor, StepEnds]:
        """Hidden states [>= t, hidden] of a step of t tokens that some bucket holds, whose K and V
        are in the pool, and where its rows end; found: what `admit` said of it. Valid until the
        next step."""
        replay = isinstance(found, MixedEnvelope)
        bucket = found if replay else self._bucket(shape)
        require(bucket is not None, f"no bucket has room for {shape}")
        tokens = bucket.tokens
        ends = self._layout.prepare(plan, tokens)
        require(ends is not None, "a step of no row")
        self._bodies[tokens]() if replay else self._body(tokens, self._decoder)
        return self._hidden, ends

    def _body(self, tokens: int, decoder: MixedDecoder) -> None:
        ids, positions, attention = self._layout.stage(tokens)
        step = decoder.begin(positions, attention, self._pool, tokens)
        stream = decoder.stream(ids, tokens, self._hidden[:tokens])
        decoder.compute(stream, step, self._pool)
