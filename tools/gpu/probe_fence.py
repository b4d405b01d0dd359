"""Parts `writers` and `verify`: what a dying process still writes, and reading beside it."""

from __future__ import annotations

import ctypes
import os
import threading
import time

import numpy as np
import probe_cuda as cuda
from cuda.bindings import driver
from probe_cuda import GIB, MIB, CudaError, call, now
from probe_keeper import Keeper, span, summary


class Sampler:
    """Reads memory over and over in a thread and notes when it changed."""

    def __init__(self, read, use_context):
        self.read, self.use_context = read, use_context
        self.starts, self.changed, self.error = [], [], None
        self.running = True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        self.use_context()
        before = None
        try:
            while self.running:
                start = now()
                value = self.read()
                self.starts.append(start)
                self.changed.append(value != before)
                before = value
        except CudaError as error:
            self.error = str(error)

    def stop(self) -> None:
        self.running = False
        self.thread.join(10)


def writers(keeper: Keeper) -> None:
    size, large, gpu = 64 * MIB, 16 * GIB, keeper.gpu
    plain = int(call(driver.cuMemAlloc(size)))
    handle, fd = cuda.vmm_create(size)
    shared = cuda.vmm_map(handle, size)
    memfd = os.memfd_create("probe")
    os.ftruncate(memfd, large)
    host = cuda.map_shared(memfd, large)
    cuda.populate(host, large, cuda.MADV_POPULATE_WRITE)
    stream, buffer = gpu.new_stream(), int(call(driver.cuMemHostAlloc(16384, 0)))
    numa, numa_fd = cuda.vmm_create(large, "host_numa")
    memories = {
        "ipc": plain,
        "vmm": shared,
        "memfd": host,
        "memfd of 16 GiB": host,
        "HOST_NUMA of 16 GiB": cuda.vmm_map(numa, large, location="host_numa"),
    }

    def read_device(address):
        call(driver.cuMemcpyDtoHAsync(buffer, address, 8192, stream))
        call(driver.cuMemcpyDtoHAsync(buffer + 8192, address + 8 * MIB - 64, 64, stream))
        gpu.synchronize(stream)
        return ctypes.string_at(buffer, 8192 + 64)

    def read_host(address):
        return ctypes.string_at(address, 64) + ctypes.string_at(address + 8 * MIB - 64, 64)

    def run(memory: str, writer: str, ending: str) -> dict:
        with keeper.child() as child:
            if memory == "ipc":
                child.ask("map_ipc", name="m", size=size, handle=cuda.ipc_export(plain))
            elif memory == "vmm":
                child.ask("map_vmm", [fd], name="m", size=size)
            elif memory == "HOST_NUMA of 16 GiB":  # the dying process maps it for the GPU alone
                child.ask("map_vmm", [numa_fd], name="m", size=large)
            else:
                length = size if memory == "memfd" else large
                child.ask("map_memfd", [memfd], name="m", size=length)
                child.ask("register", name="m", size=length)
            if writer == "kernel":
                child.ask("write_counters", name="m", offset=0, seconds=20)
            elif writer == "kernel_queue":
                child.ask("kernel_queue", name="m", offset=0)
            else:
                child.ask("copy_queue", name="m", offset=0, direction=writer)
            on_host, address = memory not in ("ipc", "vmm"), memories[memory]
            read = read_host if on_host else read_device
            sampler = Sampler(lambda: read(address), gpu.use)
            try:
                time.sleep(0.15)
                word = None
                if ending == "fault":
                    word = child.ask("fault", kind="address")
                    time.sleep(0.1)  # does the fault alone stop the writer?
                killed = child.kill()
                times = child.watch(killed, 20)
                time.sleep(0.5)
            finally:
                sampler.stop()
            starts, changed = np.array(sampler.starts), np.array(sampler.changed)
            after = np.flatnonzero(starts >= child.fenced_ns)
            last = int(starts[np.flatnonzero(changed)[-1]])
            # The first read after the fence may differ from the last before it: that is not late.
            late = int(changed[after[1:]].sum())
            # The keeper's own bytes, written after the fence, must stay.
            if on_host:
                ctypes.memset(address, 0xA5, size)
            else:
                gpu.fill(address, size, 99)
            wanted = read(address)
            time.sleep(0.1)
            kept = read(address) == wanted
        error = None if word is None else word["error_ns"]
        return {
            "before": int((starts < killed).sum()),
            "changes_before": int(changed[starts < killed].sum()),
            "after": len(after),
            "late": late,
            "kept": kept,
            "sampler_error": sampler.error,
            "last_change_before_pidfd_ms": (child.fenced_ns - last) / 1e6,
            "last_change_after_kill_ms": (last - killed) / 1e6,
            "last_change_after_word_ms": None if error is None else (last - error) / 1e6,
            **times,
        }

    def series(memory, writer, ending, repeats):
        runs = [run(memory, writer, ending) for _ in range(repeats)]
        # A writer that never wrote would prove nothing.
        wrote = all(r["changes_before"] > (10 if ending == "kill" else 2) for r in runs)
        stopped = all(r["late"] == 0 and r["kept"] and not r["sampler_error"] for r in runs)
        last = [r["last_change_before_pidfd_ms"] for r in runs]
        text = (
            f"late {sum(r['late'] for r in runs)} of {sum(r['after'] for r in runs)} reads; "
            f"last change {span(last)} ms before pidfd; eof {span([r['eof'] for r in runs])}, "
            f"pidfd {span([r['pidfd'] for r in runs])} ms after the kill"
        )
        if ending == "fault":
            after_word = [r["last_change_after_word_ms"] for r in runs]
            text += f"; last change {span(after_word)} ms after word"
        keeper.record(
            f"{writer} -> {memory}, {ending}" + ("" if wrote else " (WRITER DID NOT WRITE)"),
            text,
            wrote and stopped,
            runs=runs,
            pidfd_ms=summary(r["pidfd"] for r in runs),
        )

    for memory in ("ipc", "vmm"):
        for writer in ("kernel", "kernel_queue", "h2d"):
            for ending, repeats in (("kill", 3), ("fault", 2 if memory == "vmm" else 1)):
                keeper.attempt(
                    f"{writer} {memory} {ending}", series, memory, writer, ending, repeats
                )
    for memory in ("memfd", "memfd of 16 GiB", "HOST_NUMA of 16 GiB"):
        for ending, repeats in (("kill", 3), ("fault", 2)):
            keeper.attempt(f"d2h {memory} {ending}", series, memory, "d2h", ending, repeats)


def verify(keeper: Keeper) -> None:
    size, gpu = 8 * GIB, keeper.gpu
    handle, fd = cuda.vmm_create(size)
    address = cuda.vmm_map(handle, size)
    gpu.fill(address, size, 5)
    sealed = size - 2 * MIB  # the rest is where the dying process writes
    wanted = gpu.checksum(address, sealed)
    standby = keeper.child("standby")
    standby.ask("map_vmm", [fd], name="m", size=size)

    def quiet():
        reply = standby.ask("checksum_loop", name="m", offset=0, size=sealed, seconds=0.5)
        rates = [sealed / took / 1e9 for _, took in reply["samples"][3:]]
        keeper.record(
            "verification rate, nothing else running",
            f"{np.median(rates):.2f} TB/s (8 GiB a sum, host clock)",
            reply["sums"] == [wanted],
            tbps=summary(rates),
        )

    def run(ending, delay_s):
        watched_s = {"trap": 3.2, "assert": 4.0}.get(ending, 1.3)
        with keeper.child() as worker:
            worker.ask("map_vmm", [fd], name="m", size=size)
            worker.ask("write_counters", name="m", offset=sealed, seconds=20)
            standby.send("checksum_loop", name="m", offset=0, size=sealed, seconds=watched_s)
            time.sleep(0.4)
            start = now()
            word = None
            if ending != "kill":
                word = worker.ask("fault", kind=ending)
                time.sleep(delay_s)
            killed = worker.kill()
            times = worker.watch(killed, 20)
            reply = standby.receive(20)
        dying = [t for at, t in reply["samples"] if start <= at + t * 1e6 and at < worker.fenced_ns]
        before = [t for at, t in reply["samples"] if at + t * 1e6 < start]
        after = [t for at, t in reply["samples"] if at >= worker.fenced_ns]
        return {
            "right": reply["sums"] == [wanted],
            "failed": reply["failed"],
            "status": None if word is None else word["status"],
            "word_ms": None if word is None else (word["error_ns"] - word["launched_ns"]) / 1e6,
            "sums_before_fence": len(dying),
            "sum_ms_before": summary(before),
            "sum_ms_dying": summary(dying),
            "sum_ms_after": summary(after),
            **times,
        }

    def median(runs, when):
        return runs[0][f"sum_ms_{when}"].get("p50")

    def word_of(runs):
        if runs[0]["status"] == "CUDA_ERROR_NOT_READY":
            return f"NO WORD in {span([r['word_ms'] for r in runs], 0)} ms"
        return f"fault->word {span([r['word_ms'] for r in runs])} ms"

    def series(ending, delay_s):
        runs = [run(ending, delay_s) for _ in range(2)]
        dying = [r["sum_ms_dying"].get("max", 0) for r in runs]
        keeper.record(
            f"standby sums while the worker dies ({ending}"
            + (f", killed {delay_s * 1000:.0f} ms after its word)" if delay_s else ")"),
            f"{word_of(runs)}; "
            f"{sum(r['sums_before_fence'] for r in runs)} sums between fault and fence, longest "
            f"{max(dying):.1f} ms; 8 GiB beside the writer {median(runs, 'before')} ms, "
            f"after the fence {median(runs, 'after')} ms; "
            f"pidfd {span([r['pidfd'] for r in runs])} ms",
            all(r["right"] and r["failed"] is None for r in runs),
            runs=runs,
        )

    with standby:
        keeper.attempt("quiet", quiet)
        for ending, delay_s in (
            ("kill", 0),
            ("address", 0),
            ("address", 0.3),
            ("trap", 0),
            ("tensor_map", 0),
            ("assert", 0),
        ):
            keeper.attempt(f"verify {ending}", series, ending, delay_s)
        keeper.attempt("quiet", quiet)
