"""Part `loop`: a serving loop beside a standby that imports, captures and pins."""

from __future__ import annotations

import os
import tempfile
import time

import numpy as np
import probe_cuda as cuda
from probe_cuda import GIB, MIB, CudaError, now
from probe_keeper import Keeper, summary

LOOP_GRAPHS = 35


def loop(keeper: Keeper) -> None:
    size = 16 * GIB
    fd = os.memfd_create("arena")
    os.ftruncate(fd, size)
    address = cuda.map_shared(fd, size)
    cuda.populate(address, size, cuda.MADV_POPULATE_WRITE)
    try:
        numa, numa_fd = cuda.vmm_create(size, "host_numa")
    except CudaError as error:
        numa = None
        keeper.record("HOST_NUMA for the loop", f"failed: {error}", False)
    phases: list[tuple[str, int, int, dict]] = []

    def phase(name, act, /, *arguments, **fields):
        start = now()
        reply = act(*arguments, **fields) or {}
        phases.append((name, start, now(), reply))
        time.sleep(0.2)

    serving = keeper.child("loop")
    try:
        serving.ask("loop_start", deadline_s=30)
        time.sleep(0.5)
        phase("idle", time.sleep, 4.0)
        last = (now(), now())
        for turn in ("first", "again"):
            begun = now()
            if keeper.left() < 30:
                break
            with keeper.child("standby", context=False) as standby:
                ask = standby.ask
                phase(f"import torch ({turn})", ask, "torch_import", deadline_s=60)
                phase(f"context ({turn})", ask, "torch_context", deadline_s=30)
                phase(f"first kernels, cuBLAS ({turn})", ask, "torch_warm", deadline_s=30)
                many = {"graphs": LOOP_GRAPHS}
                if turn == "first":
                    phase(f"run and capture {LOOP_GRAPHS} graphs", ask, "torch_capture", **many)
                    phase("replay them", ask, "torch_replay")
                else:
                    pace = {"layers_at_once": 4, "pause_s": 0.01}
                    phase("run 4 layers, pause 10 ms", ask, "torch_eager", **many, **pace)
                    quiet = {**many, "eager": False}
                    phase(f"capture {LOOP_GRAPHS} graphs, run none", ask, "torch_capture", **quiet)
                    phase("replay them, pauses of 50 ms", ask, "torch_replay", pause_s=0.05)
                if turn == "first":
                    memfd = {"name": "m", "size": size}
                    phase("map 16 GiB memfd", ask, "map_memfd", [fd], **memfd)
                    phase("pin 16 GiB at once", ask, "register", **memfd, deadline_s=40)
                    phase("unpin at once", ask, "unregister", **memfd, deadline_s=40)
                    for chunk, pause_s in ((256 * MIB, 0.05),):
                        what = f"pin 16 GiB, {chunk // MIB} MiB and {pause_s * 1000:.0f} ms pauses"
                        pin = {**memfd, "chunk": chunk, "pause_s": pause_s, "deadline_s": 50}
                        phase(what, ask, "register", **pin)
                    if numa is not None:
                        place = {"name": "n", "size": size, "location": "host_numa"}
                        phase("map 16 GiB of HOST_NUMA", ask, "map_vmm", [numa_fd], **place)
                        place = {"name": "g", "size": size}
                        phase("the same, GPU alone", ask, "map_vmm", [numa_fd], **place)
                phase(f"kill the standby ({turn})", lambda: standby.watch(standby.kill()))
            last = (begun, now())
        phase("idle again", time.sleep, 2.0)
    finally:
        with tempfile.TemporaryDirectory() as folder, serving:
            path = f"{folder}/steps.npy"
            serving.ask("loop_stop", path=path)
            steps = np.load(path)
    began, took = steps[:, 0], steps[:, 1] / 1e6
    idle = None
    phases.append(("the whole last standby", *last, {}))
    for name, start, end, reply in phases:
        inside = took[(began + steps[:, 1] >= start) & (began <= end)]
        found = summary(inside)
        idle = idle or found
        p50, p99, most = (found.get(key, 0.0) for key in ("p50", "p99", "max"))
        slow = 100 * float((inside > 1.2 * idle["p50"]).mean()) if len(inside) else 0.0
        driver_ms = f", {reply['driver_ms']:.0f} ms in the driver" if "driver_ms" in reply else ""
        keeper.record(
            f"5 ms loop: {name}",
            f"{slow:.1f} % over 1.2x; p50 {p50:.2f} p99 {p99:.2f} max {most:.2f} ms "
            f"(x{p99 / idle['p99']:.2f}), {found['n']} steps in {(end - start) / 1e9:.1f} s"
            f"{driver_ms}",
            step_ms=found,
            percent_over_1_2x=slow,
            seconds=(end - start) / 1e9,
        )
    keeper.record("5 ms loop: all steps", f"{len(took)} steps", step_ms=summary(took))
