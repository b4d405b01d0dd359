"""proc.worker as a real process: loads, answers plans, stops, and dies loudly when it must."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devicekit import LIMITS, Hand, Request, make_runner

from holdfast.device.memory import pool_bytes
from holdfast.model.spec import ModelSpec
from holdfast.proc.child import Child, limits_config, spawn
from holdfast.wire import checksum
from holdfast.wire.link import Kind, Link
from holdfast.wire.plan import StepPlan, StepResult

DEADLINE_S = 60.0


class Process:
    """A worker process over memory of ours; also a runner, so that `Hand` can drive it."""

    def __init__(self, folder: Path, fds: dict[str, int], epoch: int = 1, **config: Any) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.epoch = epoch
        self.limits = LIMITS
        self.link = Link(ours, epoch=epoch)
        self.messages: list[dict[str, Any]] = []
        given = {
            "limits": limits_config(LIMITS),
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",
            "pool_dtype": "float32",
            "kernels": "reference",
            "graphs": False,
            "load": "hf",
            "seed": 0,
            "threads": 1,
            "loaded": False,
            "scrub_gbps": 0.0,
            **config,
        }
        self.child: Child = spawn("worker", 0, module="holdfast.proc.worker", config=given, fds=fds)

    def until(self, kind: str) -> dict[str, Any]:
        """The first message of a type; those before it are kept in `messages`."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            received = self.child.control.wait(1.0)
            if received is not None:
                self.messages.append(received[0])
                if received[0]["type"] == kind:
                    return received[0]
        raise AssertionError(f"no {kind} in {DEADLINE_S} s; got {self.messages}")

    def promote(self) -> int:
        """From ready to serving, as the supervisor does it; the sum of the weights it found."""
        self.until("ready")
        self.child.control.send({"type": "verify"})
        weights_sum = self.until("weights_sum")["sum"]
        message = {"type": "promote", "epoch": self.epoch}
        self.child.control.send(message, [self._theirs.fileno()])
        self._theirs.close()
        return weights_sum

    def run(self, plan: StepPlan) -> StepResult:
        self.link.send(Kind.PLAN, plan.encode())
        frame = self.link.receive(DEADLINE_S)
        assert frame is not None
        assert frame[0] == Kind.RESULT
        return StepResult.decode(frame[1])

    def exit_code(self) -> int | None:
        return self.child.wait(DEADLINE_S)

    def close(self) -> None:
        self.child.kill()
        self.child.wait(DEADLINE_S)
        self.child.close()
        self.link.close()
        self._theirs.close()


@pytest.fixture
def processes():
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


@pytest.fixture
def slabs(spec: ModelSpec):
    sizes = {
        "weights": spec.weights_bytes("float32"),
        "pool": pool_bytes(spec, LIMITS, "float32"),
    }
    fds = {name: os.memfd_create(name, os.MFD_CLOEXEC) for name in sizes}
    for name, size in sizes.items():
        os.ftruncate(fds[name], size)
    yield fds
    for fd in fds.values():
        os.close(fd)


def test_a_worker_with_graphs_answers_the_same_and_says_what_was_replayed(
    checkpoint, spec, slabs, processes
):
    request = Request(list(range(20)), fields={"temperature": 1.0, "seed": 5})
    expected = Hand(make_runner(spec)).generate(1, request, 8, chunk=7)
    worker = Process(checkpoint[0], slabs, graphs=True)
    processes.append(worker)
    worker.promote()
    captured = [m for m in worker.messages if m.get("what") == "graphs"]
    assert captured[-1]["done"] == captured[-1]["total"] > 0
    assert Hand(worker).generate(1, request, 8, chunk=7) == expected
    worker.child.control.send({"type": "stop"})
    counts: dict[str, dict[str, int]] = {"graph": {}, "mixed": {}, "eager": {}}
    while counts != {"graph": {"fast": 7}, "mixed": {"general": 3}, "eager": {}}:
        told = worker.until("steps")
        for kind, count in counts.items():
            for name, more in told[kind].items():
                count[name] = count.get(name, 0) + more
    assert worker.exit_code() == 0


def test_a_worker_loads_serves_stops_and_the_next_one_finds_its_weights(
    checkpoint, spec, slabs, processes
):
    request = Request(list(range(20)), fields={"temperature": 1.0, "seed": 5, "top_p": 0.9})
    expected = Hand(make_runner(spec)).generate(1, request, 8, chunk=7)

    first = Process(checkpoint[0], slabs)
    processes.append(first)
    first_sum = first.promote()
    weights = os.pread(slabs["weights"], spec.weights_bytes("float32"), 0)
    assert first_sum == checksum.bytes_sum(weights)
    assert next(m for m in first.messages if m["type"] == "ready")["threads"] == 1
    progress = [message for message in first.messages if message["type"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == len(weights)
    assert {message["what"] for message in progress} == {"weights", "weights check"}
    assert Hand(first).generate(1, request, 8, chunk=7) == expected
    first.child.control.send({"type": "stop"})
    assert first.exit_code() == 0

    # The slab holds the weights now; a plan of the old epoch is dropped, not run.
    second = Process(checkpoint[0], slabs, epoch=2, loaded=True)
    processes.append(second)
    assert second.promote() == first_sum
    assert {message.get("what") for message in second.messages} <= {"weights check", None}
    second.link.epoch = 1
    second.link.send(Kind.PLAN, StepPlan(epoch=1, step=1).encode())
    second.link.epoch = 2
    assert Hand(second).generate(1, request, 8, chunk=20) == expected
    second.link.close()
    assert second.exit_code() == 0


def test_an_unfit_plan_is_reported_and_ends_the_process(checkpoint, slabs, processes):
    process = Process(checkpoint[0], slabs, load="dummy", seed=3)
    processes.append(process)
    process.promote()
    process.link.send(Kind.PLAN, StepPlan(epoch=1, step=7).encode())
    fault = process.until("fault")
    assert (fault["kind"], fault["operator"]) == ("WorkerFault", False)
    assert "expected 1:1" in fault["message"]
    assert "Traceback" in fault["traceback"]
    assert process.exit_code() == 70
    # What was sent before the fault is still there, then end of file.
    with contextlib.suppress(Exception):
        assert process.link.receive(1.0) is None


@pytest.mark.parametrize(
    ("config", "word"), [({"model": "/nowhere"}, "/nowhere"), ({"device": "tpu"}, "--device")]
)
def test_what_the_operator_can_mend_is_said_in_one_line_with_exit_code_2(
    checkpoint, slabs, processes, config, word
):
    process = Process(checkpoint[0], slabs, **config)
    processes.append(process)
    fault = process.until("fault")
    assert fault["operator"]
    assert word in fault["message"]
    assert "\n" not in fault["message"]
    assert process.exit_code() == 2


def test_a_worker_whose_memory_is_too_small_does_not_start(checkpoint, slabs, processes):
    os.ftruncate(slabs["pool"], 4096)
    process = Process(checkpoint[0], slabs)
    processes.append(process)
    assert "KV pool memory has 4096 bytes" in process.until("fault")["message"]
    assert process.exit_code() == 70


def test_a_worker_that_scrubs_says_the_sum_of_its_weights_again_and_again_between_its_steps(
    checkpoint, slabs, processes
):
    process = Process(checkpoint[0], slabs, scrub_gbps=2.0)
    processes.append(process)
    at_promotion = process.promote()
    # Idle, and between steps.
    assert process.until("weights_sum")["sum"] == at_promotion
    process.run(StepPlan(epoch=1, step=1))
    assert process.until("weights_sum")["sum"] == at_promotion
    with open(f"/proc/{os.getpid()}/fd/{slabs['weights']}", "r+b") as slab:
        slab.seek(1000)
        byte = slab.read(1)[0]
        slab.seek(1000)
        slab.write(bytes([byte ^ 1]))
    process.until("weights_sum")  # It may have been read before.
    assert process.until("weights_sum")["sum"] != at_promotion


def test_random_weights_depend_on_the_seed_alone(spec):
    """What --load dummy promises: the same seed gives the next worker the same sum."""
    import torch

    from holdfast.model.weights import WeightsLayout, dummy_weights
    from holdfast.ops.checksum import slab_sum

    layout = WeightsLayout.of(spec, "float32")
    sums = []
    for seed in (1, 1, 2):
        slab = torch.from_numpy(np.zeros(layout.bytes, np.uint8))
        dummy_weights(spec, slab, layout, seed)
        sums.append(slab_sum(slab))
    assert sums[0] == sums[1]
    assert sums[0] != sums[2]
