"""Links: whole frames in order, old epochs dropped, death is end of file, bounds hold."""

from __future__ import annotations

import threading

import pytest

from holdfast.errors import LinkClosed, LinkError, LinkOverflow, LinkTimeout
from holdfast.wire.link import Kind, Link, MemoryLink


@pytest.fixture
def pair():
    """Two socket ends ."""
    left, right = Link.pair(buffer_bytes=16 << 20)
    yield left, right
    left.close()
    right.close()


@pytest.fixture(params=["socket", "memory"])
def ends(request):
    left, right = Link.pair() if request.param == "socket" else MemoryLink.pair()
    yield left, right
    left.close()
    right.close()


def test_frames_arrive_whole_and_in_order(ends):
    left, right = ends
    sent = [(Kind.PLAN, b""), (Kind.RESULT, b"x" * 70_000), (Kind.MESSAGE, b"abc")]
    for kind, payload in sent:
        left.send(kind, payload)
    got = []
    while len(got) < 3:
        left.flush()
        frame = right.receive(1.0)
        assert frame is not None
        got.append(frame)
    assert got == sent


def test_frames_of_an_old_epoch_are_dropped_and_counted(ends):
    left, right = ends
    left.send(Kind.RESULT, b"old")
    left.epoch = right.epoch = 1
    left.send(Kind.RESULT, b"new")
    assert right.receive(1.0) == (Kind.RESULT, b"new")
    assert right.dropped == 1


def test_a_frame_of_a_future_epoch_is_a_protocol_error(ends):
    left, right = ends
    left.epoch = 5
    left.send(Kind.RESULT, b"?")
    with pytest.raises(LinkError):
        right.receive(1.0)


def test_a_closed_peer_is_end_of_file_after_its_last_frame(ends):
    left, right = ends
    left.send(Kind.MESSAGE, b"last words")
    left.close()
    assert right.drain() == [(Kind.MESSAGE, b"last words")]
    with pytest.raises(LinkClosed):
        right.receive(1.0)


def test_receive_returns_none_at_its_deadline(ends):
    assert ends[1].receive(0.0) is None


def test_sending_to_a_dead_peer_raises(pair):
    left, right = pair
    right.close()
    with pytest.raises(LinkClosed):
        for _ in range(10):
            left.send(Kind.MESSAGE, b"x" * 100_000)


def test_a_peer_that_does_not_read_overflows_the_bound_and_not_memory(pair):
    left, _ = pair
    left.buffer_bytes = 1 << 20
    with pytest.raises(LinkOverflow):
        for _ in range(100):
            left.send(Kind.MESSAGE, b"x" * 100_000)
    assert left.unsent_bytes <= 1 << 20
    with pytest.raises(LinkTimeout):
        left.flush_until(0.01)


def test_large_frames_pass_while_the_peer_reads(pair):
    left, right = pair
    got: list[bytes] = []

    def read() -> None:
        while len(got) < 3:
            frame = right.receive(5.0)
            assert frame is not None
            got.append(frame[1])

    thread = threading.Thread(target=read)
    thread.start()
    for size in (5 << 20, 1, 7 << 20):
        left.send(Kind.PLAN, b"z" * size)
    left.flush_until(5.0)
    thread.join(5.0)
    assert [len(p) for p in got] == [5 << 20, 1, 7 << 20]


def test_a_length_over_the_bound_is_refused_before_it_is_read(pair):
    left, right = pair
    left.sock.send(b"\xff\xff\xff\xff" + b"\0" * 12)
    with pytest.raises(LinkError):
        right.receive(1.0)
