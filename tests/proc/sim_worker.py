"""A worker process of integers (sim.fake_worker) behind the real protocol. Not a test."""

from __future__ import annotations

import socket
import sys
import time

from holdfast.errors import LinkClosed
from holdfast.proc.child import boot
from holdfast.sim.fake_worker import FakeWorker
from holdfast.wire.link import Kind, Link
from holdfast.wire.plan import StepPlan

start = boot()
control = start.control()


def promoted() -> tuple[int, Link] | None:
    """The epoch and the link that the supervisor gives; None: stop."""
    while True:
        received = control.wait(60)
        assert received is not None
        message, fds = received
        if message["type"] == "stop":
            return None
        if message["type"] == "promote":
            return message["epoch"], Link(socket.socket(fileno=fds[0]), epoch=message["epoch"])
        if message["type"] == "ping":
            control.send({"type": "pong"})
            continue
        assert message["type"] == "verify"
        control.send({"type": "weights_sum", "sum": 11})


def main() -> int:
    control.ready()
    given = promoted()
    if given is None:
        return 0
    epoch, link = given
    worker = FakeWorker(start.limits, epoch)
    while True:
        try:
            frame = link.receive(0.02)
            for message, _ in control.receive():
                if message["type"] == "stop":
                    return 0
            if frame is None:
                continue
            assert frame[0] == Kind.PLAN
            # A device takes its time, so that a kill finds steps in flight.
            time.sleep(start.config["step_s"])
            link.send(Kind.RESULT, worker.run(StepPlan.decode(frame[1])).encode())
            link.flush_until(5)
        except LinkClosed:
            return 0


if __name__ == "__main__":
    sys.exit(main())
