"""GPU memory that outlives its users: shared by descriptors, read-only where it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from devicekit import LIMITS, Hand, Request, make_checkpoint
from gpukit import ROOT, keeper
from test_worker_process import Process

from holdfast.device.memory import pool_bytes
from holdfast.model.spec import ModelSpec

MIB = 1 << 20
SCRIPT = """
import sys
import torch
from holdfast.device.cuda import broken, open_device
from holdfast.device.memory import CudaArray
from holdfast.cuda_driver import Driver
from holdfast.proc.cuda_memory import Mapping

fd, size, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
device = open_device("cuda:0")
mapping = Mapping(Driver(), fd, size, 0, write=what == "write")
slab = torch.as_tensor(CudaArray(mapping, size), device=device)
assert slab.data_ptr() == mapping.address, "torch made a copy"
if what == "read":
    print(int(slab.to(torch.int64).sum()))
else:
    try:
        slab.fill_(7)
        torch.cuda.synchronize()
        if what == "write":
            mapping.protect()
            assert int(slab[0]) == 7
            what = "protected"
            slab.fill_(9)
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(what, "refused", broken(error), "illegal memory access" in str(error), flush=True)
        import os
        os._exit(0)
    print(what, "done")
"""


def in_a_process(fd: int, size: int, what: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(fd), str(size), what],
        pass_fds=(fd,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_memory_is_zero_shared_and_read_only_as_mapped():
    size = 3 * MIB
    with keeper(size, MIB) as fds:
        assert in_a_process(fds["weights"], size, "read") == "0"
        # A loader writes, then gives its right away; its next store is its own end.
        assert in_a_process(fds["weights"], size, "write") == "protected refused True True"
        assert in_a_process(fds["weights"], size, "read") == str(7 * size)
        assert in_a_process(fds["weights"], size, "store") == "store refused True True"
        assert in_a_process(fds["weights"], size, "read") == str(7 * size)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-model")
    make_checkpoint(folder)
    return folder


def test_a_killed_worker_leaves_weights_and_pages_to_the_next(checkpoint):
    spec = ModelSpec.load(checkpoint)
    sizes = (spec.weights_bytes("float32"), pool_bytes(spec, LIMITS, "float32"))
    request = Request(list(range(20)))
    with keeper(*sizes) as fds:
        first = Process(checkpoint, fds, device="cuda:0")
        first_sum = first.promote()
        hand = Hand(first)
        hand.admit(1, request, hand.fresh_pages(24))
        tokens = [int(hand.run([(1, 20, 1)]).tokens[0])]
        sums = hand.run(seals=[1, 2, 3, 4, 5]).seal_sums
        os.kill(first.child.pid, signal.SIGKILL)
        assert first.exit_code() == -signal.SIGKILL
        first.close()

        second = Process(checkpoint, fds, epoch=2, device="cuda:0", loaded=True)
        try:
            assert second.promote() == first_sum
            hand = Hand(second)
            assert list(hand.run(seals=[1, 2, 3, 4, 5]).seal_sums) == list(sums)
            # The pages still serve: a row over them goes on without computing them again.
            hand.admit(1, Request([*request.prompt, *tokens]), [1, 2, 3, 4, 5, 6], length=20)
            continued = int(hand.run([(1, 1, 1)]).tokens[0])
            hand.next_page = 10
            fresh = hand.generate(2, request, 2)
            assert fresh == [tokens[0], continued]
        finally:
            second.close()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("address", "illegal memory access"),
        ("instruction", "illegal instruction"),
        ("trap", "launch failure"),
        ("misaligned", "misaligned address"),
        ("assert", "device-side assert"),
        ("dma", "CUDA error"),
    ],
)
def test_a_provoked_fault_is_the_real_one_and_is_told_as_the_gpus(kind, words):
    script = (
        "import os, sys, torch\n"
        "from holdfast.device.cuda import broken, open_device\n"
        "open_device('cuda:0')\n"
        "from holdfast.device.provoke_cuda import Provoker\n"
        "provoker = Provoker()\n"
        "try:\n"
        "    provoker.fault(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(broken(error), str(error).splitlines()[0], flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("True "), done.stdout + done.stderr[-1500:]
    assert words in done.stdout
