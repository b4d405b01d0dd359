"""What a running server says of itself: `StatusServer` in the supervisor, `read_all` for `ps`.

The supervisor listens on the abstract unix socket `\\0holdfast-<pid>`, which has no file and dies
with it. A peer of its own user (or root) sends one line, a JSON object ({} asks for the status),
and gets one line back; anybody else gets nothing. A reader checks by SO_PEERCRED that the answer
comes from that pid. No torch, no secrets: options are never part of a status.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAME = re.compile(r"@holdfast-(\d+)$")
_CREDENTIALS = struct.Struct("3i")
ANSWER_BYTES_MAX = 1 << 20
ANSWER_S_MAX = 2.0
# A request is a few numbers; a drill's marks a prompt by some tokens.
REQUEST_BYTES_MAX = 1 << 16
# Peers that have connected and not sent their line; the oldest makes room for one more.
PEERS_MAX = 8

Respond = Callable[[dict[str, Any]], dict[str, Any]]


class StatusServer:
    """A listening socket and its peers behind one descriptor, for the supervisor's selector;
    `answer` when it is readable. Never waits for a peer."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(_address(os.getpid()))
        self._sock.listen(PEERS_MAX)
        self._sock.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._sock, select.EPOLLIN)
        self._peers: dict[int, tuple[socket.socket, bytearray]] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def answer(self, respond: Respond) -> None:
        """Take new peers, and give each that has sent its line the answer of `respond`."""
        for number, _ in self._epoll.poll(0):
            if number == self._sock.fileno():
                self._accept()
            else:
                self._hear(number, respond)

    def close(self) -> None:
        for number in list(self._peers):
            self._drop(number)
        self._epoll.close()
        self._sock.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._sock.accept()
        except OSError:
            return  # It went away, or descriptors are short: the reader sees its own deadline.
        _, uid, _ = _credentials(peer)
        if uid not in (0, os.geteuid()):
            peer.close()
            return
        if len(self._peers) >= PEERS_MAX:
            self._drop(next(iter(self._peers)))
        peer.setblocking(False)
        self._peers[peer.fileno()] = (peer, bytearray())
        self._epoll.register(peer, select.EPOLLIN)

    def _hear(self, number: int, respond: Respond) -> None:
        peer, heard = self._peers[number]
        try:
            piece = peer.recv(REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        heard += piece
        if piece and b"\n" not in heard and len(heard) < REQUEST_BYTES_MAX:
            return
        if b"\n" in heard:
            # An answer of some kilobytes fits the empty buffer of a new socket; a reader that is
            # gone is alone concerned.
            with contextlib.suppress(OSError):
                peer.send(json.dumps(_respond(bytes(heard), respond)).encode() + b"\n")
        self._drop(number)

    def _drop(self, number: int) -> None:
        peer, _ = self._peers.pop(number)
        self._epoll.unregister(peer)
        peer.close()


def _respond(heard: bytes, respond: Respond) -> dict[str, Any]:
    try:
        request = json.loads(heard.partition(b"\n")[0])
    except ValueError:
        request = None
    if not isinstance(request, dict):
        return {"error": "a request is one line with a JSON object"}
    return respond(request)


def read(pid: int) -> dict[str, Any] | None:
    """The status of the server whose supervisor is `pid`; None when it does not answer us."""
    return ask(pid, {})


def ask(pid: int, request: dict[str, Any]) -> dict[str, Any] | None:
    """What the supervisor `pid` answers to a request; None when it does not answer us."""
    deadline = time.monotonic() + ANSWER_S_MAX
    data = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_S_MAX)
        try:
            sock.connect(_address(pid))
            if _credentials(sock)[0] != pid:
                return None  # Somebody else took the name.
            sock.sendall(json.dumps(request).encode() + b"\n")
            while not data.endswith(b"\n") and len(data) < ANSWER_BYTES_MAX:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                piece = sock.recv(1 << 16)
                if not piece:
                    break
                data += piece
            return json.loads(data)
        except (OSError, ValueError):
            return None


def at_rest(found: dict[str, Any]) -> bool:
    """Of a status: every process is up, and the next worker prepared where one is kept. A cold
    standby has no process until a worker is lost, and `none` not even a place."""
    if not found["ready"]:
        return False
    states = [p["state"] for p in found["processes"] if p["title"].startswith("holdfast standby")]
    return found["standby"] != "warm" or states == ["prepared"]


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
