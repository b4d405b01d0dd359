"""The journal: what was promised to clients, in memory that outlives the core.

A buffer (the supervisor's memfd) of a header and two halves. Records are appended to the active
half; when it is full, every live request (and the last ended ones) is written to the other half as
one SUBMIT and one TOKENS record, and the halves change roles. `Limits.journal_bytes` proves that a
half holds all live requests at their largest twice over. A record is

    length u32 | crc32 u32 | kind u32 | life u32 | payload, padded to 8

and counts only when its checksum holds and it lies below the half's committed length, so a core
that dies in the middle of a write leaves nothing half true. The core writes a token here before any
client can see it; what is here is a fact and is never drawn again.

Written by core.brain and core.commit alone; read by recovery, by the copy on disk and by `replay`.
It holds prompts: whoever copies it must protect it like them.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from holdfast.config import Limits
from holdfast.errors import InvariantError, require
from holdfast.wire.messages import Sampling

MAGIC = 0x4846_4A31
_HEADER = struct.Struct("<IIQ")  # magic, active half, half bytes
_HEADER_BYTES = 4096
_HALF_HEAD = struct.Struct("<I4xQ")  # generation of the half, committed bytes
_HALF_HEAD_BYTES = 64
_RECORD = struct.Struct("<IIII")
_TOKENS_HEAD = struct.Struct("<QI4x")  # wall-clock ns, count


class RecordKind(enum.IntEnum):
    SUBMIT = 1
    TOKENS = 2
    END = 3


_KINDS = frozenset(int(kind) for kind in RecordKind)
# Plain integers: reading a member of an IntEnum costs a microsecond in Python 3.11.
_SUBMIT, _TOKENS, _END = (int(kind) for kind in RecordKind)


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """Payload of SUBMIT: one request (one choice) and what it needs to run again.

    prompt: int32 little-endian ids. deadline_ns: wall clock. emitted: tokens already sent when the
    record was written by a compaction; they follow in a TOKENS record of the same half.
    """

    id: int
    api: int
    tenant: str
    priority: int
    prompt: bytes
    max_tokens: int
    seed: int
    deadline_ns: int
    sampling: Sampling
    cached_tokens: int = 0


@dataclass(slots=True)
class JournalledRequest:
    """A request as the journal knows it. `end` is 0 while it runs; tokens int32, in order."""

    admission: Admission
    tokens: list[int]
    end: int = 0


class Journal:
    """The writer. `buffer` is writable and `Journal.size(limits)` bytes long."""

    def __init__(self, buffer: memoryview, limits: Limits) -> None:
        require(len(buffer) >= self.size(limits), f"journal buffer of {len(buffer)} bytes")
        self._buffer = buffer
        self._half_bytes = limits.journal_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self.compactions = 0
        self._generation = 0
        self._half = 0
        self._at = 0
        magic, half, half_bytes = _HEADER.unpack_from(buffer, 0)
        if magic == MAGIC and half_bytes == self._half_bytes:
            self._half = half
            self._generation, self._at = _HALF_HEAD.unpack_from(buffer, self._start(half))
        else:
            self._open_half(0)

    @staticmethod
    def size(limits: Limits) -> int:
        """Bytes of the buffer: the header page and two halves."""
        return _HEADER_BYTES + 2 * (limits.journal_bytes + _HALF_HEAD_BYTES)

    def submit(self, admission: Admission) -> bool:
        """Record an admission; False when the half is full and `compact` must come first."""
        return self._append(_SUBMIT, self._encoder.encode(admission))

    def tokens(self, wall_ns: int, ids: np.ndarray, tokens: np.ndarray) -> bool:
        """Record one step's tokens: uint64[k] request ids and int32[k] tokens."""
        head = _TOKENS_HEAD.pack(wall_ns, ids.size)
        return self._append(_TOKENS, head + ids.tobytes() + tokens.tobytes())

    def end(self, request: int, reason: int, tokens: int) -> bool:
        """Record that a request ended with `tokens` tokens in all."""
        return self._append(_END, struct.pack("<QII", request, reason, tokens))

    def compact(self, kept: Iterable[tuple[Admission, np.ndarray, int]]) -> None:
        """Rewrite requests into the other half: (admission, tokens int32[k] so far, end or 0)."""
        before = (self._half, self._generation, self._at)
        self._open_half(1 - self._half, publish=False)
        for admission, tokens, end in kept:
            ids = np.full(tokens.size, admission.id, np.uint64)
            written = self.submit(admission)
            written = written and (tokens.size == 0 or self.tokens(0, ids, tokens))
            written = written and (end == 0 or self.end(admission.id, end, tokens.size))
            if not written:
                self._half, self._generation, self._at = before
                raise InvariantError(
                    f"live requests do not fit a journal half of {self._half_bytes} bytes"
                )
        _HEADER.pack_into(self._buffer, 0, MAGIC, self._half, self._half_bytes)
        self.compactions += 1

    def _open_half(self, half: int, *, publish: bool = True) -> None:
        self._generation += 1
        self._half = half
        self._at = 0
        _HALF_HEAD.pack_into(self._buffer, self._start(half), self._generation, 0)
        if publish:
            _HEADER.pack_into(self._buffer, 0, MAGIC, half, self._half_bytes)

    def _start(self, half: int) -> int:
        return _HEADER_BYTES + half * (self._half_bytes + _HALF_HEAD_BYTES)

    def _append(self, kind: int, payload: bytes) -> bool:
        size = _RECORD.size + len(payload)
        padded = (size + 7) & ~7
        if self._at + padded > self._half_bytes:
            return False
        start = self._start(self._half)
        at = start + _HALF_HEAD_BYTES + self._at
        crc = zlib.crc32(payload, kind ^ self._generation)
        _RECORD.pack_into(self._buffer, at, len(payload), crc, kind, self._generation)
        self._buffer[at + _RECORD.size : at + size] = payload
        self._at += padded
        # Published last: a reader never looks beyond the committed length.
        _HALF_HEAD.pack_into(self._buffer, start, self._generation, self._at)
        return True


def records_of(
    data: memoryview, generation: int | None = None
) -> Iterator[tuple[RecordKind, memoryview]]:
    """Whole records of one half, or of a copy on disk, up to the first that does not hold.

    A half holds records of its own `generation` only; a copy (None) holds several in turn.
    """
    at = 0
    while at + _RECORD.size <= len(data):
        length, crc, kind, life = _RECORD.unpack_from(data, at)
        payload = data[at + _RECORD.size : at + _RECORD.size + length]
        if len(payload) != length or zlib.crc32(payload, kind ^ life) != crc:
            return
        if generation is not None and life != generation:
            return
        yield RecordKind(kind), payload
        at += (_RECORD.size + length + 7) & ~7


@dataclass(frozen=True, slots=True)
class Damage:
    """The first record of some bytes that does not hold. torn: the bytes end within it."""

    offset: int
    torn: bool
    message: str


def damage_of(data: memoryview) -> Damage | None:
    """Why `records_of` would stop before the end of `data`; None when it does not."""
    at = 0
    while at < len(data):
        left = len(data) - at
        if left < _RECORD.size or not any(data[at:]):
            # Zeros: the file had grown when its machine died, its contents had not.
            return Damage(at, True, f"{left:,} bytes that are no record")
        length, crc, kind, life = _RECORD.unpack_from(data, at)
        if length > left - _RECORD.size:
            message = f"the record says {length:,} bytes, and {left - _RECORD.size:,} follow"
            return Damage(at, True, message)
        payload = data[at + _RECORD.size : at + _RECORD.size + length]
        if zlib.crc32(payload, kind ^ life) != crc:
            return Damage(at, False, "the record's checksum does not hold")
        if kind not in _KINDS:
            return Damage(at, False, f"a record of kind {kind}, which this version does not know")
        at += (_RECORD.size + length + 7) & ~7
    return None


def active_half(buffer: memoryview) -> memoryview:
    """The committed records of a ring. Raises ValueError when the buffer is none."""
    magic, half, half_bytes = _HEADER.unpack_from(buffer, 0)
    start = _HEADER_BYTES + half * (half_bytes + _HALF_HEAD_BYTES)
    if magic != MAGIC or half > 1 or start + _HALF_HEAD_BYTES > len(buffer):
        raise ValueError("no journal ring")
    _, committed = _HALF_HEAD.unpack_from(buffer, start)
    first = start + _HALF_HEAD_BYTES
    return buffer[first : first + committed]


def recover(buffer: memoryview) -> dict[int, JournalledRequest]:
    """Every request the journal knows, in order of admission; ended ones carry their reason."""
    magic, half, half_bytes = _HEADER.unpack_from(buffer, 0)
    if magic != MAGIC:
        return {}
    start = _HEADER_BYTES + half * (half_bytes + _HALF_HEAD_BYTES)
    generation, _ = _HALF_HEAD.unpack_from(buffer, start)
    return replay(records_of(active_half(buffer), generation))


def replay(records: Iterable[tuple[RecordKind, memoryview]]) -> dict[int, JournalledRequest]:
    """Fold records, oldest first, into requests."""
    found: dict[int, JournalledRequest] = {}
    decoder = msgspec.msgpack.Decoder(Admission)
    for kind, payload in records:
        if kind is RecordKind.SUBMIT:
            admission = decoder.decode(payload)
            found[admission.id] = JournalledRequest(admission, [])
        elif kind is RecordKind.TOKENS:
            _, count = _TOKENS_HEAD.unpack_from(payload, 0)
            at = _TOKENS_HEAD.size
            ids = np.frombuffer(payload, np.uint64, count, at)
            tokens = np.frombuffer(payload, np.int32, count, at + 8 * count)
            for request, token in zip(ids.tolist(), tokens.tolist(), strict=True):
                if request in found:
                    found[request].tokens.append(token)
        else:
            request, reason, tokens_len = struct.unpack("<QII", payload)
            if request in found:
                found[request].end = reason
                del found[request].tokens[tokens_len:]
    return found


class JournalTail:
    """Follows a journal that another process writes: raw records appended since the last call."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._generation = 0
        self._at = 0

    def read(self) -> bytes:
        """Bytes of whole records, oldest first; after a compaction, the new half from its start.

        They parse with `records_of`. A copy therefore sees live requests again after each
        compaction, which `replay` folds away. The writer may flip halves twice between two calls;
        what was lost then is in the new half.
        """
        magic, half, half_bytes = _HEADER.unpack_from(self._buffer, 0)
        if magic != MAGIC:
            return b""
        start = _HEADER_BYTES + half * (half_bytes + _HALF_HEAD_BYTES)
        generation, committed = _HALF_HEAD.unpack_from(self._buffer, start)
        if generation != self._generation:
            self._generation, self._at = generation, 0
        first = start + _HALF_HEAD_BYTES
        data = bytes(self._buffer[first + self._at : first + committed])
        if _HALF_HEAD.unpack_from(self._buffer, start)[0] != generation:
            return b""
        self._at = committed
        return data
