"""Copies between the tiers of the KV cache: what is ordered, and what came of it.

    device <--COPY (in a StepPlan, by the worker)--> host <--MOVE (by the mover)--> disk

A record declares what its copy reads and writes: exactly one source and one target. A copy is not
over when its step's result comes. Its acknowledgement comes in a frame of its own, at any time, and
carries the checksum (wire.checksum) of the bytes that arrived in the target, so that whoever
ordered it compares them with what they were when the page was sealed.

Places: a device page by its handle, a host slot and a disk block by their numbers from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from holdfast.errors import LinkError
from holdfast.wire.arrays import ArrayLayout, nothing

# COPY.kind
LOAD = 1  # host slot -> device page
STORE = 2  # device page -> host slot

COPY = np.dtype(
    [("ticket", np.uint64), ("handle", np.uint64), ("kind", np.int32), ("slot", np.int32)]
)

# MOVE.kind
RESET = 1  # acknowledged once every older order, of any core, is over; the first order of a core
SPILL = 2  # host slot -> disk block
FETCH = 3  # disk block -> host slot

MOVE = np.dtype(
    [("ticket", np.uint64), ("kind", np.int32), ("slot", np.int32), ("block", np.int32)]
)

# CopyAcks.status
COPY_OK = 0
COPY_FAILED = 1  # the target's bytes are undefined

_MOVES = ArrayLayout(magic=0x484D_0001, scalars=("life",), arrays=(("moves", MOVE),))
_ACKS = ArrayLayout(
    magic=0x4841_0001,
    scalars=("epoch",),
    arrays=(
        ("tickets", np.dtype(np.uint64)),
        ("status", np.dtype(np.uint8)),
        ("sums", np.dtype(np.uint64)),
    ),
)
_NO_MOVES = nothing(MOVE)


@dataclass(slots=True, kw_only=True)
class MoveOrders:
    """What the mover is to do for core number `life`. moves: MOVE[m], in any order but RESET."""

    life: int
    moves: np.ndarray = field(default_factory=lambda: _NO_MOVES)

    def encode(self) -> bytes:
        return _MOVES.encode((self.life,), (self.moves,))

    @classmethod
    def decode(cls, frame: bytes | memoryview) -> MoveOrders:
        """Raises LinkError on a frame that is no order."""
        (life,), (moves,) = _MOVES.decode(frame)
        return cls(life=life, moves=moves)


@dataclass(slots=True, kw_only=True)
class CopyAcks:
    """Copies that are over: nothing of them reads or writes any more.

    epoch: of the worker that executed COPYs, or the life of the core that ordered MOVEs.
    tickets: uint64[k]; status: uint8[k], COPY_OK or COPY_FAILED; sums: uint64[k], checksums of the
    targets' bytes (0 where there is no target).
    """

    epoch: int
    tickets: np.ndarray
    status: np.ndarray
    sums: np.ndarray

    def encode(self) -> bytes:
        return _ACKS.encode((self.epoch,), (self.tickets, self.status, self.sums))

    @classmethod
    def decode(cls, frame: bytes | memoryview) -> CopyAcks:
        """Raises LinkError on a frame that is no acknowledgement."""
        (epoch,), (tickets, status, sums) = _ACKS.decode(frame)
        if not tickets.size == status.size == sums.size:
            raise LinkError(f"{tickets.size} tickets, {status.size} states, {sums.size} sums")
        return cls(epoch=epoch, tickets=tickets, status=status, sums=sums)
