"""One frame of named numpy arrays: how plans, results and token batches are laid out as bytes.

    header   magic u32 | count u32 | scalars i64[S] | lengths u32[count] | padding to 8
    body     each array's bytes, each padded to 8

A layout is a fixed list of (name, dtype) known to both ends, so no names travel. Decoding copies
nothing: the arrays are read-only views of the frame. Knows nothing of sockets or of meanings.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from holdfast.errors import LinkError

_PADDING = [b"\0" * (-size % 8) for size in range(8)]


def nothing(dtype: np.dtype | type) -> np.ndarray:
    """A read-only array of no elements."""
    empty = np.empty(0, dtype)
    empty.flags.writeable = False
    return empty


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """`magic` tells layouts apart; `scalars` names the int64 scalars, `arrays` the 1-d arrays."""

    magic: int
    scalars: tuple[str, ...]
    arrays: tuple[tuple[str, np.dtype], ...]
    _head: struct.Struct = field(init=False)
    _none: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        head = f"<II{len(self.scalars)}q{len(self.arrays)}I"
        padding = -struct.calcsize(head) % 8
        object.__setattr__(self, "_head", struct.Struct(f"{head}{padding}x"))
        object.__setattr__(self, "_none", tuple(nothing(dtype) for _, dtype in self.arrays))

    @property
    def body_at(self) -> int:
        return self._head.size

    def encode(self, scalars: Sequence[int], arrays: Sequence[np.ndarray]) -> bytes:
        """Pack `arrays` (one-dimensional, of the layout's dtypes, in its order) into one frame."""
        lengths = [len(array) for array in arrays]
        parts = [self._head.pack(self.magic, len(arrays), *scalars, *lengths)]
        for (name, dtype), array, length in zip(self.arrays, arrays, lengths, strict=True):
            if length == 0:
                continue
            assert array.dtype == dtype, f"{name}: {array.dtype}, not {dtype}"
            data = array.tobytes()
            parts.append(data)
            if len(data) & 7:
                parts.append(_PADDING[len(data) & 7])
        return b"".join(parts)

    def decode(self, frame: bytes | memoryview) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """Unpack a frame into its scalars and read-only arrays.

        Raises LinkError when the frame is not of this layout or its lengths do not add up.
        """
        if len(frame) < self.body_at:
            raise LinkError(f"frame of {len(frame)} bytes is shorter than its header")
        magic, count, *rest = self._head.unpack_from(frame, 0)
        if magic != self.magic or count != len(self.arrays):
            raise LinkError(f"frame is not of layout {self.magic:#x}: {magic:#x}, {count} arrays")
        scalars, lengths = tuple(rest[: len(self.scalars)]), rest[len(self.scalars) :]
        at = self.body_at
        arrays = []
        for (name, dtype), length, none in zip(self.arrays, lengths, self._none, strict=True):
            if length == 0:
                arrays.append(none)
                continue
            if at + length * dtype.itemsize > len(frame):
                raise LinkError(f"frame ends inside array {name}")
            arrays.append(np.frombuffer(frame, dtype, length, at))
            at += _pad8(length * dtype.itemsize)
        if at != len(frame):
            raise LinkError(f"frame has {len(frame) - at} bytes after its last array")
        return scalars, arrays


def _pad8(size: int) -> int:
    return (size + 7) & ~7
