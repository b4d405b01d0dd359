"""A standby on a GPU rests far longer than it works, until it is needed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from holdfast.config import Limits
from holdfast.device.warm_up import step_shapes
from holdfast.errors import LinkClosed, LinkError
from holdfast.proc.child import Boot
from holdfast.proc.control import Control
from holdfast.proc.pace import FREE_S, HURRY, REST_S, Pace, Unwatched
from holdfast.proc.worker import Stopped, hear_of_streams, make_pace
from holdfast.wire.envelope import buckets

# A context and the first cuBLAS calls (docs/gpu-faults.md).
UNPACED_S = 0.4


class Rests:
    """Waiting and a clock of its own; said: what the next wait hears, after `said_after_s`."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.taken: list[float] = []
        self.said = 0.0
        self.said_after_s = 0.0

    def hear(self, seconds: float) -> float:
        said, self.said = self.said, 0.0
        waited = self.said_after_s if said else seconds
        self.now_s += waited
        self.taken.append(waited)
        return said

    def pace(self) -> Pace:
        return Pace(self.hear, lambda: self.now_s)


def test_what_cannot_be_paced_is_one_percent_of_the_time_that_the_pieces_take() -> None:
    """33 pieces: of 64 rows. A minute is what a standby may take."""
    rests = Rests()
    paced = rests.pace()
    limits = Limits(vocab_size=8, context_tokens=8192, prefill_tokens=8192, pages=8)
    shapes, captures = step_shapes(limits, on_gpu=True), 2 * len(buckets(limits.rows_max))
    for _ in range(3 + len(shapes) + captures):
        paced()
    assert UNPACED_S / (UNPACED_S + sum(rests.taken)) < 0.0125
    assert sum(rests.taken) < 60


def test_who_is_needed_rests_no_more() -> None:
    rests = Rests()
    paced = rests.pace()
    rests.said = HURRY
    paced()
    assert paced.hurried and rests.taken == [0.0]
    rests.now_s += 1e6
    paced()
    assert rests.taken == [0.0]


def test_nobody_is_spared_where_nobody_streams_and_only_so_long() -> None:
    rests = Rests()
    paced = rests.pace()
    rests.said, rests.said_after_s = rests.now_s + 1.4, 0.3
    paced()
    assert rests.taken == [0.3] and not paced.hurried
    rests.now_s += 1.0
    paced()
    assert rests.taken == [0.3]
    rests.now_s += 0.2
    paced()
    assert rests.taken == [0.3, REST_S]


def test_a_word_that_is_past_ends_no_rest() -> None:
    rests = Rests()
    rests.said = rests.now_s - 5
    rests.pace()()
    assert sum(rests.taken) == REST_S


def test_a_standby_is_told_that_nobody_streams_for_as_long_as_it_holds() -> None:
    told = Unwatched()
    assert told.until_s(7, 0, 10.0) == 10.0 + FREE_S
    assert told.until_s(7, 0, 10.1) is None
    assert told.until_s(8, 0, 10.1) == 10.1 + FREE_S
    assert told.until_s(8, 3, 12.0) is None
    assert told.until_s(8, 0, 12.1) == 12.1 + FREE_S
    # Told again before the last word is past: no piece rests where nobody streams.
    assert told.until_s(8, 0, 12.1 + FREE_S * 0.6) is not None


@pytest.fixture
def ends() -> Iterator[tuple[Control, Control]]:
    made = tuple(Control(end) for end in socket.socketpair())
    yield made
    for end in made:
        end.close()


class Orders:
    def __init__(self) -> None:
        self.taken: list[Any] = []

    def take(self, message: dict[str, Any]) -> None:
        self.taken.append(message["kind"])


def test_hurry_ends_a_rest_at_once_and_a_drills_order_does_not(
    ends: tuple[Control, Control],
) -> None:
    mine, theirs = ends
    orders = Orders()
    theirs.send({"type": "provoke", "kind": "address"})
    assert hear_of_streams(mine, orders, 0.0) == 0.0  # type: ignore[arg-type]
    assert orders.taken == ["address"]
    speaker = threading.Timer(0.05, theirs.send, [{"type": "hurry"}])
    speaker.start()
    theirs.send({"type": "unwatched", "until_s": 12.5})
    assert hear_of_streams(mine, None, 30.0) == 12.5
    began_s = time.monotonic()
    assert hear_of_streams(mine, None, 30.0) == HURRY
    assert time.monotonic() - began_s < 10
    speaker.join()


def test_a_stop_and_the_supervisors_end_are_heard_in_a_rest(ends: tuple[Control, Control]) -> None:
    mine, theirs = ends
    theirs.send({"type": "stop"})
    with pytest.raises(Stopped):
        hear_of_streams(mine, None, 1.0)
    theirs.send({"type": "provoke", "kind": "address"})
    with pytest.raises(LinkError, match="provoke"):
        hear_of_streams(mine, None, 1.0)
    theirs.close()
    with pytest.raises(LinkClosed):
        hear_of_streams(mine, None, 1.0)


@pytest.mark.parametrize(
    ("role", "device", "background", "paced"),
    [
        ("standby", "cuda:0", True, True),
        ("standby", "cuda:0", False, False),
        ("standby", "cpu", True, False),
        ("worker", "cuda:0", True, False),
    ],
)
def test_only_a_standby_beside_live_streams_of_a_gpu_is_paced(
    ends: tuple[Control, Control], role: str, device: str, background: bool, paced: bool
) -> None:
    mine, theirs = ends
    start = Boot(role, 0, {"device": device, "background": background}, {})
    rest = make_pace(start, mine)
    assert (rest is not None) == paced
    if rest is not None:
        theirs.send({"type": "hurry"})
        rest()
        assert rest.hurried
