"""The control channel: whole messages in order, each with its own descriptors, bounds."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from holdfast.errors import LinkClosed, LinkError, LinkOverflow, ModelError
from holdfast.proc.control import BUFFER_BYTES_MAX, FDS_MAX, Control
from holdfast.wire.link import Kind, Link


@pytest.fixture
def ends():
    left, sock = Control.pair()
    right = Control(sock)
    yield left, right
    left.close()
    right.close()


def pipe_with(text: bytes) -> int:
    read, write = os.pipe()
    os.write(write, text)
    os.close(write)
    return read


def test_descriptors_arrive_with_the_message_they_were_sent_with(ends) -> None:
    left, right = ends
    for number in range(20):
        fds = [pipe_with(b"%d.%d" % (number, i)) for i in range(number % 4)]
        left.send({"type": "n", "number": number}, fds)
        for fd in fds:
            os.close(fd)
    received = []
    while len(received) < 20:
        received.append(right.wait(5))
    for number, (message, fds) in enumerate(received):
        assert message == {"type": "n", "number": number}
        assert [os.read(fd, 10) for fd in fds] == [
            b"%d.%d" % (number, i) for i in range(number % 4)
        ]
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)


def test_what_the_peer_does_not_take_is_buffered_in_order_up_to_a_bound(ends) -> None:
    left, right = ends
    text = "x" * 100_000
    sent = 0
    with pytest.raises(LinkOverflow):
        while True:
            fd = pipe_with(b"%d" % sent)
            try:
                left.send({"type": "big", "number": sent, "text": text}, [fd])
            finally:
                os.close(fd)
            sent += 1
    assert BUFFER_BYTES_MAX - 200_000 < left.unsent_bytes <= BUFFER_BYTES_MAX
    for number in range(sent):
        while (got := right.wait(0)) is None:
            left.flush()
        message, fds = got
        assert message["number"] == number and os.read(fds[0], 10) == b"%d" % number
        os.close(fds[0])
    assert left.unsent_bytes == 0


def test_messages_before_the_end_are_read_and_then_the_end(ends) -> None:
    left, right = ends
    left.send({"type": "last"})
    left.close()
    assert right.receive() == [({"type": "last"}, [])]
    with pytest.raises(LinkClosed):
        right.receive()
    with pytest.raises(LinkClosed):
        right.send({"type": "x"})


def test_wait_returns_none_at_its_deadline(ends) -> None:
    assert ends[1].wait(0.01) is None


def test_closing_gives_up_descriptors_that_nobody_took(ends) -> None:
    left, right = ends
    before = set(os.listdir("/proc/self/fd"))
    fd = pipe_with(b"x")
    left.send({"type": "x"}, [fd])
    left.send({"type": "y"}, [fd])
    os.close(fd)
    assert right._read() is None
    right.close()
    left.close()
    assert set(os.listdir("/proc/self/fd")) < before


def test_faults_say_whether_the_operator_can_help(ends) -> None:
    left, right = ends
    left.fault(ModelError("no weights"))
    left.fault(RuntimeError())
    first, second = right.receive()
    assert first[0] == {"type": "fault", "operator": True, "message": "no weights"}
    assert second[0] == {"type": "fault", "operator": False, "message": "RuntimeError"}


def test_more_descriptors_than_a_message_carries_are_refused_before_anything_is_sent(ends) -> None:
    left, right = ends
    with pytest.raises(LinkError):
        left.send({"type": "x"}, [0] * (FDS_MAX + 1))
    assert right.wait(0) is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IIQ", 1, Kind.PLAN, 0) + b"x",
        struct.pack("<IIQ", 1 << 30, Kind.CONTROL, 0),
        struct.pack("<IIQ", 1, Kind.CONTROL, 0) + b"\xc1",
        struct.pack("<IIQ", 1, Kind.CONTROL, 0) + b"\x07",
        struct.pack("<IIQ", 11, Kind.CONTROL, 0) + b"\x81\xa8fd_count\x05",
    ],
    ids=["kind", "length", "no msgpack", "no map", "descriptors missing"],
)
def test_nonsense_is_a_link_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    control = Control(ours)
    theirs.send(data)
    with pytest.raises(LinkError):
        control.receive()
    control.close()
    theirs.close()


def test_its_frames_are_those_of_a_link() -> None:
    control, sock = Control.pair()
    link = Link(sock)
    control.send({"type": "x"})
    assert link.receive(5)[0] == Kind.CONTROL
    link.send(Kind.CONTROL, b"\x81\xa4type\xa1y")
    assert control.wait(5) == ({"type": "y"}, [])
    link.close()
    control.close()
