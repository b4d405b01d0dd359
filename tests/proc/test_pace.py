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
from holdfast.proc.pace import Pace
from holdfast.proc.worker import Stopped, make_pace, wait_for_hurry
from holdfast.wire.envelope import buckets

# A context and the first cuBLAS calls (docs/gpu-faults.md).
UNPACED_S = 0.4


class Rests:
    """hurry: whether the next rest is broken off."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.hurry = False

    def wait(self, seconds: float) -> bool:
        self.taken.append(seconds)
        return self.hurry


def test_what_cannot_be_paced_is_one_percent_of_the_time_that_the_pieces_take() -> None:
    """33 pieces: of 64 rows. A minute is what a standby may take."""
    rests = Rests()
    paced = Pace(rests.wait)
    limits = Limits(vocab_size=8, context_tokens=8192, prefill_tokens=8192, pages=8)
    shapes, captures = step_shapes(limits, on_gpu=True), 2 * len(buckets(limits.rows_max))
    for _ in range(3 + len(shapes) + captures):
        paced()
    assert UNPACED_S / (UNPACED_S + sum(rests.taken)) < 0.0125
    assert sum(rests.taken) < 60


def test_who_is_needed_rests_no_more() -> None:
    rests = Rests()
    paced = Pace(rests.wait)
    rests.hurry = True
    paced()
    assert paced.hurried and len(rests.taken) == 1
    rests.hurry = False
    for _ in range(3):
        paced()
    assert len(rests.taken) == 1


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
