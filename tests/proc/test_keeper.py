"""The keeper: memory that survives a worker, and the weights' checksum."""

from __future__ import annotations

import os
import signal

import pytest

from holdfast.proc import memfd
from holdfast.proc.child import Child, spawn

MIB = 1 << 20


@pytest.fixture
def keeper():
    children: list[Child] = []

    def start(**sizes: int) -> Child:
        child = spawn("keeper", 0, module="holdfast.proc.keeper", config=sizes, fds={})
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        assert child.wait(10) is not None
        child.close()


def ask(child: Child, process: int, weights_sum: int, *, loaded: bool) -> bool:
    fields = {"process": process, "sum": weights_sum, "loaded": loaded, "step": 31}
    child.control.send({"type": "weights_sum", **fields})
    message, _ = child.control.wait(10)
    told = (message["type"], message["process"], message["step"])
    assert told == ("weights", process, 31)
    return message["ok"]


def test_the_keeper_hands_over_both_slabs_and_stops_when_told(keeper) -> None:
    child = keeper(weights_bytes=3 * MIB, pool_bytes=5 * MIB)
    message, fds = child.control.wait(10)
    assert message["type"] == "ready"
    assert [os.fstat(fd).st_size for fd in fds] == [3 * MIB, 5 * MIB]
    slab = memfd.attach(fds[0])
    slab[0], slab[-1] = 7, 9
    again = memfd.attach(fds[0])
    assert (again[0], again[1], again[-1]) == (7, 0, 9)
    child.control.send({"type": "stop"})
    assert child.wait(10) == 0
    for fd in fds:
        os.close(fd)


def test_the_weights_are_the_bytes_that_were_loaded(keeper) -> None:
    child = keeper(weights_bytes=1, pool_bytes=1)
    _, fds = child.control.wait(10)
    assert not ask(child, 0, 41, loaded=True)  # Nothing was loaded yet.
    assert ask(child, 1, 41, loaded=False)
    assert ask(child, 2, 41, loaded=True)
    assert not ask(child, 3, 42, loaded=True)
    child.control.send({"type": "weights_forget"})
    assert not ask(child, 4, 41, loaded=True)
    assert ask(child, 5, 2**64 - 1, loaded=False)
    assert ask(child, 6, 2**64 - 1, loaded=True)
    for fd in fds:
        os.close(fd)


def test_too_little_memory_is_one_clear_line_and_exit_code_2(keeper) -> None:
    child = keeper(weights_bytes=1, pool_bytes=1 << 50)
    message, fds = child.control.wait(10)
    assert not fds and message["type"] == "fault" and message["operator"]
    assert message["message"].startswith("--kv-pages: kv-pool needs 1024.0 TiB of memory")
    assert child.wait(10) == 2


def test_the_bytes_outlive_a_process_that_dies_while_it_maps_them(keeper) -> None:
    child = keeper(weights_bytes=MIB, pool_bytes=1)
    _, fds = child.control.wait(10)
    pid = os.fork()
    if pid == 0:
        view = memfd.attach(fds[0])
        view[:] = b"\x5a" * MIB
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert memfd.attach(fds[0])[:] == b"\x5a" * MIB
    for fd in fds:
        os.close(fd)
