"""Framed, epoch-numbered messages between two processes, and the in-memory twin.

    frame    length u32 | kind u32 | epoch u64 | payload

A `Link` is one end of a stream socketpair that was made before either process did any work, so the
death of the peer is end of file and nothing else. Frames of an older epoch than the link's are
dropped and counted here, in one place; a frame of a newer epoch is a protocol error.

Sends never block for ever: bytes the peer does not take are buffered up to a bound, then
LinkOverflow. Receives never wait longer than their deadline.
"""

from __future__ import annotations

import enum
import select
import socket
import struct
import time
from collections import deque
from typing import Protocol

from holdfast.errors import LinkClosed, LinkError, LinkOverflow, LinkTimeout

_HEAD = struct.Struct("<IIQ")
FRAME_BYTES_MAX = 256 << 20
_READ_BYTES = 1 << 20


class Kind(enum.IntEnum):
    PLAN = 1  # wire.plan.StepPlan
    RESULT = 2  # wire.plan.StepResult
    MESSAGE = 3  # wire.messages, msgpack
    TOKENS = 4  # wire.messages.TokenBatch
    CONTROL = 5  # supervisor <-> child, msgpack
    COPIES = 6  # wire.copies.CopyAcks
    MOVES = 7  # wire.copies.MoveOrders


Frame = tuple[int, bytes]


class LinkLike(Protocol):
    """What the core's loop needs of a link; implemented by Link and MemoryLink."""

    epoch: int
    dropped: int

    def send(self, kind: int, payload: bytes) -> None: ...
    def flush(self) -> bool: ...
    def receive(self, timeout_s: float) -> Frame | None: ...
    def drain(self) -> list[Frame]: ...
    def close(self) -> None: ...


class Link:
    """One end of a stream socket. Not thread-safe: one owner reads, the same owner writes."""

    def __init__(
        self, sock: socket.socket, *, epoch: int = 0, buffer_bytes: int = 64 << 20
    ) -> None:
        self.sock = sock
        self.epoch = epoch
        self.dropped = 0
        self.buffer_bytes = buffer_bytes
        self._in = bytearray()
        self._frames: deque[Frame] = deque()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._closed = False
        sock.setblocking(False)

    @classmethod
    def pair(cls, **options: int) -> tuple[Link, Link]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(left, **options), cls(right, **options)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def unsent_bytes(self) -> int:
        """Bytes accepted by `send` that the peer has not taken: a loop watches for writability."""
        return self._out_bytes

    def send(self, kind: int, payload: bytes) -> None:
        """Send one frame, or buffer what the socket does not take now.

        Raises LinkClosed when the peer is gone and LinkOverflow when the buffer bound is reached.
        """
        if len(payload) > FRAME_BYTES_MAX:
            raise LinkError(f"frame of {len(payload)} bytes is over the bound {FRAME_BYTES_MAX}")
        if self._out_bytes + len(payload) > self.buffer_bytes:
            raise LinkOverflow(f"{self._out_bytes} bytes unread by the peer")
        head = _HEAD.pack(len(payload), kind, self.epoch)
        data = memoryview(head + payload)
        if not self._out:
            data = data[self._send_now(data) :]
        if data:
            self._out.append(data)
            self._out_bytes += len(data)

    def flush(self) -> bool:
        """Send buffered bytes without blocking; True when none are left. Raises LinkClosed."""
        while self._out:
            sent = self._send_now(self._out[0])
            if sent == 0:
                return False
            self._out_bytes -= sent
            if sent == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][sent:]
        return True

    def flush_until(self, timeout_s: float) -> None:
        """Send everything buffered. Raises LinkTimeout when the peer does not take it in time."""
        deadline = time.monotonic() + timeout_s
        while not self.flush():
            left = deadline - time.monotonic()
            if left <= 0 or not _poll(self.sock, select.POLLOUT, left):
                raise LinkTimeout(f"peer took nothing for {timeout_s} s")

    def receive(self, timeout_s: float) -> Frame | None:
        """The next frame (kind, payload) of this epoch, or None when the deadline passes.

        Raises LinkClosed at end of file, LinkError on a malformed or future frame.
        """
        deadline = time.monotonic() + timeout_s
        while not self._frames:
            if self._closed:
                raise LinkClosed("peer closed the link")
            left = max(0.0, deadline - time.monotonic())
            if not _poll(self.sock, select.POLLIN, left):
                return None
            self._read()
        return self._frames.popleft()

    def drain(self) -> list[Frame]:
        """All frames that are there now, without waiting.

        Raises LinkClosed at end of file once every frame before it was returned.
        """
        if not self._closed:
            self._read()
        if not self._frames and self._closed:
            raise LinkClosed("peer closed the link")
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def close(self) -> None:
        self._closed = True
        self.sock.close()

    def _send_now(self, data: memoryview) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._closed = True
            raise LinkClosed(f"peer closed the link: {error}") from error

    def _read(self) -> None:
        while True:
            try:
                data = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._closed = True
                break
            self._in += data
            if len(data) < _READ_BYTES:
                break
        self._split()

    def _split(self) -> None:
        at = 0
        view = memoryview(self._in)
        while len(view) - at >= _HEAD.size:
            length, kind, epoch = _HEAD.unpack_from(view, at)
            if length > FRAME_BYTES_MAX:
                raise LinkError(f"frame of {length} bytes announced; bound {FRAME_BYTES_MAX}")
            end = at + _HEAD.size + length
            if end > len(view):
                break
            if epoch > self.epoch:
                raise LinkError(f"frame of epoch {epoch} on a link of epoch {self.epoch}")
            if epoch < self.epoch:
                self.dropped += 1
            else:
                self._frames.append((kind, bytes(view[at + _HEAD.size : end])))
            at = end
        view.release()
        if at:
            del self._in[:at]


class MemoryLink:
    """The in-memory twin of Link: two ends in one process, frames passed by reference.

    Used by `LLM`, tests and the simulator. `receive` never waits: what is not there is None.
    """

    def __init__(self, *, epoch: int = 0) -> None:
        self.epoch = epoch
        self.dropped = 0
        self.peer: MemoryLink | None = None
        self._frames: deque[tuple[int, int, bytes]] = deque()

    @classmethod
    def pair(cls) -> tuple[MemoryLink, MemoryLink]:
        left, right = cls(), cls()
        left.peer, right.peer = right, left
        return left, right

    def send(self, kind: int, payload: bytes) -> None:
        if self.peer is None:
            raise LinkClosed("peer closed the link")
        self.peer.deliver(self.epoch, kind, payload)

    def deliver(self, epoch: int, kind: int, payload: bytes) -> None:
        """Put a frame into this end's queue as if the peer had sent it in `epoch`.

        The simulator's channels use it to be late, to lose, and to repeat.
        """
        self._frames.append((epoch, kind, payload))

    def flush(self) -> bool:
        return True

    def receive(self, timeout_s: float) -> Frame | None:
        while self._frames:
            epoch, kind, payload = self._frames.popleft()
            if epoch > self.epoch:
                raise LinkError(f"frame of epoch {epoch} on a link of epoch {self.epoch}")
            if epoch == self.epoch:
                return kind, payload
            self.dropped += 1
        if self.peer is None:
            raise LinkClosed("peer closed the link")
        return None

    def drain(self) -> list[Frame]:
        frames = []
        while self._frames:
            frame = self.receive(0.0)
            if frame is not None:
                frames.append(frame)
        return frames

    def close(self) -> None:
        if self.peer is not None:
            self.peer.peer = None
            self.peer = None


def _poll(sock: socket.socket, event: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(sock, event)
    return bool(poller.poll(timeout_s * 1000))
