"""StepPlan and StepResult: the whole contract between the brain and a device.

The brain writes a plan, numbered (epoch, step); every rank executes the same bytes and decides
nothing from local state; the result carries back one entry a plan row. Row state lives on the
device (wire.rows) and a plan holds only what changes in it. The order in which a device applies a
plan is fixed:

    1. clears, admits, page writes   row table deltas (wire.rows.apply)
    2. digest                        of the rows the step uses (wire.rows.digest)
    -  copies                        begin now and end whenever they do (wire.copies): no step has
                                     touched or will touch their pages before the acknowledgement
    3. zeros, seals                  pages set to zero; pages checksummed (wire.checksum)
    4. forward                       for plan row i: query tokens rows.tokens[row, length ..
                                     length + query_lens[i]), their KV appended at those positions
    5. advance                       length += query_lens; where samples[i], one token is drawn for
                                     position `length` and stored in tokens[row, length]

Speculation: where drafts[i] = d > 0, the last d of the row's query tokens are the device's own
proposals. It draws a token after each query token from the first that is not a draft on, and keeps
draws as long as the draft before each equals the draw before it: `accepted` drafts, accepted + 1
tokens. The row advances by query_lens - drafts + accepted. What the rejected ones left in the pages
lies beyond the row's length, so it is never sealed and is written over. How long the row is after
the step, the brain knows only from the result; until then it counts with all drafts.

Shapes below: n plan rows, a admits, c clears, w page writes, s seals, z zeros. Arrays are
read-only views of the received frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

import numpy as np

from holdfast.wire.arrays import ArrayLayout, nothing
from holdfast.wire.copies import COPY

Epoch = NewType("Epoch", int)
StepId = NewType("StepId", int)
Row = NewType("Row", int)
PageId = NewType("PageId", int)
Handle = NewType("Handle", int)

TRASH_ROW = Row(0)
TRASH_PAGE = PageId(0)

# --- handles: group << 56 | generation << 24 | page, in a uint64 ---

_PAGE_BITS = 24
_GENERATION_BITS = 32
_PAGE_MASK = np.uint64((1 << _PAGE_BITS) - 1)
_GENERATION_MASK = np.uint64((1 << _GENERATION_BITS) - 1)
# Added to a handle, the same page one generation later.
NEXT_GENERATION = np.uint64(1 << _PAGE_BITS)


def handles_of(group: int, pages: np.ndarray, generations: np.ndarray) -> np.ndarray:
    """uint64[k] handles from a group and int page ids and uint32 generations of shape [k]."""
    return (
        np.uint64(group << (_PAGE_BITS + _GENERATION_BITS))
        | (generations.astype(np.uint64) << np.uint64(_PAGE_BITS))
        | pages.astype(np.uint64)
    )


def handle_pages(handles: np.ndarray) -> np.ndarray:
    """int32[k] page ids of uint64[k] handles."""
    return (handles & _PAGE_MASK).astype(np.int32)


def handle_generations(handles: np.ndarray) -> np.ndarray:
    """uint32[k] generations of uint64[k] handles."""
    return ((handles >> np.uint64(_PAGE_BITS)) & _GENERATION_MASK).astype(np.uint32)


def handle_groups(handles: np.ndarray) -> np.ndarray:
    """int32[k] layer groups of uint64[k] handles."""
    return (handles >> np.uint64(_PAGE_BITS + _GENERATION_BITS)).astype(np.int32)


# --- record types ---

# One row that starts to belong to a request. `length` tokens of it already have their KV in the
# pages written beside (prefix hit); `tokens_len` ids follow in StepPlan.admit_tokens.
ADMIT = np.dtype(
    [
        ("owner", np.int64),  # the request's life stamp; never reused
        ("seed", np.uint64),
        ("row", np.int32),
        ("length", np.int32),
        ("tokens_len", np.int32),
        ("prompt_len", np.int32),  # of the user's prompt; what follows is output (penalties)
        ("temperature", np.float32),  # 0 = greedy
        ("top_p", np.float32),  # 1 = off
        ("min_p", np.float32),  # 0 = off
        ("repetition_penalty", np.float32),  # 1 = off; over prompt and output
        ("presence_penalty", np.float32),  # 0 = off; over output
        ("frequency_penalty", np.float32),  # 0 = off; over output
        ("top_k", np.int32),  # 0 = off
        ("stop_from", np.int32),  # positions below this never draw a stop id (min_tokens)
        ("top_logprobs", np.int32),  # -1 = no logprobs, else alternatives a token
        ("bias_len", np.int32),
        ("stop_len", np.int32),
        ("reserved", np.int32),
    ]
)

# page_table[group, row, column] = page
PAGE_WRITE = np.dtype(
    [("group", np.int32), ("row", np.int32), ("column", np.int32), ("page", np.int32)]
)

_PLAN = ArrayLayout(
    magic=0x4850_0001,
    scalars=("epoch", "step"),
    arrays=(
        ("rows", np.dtype(np.int32)),
        ("query_lens", np.dtype(np.int32)),
        ("samples", np.dtype(np.uint8)),
        ("drafts", np.dtype(np.uint8)),
        ("clears", np.dtype(np.int32)),
        ("admits", ADMIT),
        ("admit_tokens", np.dtype(np.int32)),
        ("bias_ids", np.dtype(np.int32)),
        ("bias_values", np.dtype(np.float32)),
        ("stop_ids", np.dtype(np.int32)),
        ("page_writes", PAGE_WRITE),
        ("seals", np.dtype(np.uint64)),
        ("zeros", np.dtype(np.uint64)),
        ("copies", COPY),
    ),
)


_PLAN_NAMES = [name for name, _ in _PLAN.arrays]

# One empty array of each dtype for all plans and results; none of them is ever written.
_NONE = {
    dtype: nothing(dtype)
    for dtype in (np.int32, np.uint8, np.float32, np.uint64, ADMIT, PAGE_WRITE, COPY)
}


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """What a device executes as step `step` of epoch `epoch`.

    rows: int32[n], distinct, each 1 <= row <= rows_max; execution and result order.
    query_lens: int32[n], each >= 1: tokens computed by the row in this step.
    samples: uint8[n], 1 where the row's last query token yields a drawn token.
    drafts: uint8[n], how many of a sampling row's query tokens are drafts, fewer than query_lens;
        or empty when no row of the step has any.
    clears: int32[c] rows that end: all their state becomes zero (the trash page).
    admits: ADMIT[a]; admit_tokens, bias_ids/bias_values, stop_ids: their ragged parts in order.
    page_writes: PAGE_WRITE[w].
    seals: uint64[s] handles whose tokens were all committed by results <= step - 1.
    zeros: uint64[z] handles whose bytes are set to zero before the pages may be free.
    copies: COPY[k], acknowledged in frames of their own.
    """

    epoch: int
    step: int
    rows: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    query_lens: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    samples: np.ndarray = field(default_factory=lambda: _NONE[np.uint8])
    drafts: np.ndarray = field(default_factory=lambda: _NONE[np.uint8])
    clears: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    admits: np.ndarray = field(default_factory=lambda: _NONE[ADMIT])
    admit_tokens: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    bias_ids: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    bias_values: np.ndarray = field(default_factory=lambda: _NONE[np.float32])
    stop_ids: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    page_writes: np.ndarray = field(default_factory=lambda: _NONE[PAGE_WRITE])
    seals: np.ndarray = field(default_factory=lambda: _NONE[np.uint64])
    zeros: np.ndarray = field(default_factory=lambda: _NONE[np.uint64])
    copies: np.ndarray = field(default_factory=lambda: _NONE[COPY])

    @property
    def slots(self) -> int:
        """Tokens that the result has room for: one a row, and one more a draft."""
        return self.rows.size + (int(self.drafts.sum()) if self.drafts.size else 0)

    @property
    def known_lens(self) -> np.ndarray:
        """int32[n]: query tokens of each row that are no drafts."""
        return self.query_lens - self.drafts if self.drafts.size else self.query_lens

    def encode(self) -> bytes:
        arrays = [getattr(self, name) for name in _PLAN_NAMES]
        return _PLAN.encode((self.epoch, self.step), arrays)

    @classmethod
    def decode(cls, frame: bytes | memoryview) -> StepPlan:
        """Raises LinkError on a frame that is no plan."""
        (epoch, step), arrays = _PLAN.decode(frame)
        return cls(epoch=epoch, step=step, **dict(zip(_PLAN_NAMES, arrays, strict=True)))


# StepResult.faults
ROW_OK = 0
ROW_NOT_FINITE = 1

_RESULT = ArrayLayout(
    magic=0x4852_0001,
    scalars=("epoch", "step", "digest", "device_ns", "top_k"),
    arrays=(
        ("tokens", np.dtype(np.int32)),
        ("faults", np.dtype(np.uint8)),
        ("accepted", np.dtype(np.uint8)),
        ("seal_sums", np.dtype(np.uint64)),
        ("logprobs", np.dtype(np.float32)),
        ("top_ids", np.dtype(np.int32)),
        ("top_logprobs", np.dtype(np.float32)),
    ),
)
_RESULT_NAMES = [name for name, _ in _RESULT.arrays]


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a device says of step `step` of epoch `epoch`.

    digest: 64-bit digest of the rows that the step used (wire.rows.digest).
    device_ns: time the step took on the device.
    tokens: int32[plan.slots], for each plan row 1 + drafts slots: the drawn tokens where
        plan.samples, 0 in all other slots.
    faults: uint8[n], ROW_OK or ROW_NOT_FINITE: a NaN or infinite logit, or for a row that does not
        sample such a value in its last token's hidden state; its slots are then 0, accepted too.
    accepted: uint8[n], drafts that were right, or empty when the plan has none. A sampling row has
        1 + accepted tokens in its slots.
    seal_sums: uint64[s], checksums of plan.seals in order (wire.checksum).
    logprobs: float32[plan.slots] of the drawn tokens under the raw distribution (before bias,
        penalties and temperature), or empty when no row of the plan asked.
    top_k: K, the largest `top_logprobs` of the plan's rows (0 when none asked).
    top_ids, top_logprobs: int32[slots * K], float32[slots * K], most likely first, row-major.
    """

    epoch: int
    step: int
    digest: int
    device_ns: int = 0
    top_k: int = 0
    tokens: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    faults: np.ndarray = field(default_factory=lambda: _NONE[np.uint8])
    accepted: np.ndarray = field(default_factory=lambda: _NONE[np.uint8])
    seal_sums: np.ndarray = field(default_factory=lambda: _NONE[np.uint64])
    logprobs: np.ndarray = field(default_factory=lambda: _NONE[np.float32])
    top_ids: np.ndarray = field(default_factory=lambda: _NONE[np.int32])
    top_logprobs: np.ndarray = field(default_factory=lambda: _NONE[np.float32])

    def encode(self) -> bytes:
        arrays = [getattr(self, name) for name in _RESULT_NAMES]
        # The digest is unsigned; scalars travel as int64.
        signed = self.digest - (1 << 64) if self.digest >= 1 << 63 else self.digest
        return _RESULT.encode((self.epoch, self.step, signed, self.device_ns, self.top_k), arrays)

    @classmethod
    def decode(cls, frame: bytes | memoryview) -> StepResult:
        """Raises LinkError on a frame that is no result."""
        (epoch, step, digest, device_ns, top_k), arrays = _RESULT.decode(frame)
        return cls(
            epoch=epoch,
            step=step,
            digest=digest % (1 << 64),
            device_ns=device_ns,
            top_k=top_k,
            **dict(zip(_RESULT_NAMES, arrays, strict=True)),
        )
