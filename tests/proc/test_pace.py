"""A standby on a GPU rests far longer than it works, until it is needed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from holdfast.errors import LinkClosed, LinkError
from holdfast.proc import pace
from holdfast.proc.child import Boot
from holdfast.proc.control import Control
from holdfast.proc.pace import REST_MAX_S, Pace
from holdfast.proc.worker import Stopped, make_pace, wait_for_hurry


class World:
    """A clock that work and rests move; `hurry` is whether the next rest is broken off."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.rests: list[float] = []
        self.hurry = False

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.rests.append(seconds)
        self.now_s += 0 if self.hurry else seconds
        return self.hurry


def test_each_rest_is_many_times_the_piece_before_it_and_bounded() -> None:
    world = World()
    paced = Pace(world.wait, world.clock)
    works = (0.004, 0.0, 0.02, 7.0, 0.01)
    for work in works:
        world.now_s += work
        paced()
    assert world.rests == pytest.approx([0.08, 0.0, 0.4, REST_MAX_S, 0.2])
    assert sum(works[:3]) <= 0.05 * sum(world.rests[:3]), "the share of live steps that meet it"
    assert 50 * pace.REST_MAX_S <= 60, "until a standby is prepared"


def test_who_is_needed_rests_no_more() -> None:
    world = World()
    paced = Pace(world.wait, world.clock)
    world.now_s += 0.02
    world.hurry = True
    paced()
    assert paced.hurried and world.rests == pytest.approx([0.4])
    world.hurry = False
    for _ in range(3):
        world.now_s += 0.02
        paced()
    assert len(world.rests) == 1


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
    assert not wait_for_hurry(mine, orders, 0.0)  # type: ignore[arg-type]
    assert orders.taken == ["address"]
    speaker = threading.Timer(0.05, theirs.send, [{"type": "hurry"}])
    speaker.start()
    began_s = time.monotonic()
    assert wait_for_hurry(mine, None, 30.0)
    assert time.monotonic() - began_s < 10
    speaker.join()


def test_a_stop_and_the_supervisors_end_are_heard_in_a_rest(ends: tuple[Control, Control]) -> None:
    mine, theirs = ends
    theirs.send({"type": "stop"})
    with pytest.raises(Stopped):
        wait_for_hurry(mine, None, 1.0)
    theirs.send({"type": "provoke", "kind": "address"})
    with pytest.raises(LinkError, match="provoke"):
        wait_for_hurry(mine, None, 1.0)
    theirs.close()
    with pytest.raises(LinkClosed):
        wait_for_hurry(mine, None, 1.0)


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
