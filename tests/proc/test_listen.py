"""Listening sockets and the limit of open files."""

from __future__ import annotations

import resource
import socket

import pytest

from holdfast.errors import OptionError
from holdfast.proc.listen import listen, raise_file_limit


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def test_all_sockets_share_one_port_that_the_kernel_picked() -> None:
    sockets = listen("127.0.0.1", 0, 3)
    ports = {sock.getsockname()[1] for sock in sockets}
    assert len(sockets) == 3 and len(ports) == 1 and ports != {0}
    for sock in sockets:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    with socket.create_connection(("127.0.0.1", ports.pop()), timeout=5):
        pass
    close(sockets)


@pytest.mark.parametrize("shares", [False, True])
def test_a_port_in_use_is_found_even_when_its_owner_shares_it(shares: bool) -> None:
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"--port: {port} is in use; choose another"):
            listen("127.0.0.1", port, 2)


def test_a_port_is_free_again_at_once_after_its_server_went() -> None:
    sockets = listen("127.0.0.1", 0, 1)
    port = sockets[0].getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    accepted, _ = sockets[0].accept()
    # The server closes first: its side of the connection stays behind in TIME_WAIT.
    accepted.close()
    close(sockets)
    client.close()
    close(listen("127.0.0.1", port, 1))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_ours_is_an_option_error(host: str) -> None:
    with pytest.raises(OptionError, match="--host"):
        listen(host, 0, 1)


def test_the_limit_of_open_files_is_raised_and_a_low_one_is_said() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        warning = raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert (warning is None) == (hard >= 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_that_cannot_be_raised_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    assert "ulimit -n 4000" in (raise_file_limit() or "")
