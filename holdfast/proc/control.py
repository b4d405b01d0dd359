"""The control channel between the supervisor and one child: small messages, and file descriptors.

A stream of frames as wire.link has them (kind CONTROL, epoch 0; payload a msgpack map with a
"type"), but sent with SCM_RIGHTS, so that a message can carry descriptors: a new link after the
peer at its other end was replaced. Frames arrive whole and in order, each with its own descriptors.

Owned by one thread of one process at each end. Nothing here waits but `wait`; a peer that does not
read is LinkOverflow, a dead one LinkClosed. It must not know what the messages mean.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from holdfast.errors import LinkClosed, LinkError, LinkOverflow, OperatorError
from holdfast.wire.link import Kind

Message = dict[str, Any]

_HEAD = struct.Struct("<IIQ")
FRAME_BYTES_MAX = 1 << 20
BUFFER_BYTES_MAX = 4 << 20
# A message carries at most one link per api process besides its own; Linux allows 253 a message.
FDS_MAX = 64
_READ_BYTES = 1 << 16
_RIGHTS_BYTES = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)


class Control:
    """One end of a control channel. `fileno` is for a selector; then call `receive`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._in = bytearray()
        self._in_fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._out_bytes = 0
        self._messages: deque[tuple[Message, list[int]]] = deque()
        self._ended = False
        sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Control, socket.socket]:
        """Our end, and the socket of the other end, which goes to a child that is to be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def unsent_bytes(self) -> int:
        return self._out_bytes

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, or buffer up to a bound; `fds` are duplicated to the peer and stay ours.

        Raises LinkClosed when the peer is gone, LinkOverflow when it does not read.
        """
        if len(fds) > FDS_MAX:
            raise LinkError(f"{len(fds)} descriptors in one message; at most {FDS_MAX}")
        payload = msgspec.msgpack.encode({**message, "fd_count": len(fds)})
        if len(payload) > FRAME_BYTES_MAX or self._out_bytes + len(payload) > BUFFER_BYTES_MAX:
            raise LinkOverflow(f"{self._out_bytes} bytes unread by the peer")
        data = memoryview(_HEAD.pack(len(payload), Kind.CONTROL, 0) + payload)
        # Our own copies: the caller may close its descriptors as soon as `send` returns.
        self._out.append((data, [os.dup(fd) for fd in fds]))
        self._out_bytes += len(data)
        self.flush()

    def flush(self) -> bool:
        """Send what is buffered without blocking; True when nothing is left. Raises LinkClosed."""
        while self._out:
            data, fds = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self.sock.sendmsg([data], rights)
            except BlockingIOError:
                return False
            except OSError as error:
                self._ended = True
                raise LinkClosed(f"peer closed the control channel: {error}") from error
            for fd in fds:
                os.close(fd)
            self._out_bytes -= sent
            self._out.popleft()
            if sent < len(data):
                self._out.appendleft((data[sent:], []))
        return True

    def receive(self) -> list[tuple[Message, list[int]]]:
        """All messages that are there now, each with descriptors that the caller now owns.

        Raises LinkClosed at end of file once every message before it was returned, LinkError on a
        malformed frame.
        """
        if not self._ended:
            self._read()
        if not self._messages and self._ended:
            raise LinkClosed("peer closed the control channel")
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def wait(self, timeout_s: float) -> tuple[Message, list[int]] | None:
        """The next message, or None when the deadline passes. Raises as `receive` does."""
        deadline = time.monotonic() + timeout_s
        while not self._messages:
            if self._ended:
                raise LinkClosed("peer closed the control channel")
            poller = select.poll()
            poller.register(self.sock, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            self._read()
        return self._messages.popleft()

    def ready(self, **facts: object) -> None:
        """Child: everything is up; `facts` are for the supervisor."""
        self.send({"type": "ready", **facts})

    def progress(self, what: str, done: int, total: int) -> None:
        """Child: `done` of `total` bytes of `what`; may be left out, never waited for."""
        self.send({"type": "progress", "what": what, "done": done, "total": total})

    def fault(self, error: BaseException) -> None:
        """Child: about to exit because of `error`; an OperatorError ends the server with code 2."""
        message = str(error) or type(error).__name__
        operator = isinstance(error, OperatorError)
        self.send({"type": "fault", "operator": operator, "message": message})

    def close(self) -> None:
        self._ended = True
        for _, fds in [*self._out, *self._messages]:
            for fd in fds:
                os.close(fd)
        for fd in self._in_fds:
            os.close(fd)
        self._out.clear()
        self._messages.clear()
        self._in_fds.clear()
        self.sock.close()

    def _read(self) -> None:
        while True:
            try:
                data, rights, flags, _ = self.sock.recvmsg(
                    _READ_BYTES, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except OSError:
                data, rights, flags = b"", [], 0
            for level, kind, packed in rights:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
                    self._in_fds.extend(fds)
            if flags & socket.MSG_CTRUNC:
                # The kernel dropped descriptors: RLIMIT_NOFILE of this process is reached.
                raise LinkError("descriptors were lost: too many open files")
            if not data:
                self._ended = True
                break
            self._in += data
            self._split()

    def _split(self) -> None:
        while len(self._in) >= _HEAD.size:
            length, kind, _ = _HEAD.unpack_from(self._in)
            if kind != Kind.CONTROL or length > FRAME_BYTES_MAX:
                raise LinkError(f"control frame of kind {kind} and {length} bytes")
            end = _HEAD.size + length
            if len(self._in) < end:
                return
            try:
                message = msgspec.msgpack.decode(bytes(self._in[_HEAD.size : end]))
                fd_count = message.pop("fd_count", 0)
                fds = [self._in_fds.popleft() for _ in range(fd_count)]
            except (msgspec.DecodeError, AttributeError, TypeError, IndexError) as error:
                raise LinkError(f"control frame is malformed: {error}") from error
            del self._in[:end]
            self._messages.append((message, fds))
