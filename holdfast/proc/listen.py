"""Listening sockets, one an api process on the same port, and the descriptors they will need.

The supervisor keeps every listening socket open, so that connections which wait in the queue of an
api process survive its death. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import socket

from holdfast.errors import OptionError

# Connections that wait for accept; the kernel caps it at net.core.somaxconn (4096 by default).
BACKLOG = 4096
STREAMS_WANTED = 2000


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` listening sockets on one (host, port); port 0 picks a free one for all of them.

    Raises OptionError when the address is not ours or the port is taken.
    """
    try:
        # AI_PASSIVE with "" would mean every address: only an explicit 0.0.0.0 or :: does here.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OptionError("--host", f"{host!r} is no address: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    sockets: list[socket.socket] = []
    try:
        # SO_REUSEPORT would share the port with another server of this user without a word; a bind
        # without it does not succeed while anybody else listens there.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # With REUSEADDR a bind also succeeds beside a socket that is bound and not listening;
            # listen decides.
            probe.listen(1)
            address = probe.getsockname()
        for _ in range(count):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _bind_error(host, port, error) from error
    return sockets


def _bind_error(host: str, port: int, error: OSError) -> OptionError:
    if error.errno == errno.EADDRINUSE:
        return OptionError("--port", f"{port} is in use; choose another")
    if error.errno == errno.EACCES:
        return OptionError("--port", f"{port} needs more rights; choose one above 1023")
    return OptionError("--host", f"cannot listen on {host}:{port}: {error.strerror}")


def raise_file_limit() -> str | None:
    """Raise RLIMIT_NOFILE to its hard limit; children inherit it. A warning when it stays low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A hard limit of "unlimited" may be above the kernel's fs.nr_open; then soft stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    # A stream is one connection of an api process; twice that for a proxy's spare connections.
    wanted = 2 * STREAMS_WANTED
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    return (
        f"only {soft} open files are allowed, {STREAMS_WANTED} streams want {wanted}: "
        f"raise the limit (ulimit -n {wanted})"
    )
