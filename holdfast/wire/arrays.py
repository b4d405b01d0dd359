"""One frame of named numpy arrays: how plans, results and token batches are laid out as bytes.

    header   magic u32 | count u32 | scalars i64[S] | lengths u32[count] | padding to 8
    body     each array's bytes, each padded to 8

A layout is a fixed list of (name, dtype) known to both ends, so no names travel. Decoding copies
nothing: the arrays are read-only views of the frame. Knows nothing of sockets or of meanings.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.errors import LinkError

_HEAD = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """`magic` tells layouts apart; `scalars` names the int64 scalars, `arrays` the 1-d arrays."""

    magic: int
    scalars: tuple[str, ...]
    arrays: tuple[tuple[str, np.dtype], ...]

    @property
    def body_at(self) -> int:
        return _pad8(_HEAD.size + 8 * len(self.scalars) + 4 * len(self.arrays))

    def encode(self, scalars: Sequence[int], arrays: Sequence[np.ndarray]) -> bytes:
        """Pack `arrays` (one-dimensional, of the layout's dtypes, in its order) into one frame."""
        parts = [_HEAD.pack(self.magic, len(arrays))]
        parts.append(struct.pack(f"<{len(scalars)}q", *scalars))
        parts.append(struct.pack(f"<{len(arrays)}I", *[array.size for array in arrays]))
        size = sum(map(len, parts))
        parts.append(b"\0" * (_pad8(size) - size))
        for (name, dtype), array in zip(self.arrays, arrays, strict=True):
            assert array.dtype == dtype, f"{name}: {array.dtype}, not {dtype}"
            if array.size == 0:
                continue
            data = array.tobytes()
            parts.append(data)
            if len(data) & 7:
                parts.append(b"\0" * (8 - (len(data) & 7)))
        return b"".join(parts)

    def decode(self, frame: bytes | memoryview) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """Unpack a frame into its scalars and read-only arrays.

        Raises LinkError when the frame is not of this layout or its lengths do not add up.
        """
        if len(frame) < self.body_at:
            raise LinkError(f"frame of {len(frame)} bytes is shorter than its header")
        magic, count = _HEAD.unpack_from(frame, 0)
        if magic != self.magic or count != len(self.arrays):
            raise LinkError(f"frame is not of layout {self.magic:#x}: {magic:#x}, {count} arrays")
        scalars = struct.unpack_from(f"<{len(self.scalars)}q", frame, _HEAD.size)
        at = _HEAD.size + 8 * len(self.scalars)
        lengths = struct.unpack_from(f"<{count}I", frame, at)
        at = self.body_at
        arrays = []
        for (name, dtype), length in zip(self.arrays, lengths, strict=True):
            if at + length * dtype.itemsize > len(frame):
                raise LinkError(f"frame ends inside array {name}")
            arrays.append(np.frombuffer(frame, dtype, length, at))
            at += _pad8(length * dtype.itemsize)
        if at != len(frame):
            raise LinkError(f"frame has {len(frame) - at} bytes after its last array")
        return scalars, arrays


def _pad8(size: int) -> int:
    return (size + 7) & ~7
