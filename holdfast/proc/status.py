"""What a running server says of itself: `StatusServer` in the supervisor, `read_all` for `ps`.

The supervisor listens on the abstract unix socket `\\0holdfast-<pid>`, which has no file and dies
with it, and answers every connection of its own user (or root) with one JSON object. A reader
checks by SO_PEERCRED that the answer comes from that pid. No torch, no secrets: options are never
part of a status.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

_NAME = re.compile(r"@holdfast-(\d+)$")
_CREDENTIALS = struct.Struct("3i")
ANSWER_BYTES_MAX = 1 << 20
ANSWER_S_MAX = 2.0


class StatusServer:
    """A listening socket for the supervisor's selector; `answer` when it is readable."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(_address(os.getpid()))
        self._sock.listen(8)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def answer(self, status: dict[str, Any]) -> None:
        """Send `status` to one waiting reader, if there is one; never waits for it."""
        try:
            peer, _ = self._sock.accept()
        except OSError:
            return  # It went away, or descriptors are short: the reader sees its own deadline.
        with peer:
            peer.setblocking(False)
            _, uid, _ = _credentials(peer)
            if uid not in (0, os.geteuid()):
                return
            try:
                # A status of some kilobytes fits the empty buffer of a new socket.
                peer.send(json.dumps(status).encode() + b"\n")
            except OSError:
                return  # The reader is gone; it alone is concerned.

    def close(self) -> None:
        self._sock.close()


def read(pid: int) -> dict[str, Any] | None:
    """The status of the server whose supervisor is `pid`; None when it does not answer us."""
    deadline = time.monotonic() + ANSWER_S_MAX
    data = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_S_MAX)
        try:
            sock.connect(_address(pid))
            if _credentials(sock)[0] != pid:
                return None  # Somebody else took the name.
            while not data.endswith(b"\n") and len(data) < ANSWER_BYTES_MAX:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                piece = sock.recv(1 << 16)
                if not piece:
                    break
                data += piece
            return json.loads(data)
        except (OSError, ValueError):
            return None


def read_all() -> list[dict[str, Any]]:
    """The status of every server of this user (root: of all) in this network namespace, by pid."""
    pids = set()
    for line in Path("/proc/net/unix").read_text().splitlines():
        if match := _NAME.search(line):
            pids.add(int(match.group(1)))
    found = [read(pid) for pid in sorted(pids)]
    return [status for status in found if status is not None]


def memory_bytes(pid: int) -> int:
    """Resident memory of a process, 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _address(pid: int) -> str:
    return f"\0holdfast-{pid}"


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer: who connected, or who listens."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return pid, uid, gid
