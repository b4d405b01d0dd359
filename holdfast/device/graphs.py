"""StepGraphs: decode steps in static buffers, replayed where admission allows and else run eagerly.

Owns, for each bucket of wire.envelope.buckets, two captures over the same buffers:

    body   stage the bucket from row state -> forward -> hidden states
    tail   logits -> draw a token a row -> store it and move the rows (on the device)

A step whose rows ask for no more than a temperature is body and tail; for any other the general
sampler runs behind the body, on the same hidden states. A step that decodes and is not admitted
runs the very same two functions eagerly in the same bucket, so it computes the same bits. A step
with prompts is computed in device.mixed, where there are such graphs and one has room; one of any
other shape is the runner's. `admit` of wire.envelope decides; every refusal is counted by its
reason. The address manifest is every buffer that a kernel was given, compared before each replay.

Called by device.runner from one thread, one step at a time. Knows no links and no results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.batch import Rows, StepEnds
from holdfast.device.buckets import Bucket
from holdfast.device.capture import Capture, Work, require_on_device
from holdfast.device.mixed import LAYOUT, MixedGraphs
from holdfast.errors import require
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.sampler import Sampler, SamplerInputs
from holdfast.wire.envelope import (
    ANY,
    Envelope,
    Footing,
    Graphs,
    MixedEnvelope,
    Refusal,
    StepShape,
    admit,
    bucket_of,
    buckets,
)
from holdfast.wire.plan import StepPlan

# Which sampler ran behind a body; label values in /metrics.
FAST, GENERAL = "fast", "general"


class BucketAttention(Protocol):
    """What makes the attention of a bucket, as model.decoder takes it.

    name: which kernels, a part of the footing. on_device: it reads everything of the step from the
    bucket's buffers, so it may be captured. addresses: of the workspaces of its kernels.
    """

    name: str
    on_device: bool
    addresses: tuple[int, ...]

    def of(self, bucket: Bucket, plan: StepPlan | None) -> Any:
        """plan: the step, for who plans on the host; None: no row at all."""


class Draw(Protocol):
    """Draws for rows that ask for no more than a temperature. addresses: of its workspaces."""

    addresses: tuple[int, ...]

    def __call__(self, logits: torch.Tensor, bucket: Bucket) -> None:
        """Fill bucket.drawn and bucket.finite from logits [B, vocab], of the weights' type, and the
        bucket's seeds, draw_positions and temperature; a row that is not finite has token 0.
        Padding too."""


class GraphDecoder(Protocol):
    """What graphs need of model.decoder.Decoder, one of their own. addresses: of its scratch, which
    is as large as it gets after the largest bucket."""

    addresses: tuple[int, ...]

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Any,
        pool: torch.Tensor,
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class ReferenceAttention:
    """ops.attention's reference, planned on the host from the mirror: for a `Rerun` alone."""

    name = "reference"
    on_device = False
    addresses = ()

    def __init__(self, rows: Rows, limits: Limits, device: torch.device) -> None:
        self._rows = rows
        self._limits = limits
        self._device = device

    def of(self, bucket: Bucket, plan: StepPlan | None) -> AttentionBatch:
        """Padded rows have one token, in the trash page."""
        count, limits = bucket.rows.numel(), self._limits
        starts = np.zeros(count, np.int32)
        pages = np.zeros((count, limits.table_columns), np.int32)
        if plan is not None:
            table, n = self._rows.table, plan.rows.size
            starts[:n] = table.length[plan.rows]
            pages[:n] = table.page_table[0, plan.rows]
        return AttentionBatch.build(
            query_lens=np.ones(count, np.int32),
            starts=starts,
            page_table=pages,
            page_tokens=limits.page_tokens,
            device=self._device,
        )


class ReferenceDraw:
    """ops.sampler, its parameters read from the bucket: for a `Rerun` alone."""

    addresses = ()

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, logits: torch.Tensor, bucket: Bucket) -> None:
        count = bucket.rows.numel()
        off = np.zeros(count, np.float32)
        one = np.ones(count, np.float32)
        inputs = SamplerInputs(
            seeds=bucket.seeds.cpu().numpy().view(np.uint64),
            positions=bucket.draw_positions.cpu().numpy(),
            temperature=bucket.temperature.cpu().numpy(),
            top_p=one,
            min_p=off,
            top_k=np.zeros(count, np.int32),
            repetition=one,
            presence=off,
            frequency=off,
            top_logprobs=np.full(count, -1, np.int32),
        )
        draws = self._sampler.sample(logits.float(), inputs)
        bucket.drawn.copy_(draws.tokens)
        bucket.finite.copy_(draws.finite)


@dataclass(frozen=True, slots=True)
class BucketStep:
    """A step that was computed in a bucket of B rows, its own n in front.

    hidden: [B, hidden]. drawn: its tokens are drawn and its rows moved on the device already.
    """

    hidden: torch.Tensor
    drawn: bool


@dataclass(frozen=True, slots=True)
class BatchStep:
    """A step that was computed as its plan has it, t query tokens; nothing of it is drawn.

    hidden: [>= t, hidden]. replayed: from a captured graph.
    """

    hidden: torch.Tensor
    ends: StepEnds
    replayed: bool


class StepGraphs:
    """replayed: decode steps by the sampler behind the body; eager: steps by the reason of the
    refusal."""

    def __init__(
        self,
        limits: Limits,
        rows: Rows,
        decoder: GraphDecoder,
        pool: torch.Tensor,
        weights: torch.Tensor,
        *,
        capture: Capture,
        attention: BucketAttention,
        draw: Draw | None,
        rehearsal: GraphDecoder | None = None,
        mixed: MixedGraphs | None = None,
    ) -> None:
        """pool, weights: the memory that the decoder reads. draw: None where the general sampler
        draws for all rows. rehearsal: runs before a capture in the decoder's place, with its
        scratch, and takes the same kernels; None: the decoder itself. mixed: over the same
        memory, captured with the buckets; None: steps with prompts are the runner's."""
        require_on_device(capture, attention.name, on_device=attention.on_device)
        self._limits = limits
        self._rows = rows
        self._decoder = decoder
        self._rehearsal = decoder if rehearsal is None else rehearsal
        self._pool = pool
        self._weights = weights
        self._capture = capture
        self._attention = attention
        self._draw = draw
        self._mixed = mixed
        self.ladder = buckets(limits.rows_max)
        self._hidden: torch.Tensor | None = None
        self._plan: StepPlan | None = None
        self._bodies: dict[int, Work] = {}
        self._tails: dict[int, Work] = {}
        self._graphs = Graphs((), limits.windows)
        self.replayed: dict[str, int] = {}
        self.eager: dict[str, int] = {}

    @property
    def footing(self) -> Footing:
        """What holds now. A process maps one pool and one set of weights, so their epochs are 1."""
        addresses = (
            self._pool.data_ptr(),
            self._weights.data_ptr(),
            0 if self._hidden is None else self._hidden.data_ptr(),
            *self._rows.addresses,
            *self._attention.addresses,
            *(() if self._draw is None else self._draw.addresses),
            # A rerun takes its scratch anew each time; a graph has it baked in.
            *(self._decoder.addresses if self._capture.bakes else ()),
        )
        return Footing(1, 1, LAYOUT, self._attention.name, addresses)

    @torch.inference_mode()
    def capture(
        self,
        progress: Callable[[int, int], None] | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Capture every bucket, the largest first, on no row, and then those of steps with
        prompts. progress(done, total) of captures; rest: called after each.

        Writes the trash page and no other.
        """
        self._plan = None
        tails, mixed = self._draw is not None, self._mixed
        total, done = len(self.ladder) * (1 + tails), 0
        if mixed is not None:
            total += len(mixed.ladder)
        for rows in reversed(self.ladder):
            self._bodies[rows] = self._capture.capture(
                functools.partial(self._body, rows),
                functools.partial(self._body, rows, self._rehearsal),
            )
            rest()
            if tails:
                self._tails[rows] = self._capture.capture(functools.partial(self._tail, rows))
                rest()
            done += 1 + tails
            if progress is not None:
                progress(done, total)
        if mixed is not None:
            began = done
            mixed.capture(
                lambda more: None if progress is None else progress(began + more, total), rest
            )
        context = self._limits.table_columns * self._limits.page_tokens
        # Kernels mask windows on the device, so one graph is right in every phase.
        phases = (ANY,) * self._limits.groups
        footing = self.footing
        self._graphs = Graphs(
            [Envelope(rows, 1, context, phases, footing) for rows in self.ladder],
            self._limits.windows,
        )

    def run(self, plan: StepPlan, *, alike: bool) -> BucketStep | BatchStep | None:
        """Compute a step of n >= 1 rows in a bucket of rows, or of tokens; None when its shape is
        no bucket's, and then nothing was computed. alike: Rows.drawn_alike of it.

        The plan was applied; afterwards its rows are to be settled, or drawn for and settled.
        """
        shape = self._rows.shape(plan)
        graph = admit(shape, self.footing, self._graphs)
        if graph is Refusal.PREFILL and self._mixed is not None:
            return self._run_mixed(plan, self._mixed)
        replay = isinstance(graph, Envelope)
        if not replay:
            self._count(self.eager, graph.value)
            if not self._fits(shape):
                return None
        rows = graph.rows if replay else bucket_of(shape.rows, self.ladder)
        self._rows.prepare(plan, rows)
        self._plan = plan
        self._bodies[rows]() if replay else self._body(rows)
        drawn = alike and self._draw is not None
        if drawn:
            self._tails[rows]() if replay else self._tail(rows)
        if replay:
            self._count(self.replayed, FAST if drawn else GENERAL)
        self._plan = None
        require(self._hidden is not None, "a body leaves hidden states")
        return BucketStep(self._hidden[:rows], drawn)

    def _run_mixed(self, plan: StepPlan, mixed: MixedGraphs) -> BatchStep | None:
        shape = mixed.shape_of(plan)
        found = mixed.admit(shape)
        replay = isinstance(found, MixedEnvelope)
        if not replay:
            self._count(self.eager, found.value)
            if not mixed.holds(shape):
                return None
        hidden, ends = mixed.run(plan, shape, found)
        return BatchStep(hidden, ends, replay)

    def _fits(self, shape: StepShape) -> bool:
        room = self._limits.table_columns * self._limits.page_tokens
        return shape.query_len == 1 and not shape.prefill and shape.seen_max <= room

    def _body(self, rows: int, decoder: GraphDecoder | None = None) -> None:
        decoder = self._decoder if decoder is None else decoder
        self._rows.stage_bucket(rows)
        bucket = self._rows.bucket(rows)
        attention = self._attention.of(bucket, self._plan)
        hidden = decoder.forward(bucket.tokens, bucket.positions, attention, self._pool)
        if self._hidden is None:
            # The largest bucket comes first, and leaves room for all.
            self._hidden = torch.empty(
                (self._limits.rows_max, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device
            )
        self._hidden[:rows].copy_(hidden)

    def _tail(self, rows: int) -> None:
        require(self._draw is not None and self._hidden is not None, "no draw behind a body")
        self._draw(self._decoder.raw_logits(self._hidden[:rows]), self._rows.bucket(rows))
        self._rows.advance_bucket()

    @staticmethod
    def _count(counts: dict[str, int], name: str | Refusal) -> None:
        counts[name] = counts.get(name, 0) + 1
