"""Graph admission: a captured graph is replayed only inside what it was captured for.

A graph has baked in more than its shape. Its `Envelope` states all of it, and `admit` is the only
way to a replay: a pure, total function of a description of the step, of what holds in the process
now, and of the captured envelopes. It returns the smallest admissible one, or why there is none;
whoever asked then runs the step eagerly, and counts the reason under its name. Graphs of steps with
prompts have room for so many tokens, prompts and gathered positions: `admit_mixed` judges those.

What a window does to a graph: while every query token sees at most `window` tokens, a layer with a
window reads from the first page on (`WITHIN`); once every one of them can see `window` or more, it
reads exactly that many (`BEYOND`). A graph captured in one phase and replayed in the other reads
pages that were dropped, or misses some. A kernel that masks on the device is right in `ANY`.

The home of: replay only inside the captured envelope.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Plain integers: `admit` runs in every step, and a member of an IntEnum costs a microsecond.
WITHIN, BEYOND, ANY = 0, 1, 2

# Buckets lie 8 apart up to here and 64 apart above: padding costs at most a quarter of the rows
# behind the first 32, and 4096 rows need 95 buckets instead of 514.
_FINE_ROWS_MAX = 256


class Refusal(enum.StrEnum):
    """Why a step is not replayed; the values are label values in /metrics and stay as they are.

    In the order in which they are looked for: the reason given is the first condition that no graph
    meets which meets all before it.
    """

    DISABLED = "disabled"
    EMPTY = "empty"  # no rows: a plan of seals alone
    PREFILL = "prefill"
    MIXED_QUERY_LENS = "mixed_query_lens"
    BYTES_MOVED = "bytes_moved"  # copies or seals in the step that may not run beside a replay
    NOT_CAPTURED = "not_captured"  # this query length, attention kind or layout
    TOO_MANY_ROWS = "too_many_rows"
    TOO_MANY_TOKENS = "too_many_tokens"  # of a step with prompts, for the largest graph of those
    TOO_MANY_PROMPTS = "too_many_prompts"  # in one step
    TOO_MANY_GATHERED = "too_many_gathered"  # tokens that a step's prompts see
    POOL_EPOCH = "pool_epoch"
    WEIGHTS_EPOCH = "weights_epoch"
    ADDRESS_MOVED = "address_moved"
    CONTEXT_TOO_LONG = "context_too_long"
    WINDOW_PHASE = "window_phase"


class Footing(NamedTuple):
    """What a graph stands on besides the step's shape. Captured with it; compared with what is so
    now.

    pool_epoch, weights_epoch: which life of the KV pools and of the weights.
    layout, attention: names of the page layout and of the attention kernels.
    addresses: of every buffer that a kernel of the graph was given, in a fixed order.
    """

    pool_epoch: int
    weights_epoch: int
    layout: str
    attention: str
    addresses: tuple[int, ...]


class Envelope(NamedTuple):
    """Where one captured graph may be replayed.

    rows: its bucket, padding included. query_len: query tokens of each row: 1 for decode, 1 + depth
    to verify drafts. context_tokens: tokens that its page tables have room for. phases: WITHIN,
    BEYOND or ANY for each layer group; ANY for a group without a window.
    """

    rows: int
    query_len: int
    context_tokens: int
    phases: tuple[int, ...]
    footing: Footing


class MixedEnvelope(NamedTuple):
    """Where one captured graph of steps with prompts may be replayed.

    tokens: its bucket of query tokens, padding included. prompt_rows: rows of more than one query
    token; rows of one are as many as there are tokens, or as any step has. gathered_tokens:
    positions of the scratch that prompts' K and V are gathered in. context_tokens: as an Envelope
    has it. Its kernels mask windows on the device, so it is right in every phase.
    """

    tokens: int
    prompt_rows: int
    gathered_tokens: int
    context_tokens: int
    footing: Footing


class StepShape(NamedTuple):
    """What admission needs to know of a step.

    query_len: query tokens of every row, drafts included; 0 when they differ.
    prefill: some row computes more than its last known token and drafts behind it.
    moves_bytes: the step has copies or seals that may not run beside a replay.
    seen_min: lower bound of the tokens that any query token can see, its own included: the
    shortest row's length before the step and 1. seen_max: the upper bound: the longest row's length
    before the step and query_len. Bounds, since with drafts in flight lengths are not known.
    """

    rows: int
    query_len: int
    prefill: bool
    moves_bytes: bool
    seen_min: int
    seen_max: int


class MixedShape(NamedTuple):
    """What admission needs to know of a step with prompts; the words are MixedEnvelope's.

    gathered_tokens: 0 where prompts are read from their pages. seen_max: as a StepShape has it.
    """

    tokens: int
    prompt_rows: int
    gathered_tokens: int
    seen_max: int


_NO_ROWS = StepShape(0, 0, False, False, 0, 0)


def shape_of(
    query_lens: np.ndarray,
    lengths_min: np.ndarray,
    lengths_max: np.ndarray,
    drafts: np.ndarray | None = None,
    *,
    moves_bytes: bool = False,
) -> StepShape:
    """Describe a step of n rows.

    query_lens: int[n]. lengths_min, lengths_max: int[n], bounds of each row's length before the
    step. drafts: uint8[n] draft tokens among the query tokens, or None or empty when there are none
    (StepPlan.drafts).
    """
    n = query_lens.size
    if n == 0:
        return _NO_ROWS
    first = int(query_lens[0])
    uniform = np.count_nonzero(query_lens == first) == n
    if drafts is None or drafts.size == 0:
        prefill = not uniform or first != 1
    else:
        prefill = np.count_nonzero(query_lens == drafts + np.int32(1)) != n
    return StepShape(
        rows=n,
        query_len=first if uniform else 0,
        prefill=prefill,
        moves_bytes=moves_bytes,
        seen_min=int(lengths_min.min()) + 1,
        seen_max=int((lengths_max + query_lens).max()),
    )


def in_phase(phase: int, window: int, seen_min: int, seen_max: int) -> bool:
    """Whether query tokens that can see seen_min to seen_max tokens are all in this phase."""
    if phase == WITHIN:
        return seen_max <= window
    if phase == BEYOND:
        return seen_min >= window
    return True


class Graphs:
    """The captured envelopes of one process, and whether they may be used at all.

    windows: tokens that each layer group sees, 0 = all (Limits.windows). Raises ValueError when an
    envelope does not name a phase for each of them.
    """

    def __init__(
        self, envelopes: Iterable[Envelope], windows: tuple[int, ...], *, enabled: bool = True
    ) -> None:
        self.windows = windows
        self.enabled = enabled
        # Smallest first: fewest rows, then the shortest tables, then the narrowest phases.
        self._by_kind: dict[tuple[int, str, str], tuple[list[int], list[Envelope]]] = {}
        for envelope in sorted(envelopes):
            if len(envelope.phases) != len(windows):
                raise ValueError(f"phases {envelope.phases} for windows {windows}")
            kind = (envelope.query_len, envelope.footing.layout, envelope.footing.attention)
            rows, captured = self._by_kind.setdefault(kind, ([], []))
            rows.append(envelope.rows)
            captured.append(envelope)

    def of(self, query_len: int, layout: str, attention: str) -> tuple[list[int], list[Envelope]]:
        """Envelopes of a kind, smallest first, and beside them their rows."""
        return self._by_kind.get((query_len, layout, attention), ([], []))


def admit(step: StepShape, now: Footing, graphs: Graphs) -> Envelope | Refusal:
    """The smallest captured graph that may be replayed for `step`, or the reason why none may."""
    if not graphs.enabled:
        return Refusal.DISABLED
    if step.rows <= 0:
        return Refusal.EMPTY
    if step.prefill:
        return Refusal.PREFILL
    if step.query_len <= 0:
        return Refusal.MIXED_QUERY_LENS
    if step.moves_bytes:
        return Refusal.BYTES_MOVED
    rows, captured = graphs.of(step.query_len, now.layout, now.attention)
    if not captured:
        return Refusal.NOT_CAPTURED
    furthest = _TOO_MANY_ROWS
    for at in range(bisect_left(rows, step.rows), len(rows)):
        met = _conditions_met(captured[at], step, now, graphs.windows)
        if met == _ALL:
            return captured[at]
        furthest = max(furthest, met)
    return _REASONS[furthest]


def admit_mixed(
    step: MixedShape, now: Footing, captured: Sequence[MixedEnvelope]
) -> MixedEnvelope | Refusal:
    """The smallest graph that may be replayed for a step with prompts, or the reason why none may:
    `admit` for steps that it refuses with PREFILL. captured: by rising tokens."""
    if step.tokens <= 0:
        return Refusal.EMPTY
    kind = (now.layout, now.attention)
    captured = [one for one in captured if (one.footing.layout, one.footing.attention) == kind]
    if not captured:
        return Refusal.NOT_CAPTURED
    furthest = 0
    for one in captured:
        met = _room_met(step, one)
        if met == _ROOM:
            met = _ROOM + _footing_met(one.footing, now) - _POOL
            if met == _MIXED_CONTEXT and step.seen_max <= one.context_tokens:
                return one
        furthest = max(furthest, met)
    return _MIXED_REASONS[furthest]


def has_room(step: MixedShape, graph: MixedEnvelope) -> bool:
    """Whether the step fits the graph's buffers, whatever the graph stands on."""
    return _room_met(step, graph) == _ROOM and step.seen_max <= graph.context_tokens


def _room_met(step: MixedShape, graph: MixedEnvelope) -> int:
    """The first of a graph's bounds that the step is beyond, but for the context, or _ROOM."""
    if step.tokens > graph.tokens:
        return 0
    if step.prompt_rows > graph.prompt_rows:
        return 1
    if step.gathered_tokens > graph.gathered_tokens:
        return 2
    return _ROOM


# How far a graph with enough rows gets, and the reason to give when none gets further.
_TOO_MANY_ROWS, _POOL, _WEIGHTS, _ADDRESSES, _CONTEXT, _PHASES, _ALL = range(7)
# As far as a footing can take it.
_FOOTING = _CONTEXT
_REASONS = (
    Refusal.TOO_MANY_ROWS,
    Refusal.POOL_EPOCH,
    Refusal.WEIGHTS_EPOCH,
    Refusal.ADDRESS_MOVED,
    Refusal.CONTEXT_TOO_LONG,
    Refusal.WINDOW_PHASE,
)


# How far a graph of steps with prompts gets: its room, then its footing, then the context.
_ROOM, _MIXED_CONTEXT = 3, 6
_MIXED_REASONS = (
    Refusal.TOO_MANY_TOKENS,
    Refusal.TOO_MANY_PROMPTS,
    Refusal.TOO_MANY_GATHERED,
    Refusal.POOL_EPOCH,
    Refusal.WEIGHTS_EPOCH,
    Refusal.ADDRESS_MOVED,
    Refusal.CONTEXT_TOO_LONG,
)


def _conditions_met(
    graph: Envelope, step: StepShape, now: Footing, windows: tuple[int, ...]
) -> int:
    """The first condition that does not hold, or _ALL."""
    met = _footing_met(graph.footing, now)
    if met != _FOOTING:
        return met
    if step.seen_max > graph.context_tokens:
        return _CONTEXT
    for phase, window in zip(graph.phases, windows, strict=True):
        if window and not in_phase(phase, window, step.seen_min, step.seen_max):
            return _PHASES
    return _ALL


def _footing_met(footing: Footing, now: Footing) -> int:
    """The first condition of a footing that does not hold, or _FOOTING."""
    if footing.pool_epoch != now.pool_epoch:
        return _POOL
    if footing.weights_epoch != now.weights_epoch:
        return _WEIGHTS
    if footing.addresses != now.addresses:
        return _ADDRESSES
    return _FOOTING


def buckets(rows_max: int) -> tuple[int, ...]:
    """Rows of the graphs to capture, rising: 1, 2, 4, 8, 16, 24, ... and `rows_max` always last."""
    ladder = [1, 2, 4, *range(8, _FINE_ROWS_MAX + 1, 8)]
    ladder += range(_FINE_ROWS_MAX + 64, rows_max, 64)
    return (*(rows for rows in ladder if rows < rows_max), rows_max)


def bucket_of(rows: int, ladder: tuple[int, ...]) -> int:
    """The smallest bucket that holds `rows`; the caller knows that the ladder reaches so far."""
    return ladder[bisect_left(ladder, rows)]
