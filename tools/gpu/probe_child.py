"""A child of probe_faults.py: worker, standby or third process, as the keeper's commands say.

    probe_child.py CUBIN SOCKET_FD HIGH_SOCKET_FD

One JSON message a command, one a reply: the fields that the command's method returns, or `error`.
It dies with its parent, and of itself after LIFE_S seconds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time

import probe_cuda as cuda
from cuda.bindings import driver
from probe_cuda import MIB, CudaError, call, ms_since, now
from probe_load import Load

LIFE_S = 180
HIGH_FD = 900
WORD_S = 3
COPY_BYTES, COPY_SOURCES = 8 * MIB, 64


class Commands(Load):
    """Every public method is a command; a method's keywords are the message's fields."""

    def __init__(self, cubin: str):
        self.cubin = cubin
        self.memory: dict[str, tuple[str, int, int]] = {}  # name -> (how, address, bytes)
        self.kept: list[object] = []  # buffers and threads of work that never ends
        self.fds: list[int] = []

    def address(self, name: str) -> int:
        return self.memory[name][1]

    # -- context and mappings --

    def context(self):
        start = now()
        self.gpu = cuda.Gpu(self.cubin)
        return {"ms": ms_since(start)}

    def map_vmm(self, name, size, read_only=False, location="device"):
        start = now()
        handle = cuda.vmm_import(self.fds[0])
        access = cuda.READ_ONLY if read_only else cuda.READ_WRITE
        address = cuda.vmm_map(handle, size, access, location)
        self.memory[name] = ("vmm", address, size)
        return {"ms": ms_since(start)}

    def map_ipc(self, name, size, handle):
        start = now()
        self.memory[name] = ("ipc", cuda.ipc_open(handle), size)
        return {"ms": ms_since(start)}

    def map_memfd(self, name, size, huge=False, populate=True):
        start = now()
        address = cuda.map_shared(os.dup(self.fds[0]), size)
        if huge:
            cuda.advise(address, size, cuda.MADV_HUGEPAGE)
        if populate:
            cuda.populate(address, size, cuda.MADV_POPULATE_WRITE)
        self.memory[name] = ("memfd", address, size)
        return {"ms": ms_since(start), "pages": cuda.page_kib_of(address)}

    def unmap(self, name):
        how, address, size = self.memory.pop(name)
        if how == "ipc":
            call(driver.cuIpcCloseMemHandle(address))
        elif how == "vmm":
            cuda.vmm_unmap(address, size)
        else:
            cuda.libc.munmap(address, size)
        return {}

    def map_anonymous(self, name, size):
        """Private memory in huge pages, where shared memory has none."""
        start = now()
        mapping = mmap.mmap(-1, size + 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.kept.append(mapping)
        inside = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        address = (inside + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        cuda.advise(address, size, cuda.MADV_HUGEPAGE)
        cuda.populate(address, size, cuda.MADV_POPULATE_WRITE)
        self.memory[name] = ("anonymous", address, size)
        return {"ms": ms_since(start)}

    def register(self, name, size, chunk=0, pause_s=0.0):
        """Pin a host mapping, whole or in chunks; `ms` is wall time, pauses included."""
        begin, spent = now(), []
        for offset in range(0, size, chunk or size):
            start = now()
            length = min(chunk or size, size - offset)
            call(driver.cuMemHostRegister(self.address(name) + offset, length, 0))
            spent.append(ms_since(start))
            time.sleep(pause_s)
        return {"ms": ms_since(begin), "driver_ms": sum(spent), "longest_ms": max(spent)}

    def drop_page_table(self, name):
        """Forget this process's own page table entries; the pages stay pinned and shared."""
        _, address, size = self.memory[name]
        return {"errno": cuda.advise(address, size, 4)}  # MADV_DONTNEED

    def unregister(self, name, size, chunk=0):
        start = now()
        for offset in range(0, size, chunk or size):
            call(driver.cuMemHostUnregister(self.address(name) + offset))
        return {"ms": ms_since(start)}

    # -- use of memory --

    def checksum(self, name, offset, size):
        start = now()
        total = self.gpu.checksum(self.address(name) + offset, size)
        return {"sum": total, "ms": ms_since(start)}

    def checksum_loop(self, name, offset, size, seconds):
        """Sum again and again; a sample is (start ns, ms). An error of the context ends it."""
        samples, sums, end, error = [], set(), now() + int(seconds * 1e9), None
        while now() < end and len(samples) < 4000:
            start = now()
            try:
                sums.add(self.gpu.checksum(self.address(name) + offset, size))
            except CudaError as caught:
                error = str(caught)
                break
            samples.append((start, round(ms_since(start), 3)))
        return {"samples": samples, "sums": sorted(sums), "failed": error}

    def store(self, name, offset, value):
        start = now()
        self.gpu.launch("store_word", self.address(name) + offset, value)
        self.gpu.synchronize()
        return {"ms": ms_since(start)}

    def fill(self, name, offset, size, seed):
        self.gpu.fill(self.address(name) + offset, size, seed)
        return {}

    def bandwidth(self, name, size, repeats):
        """GB/s of copies between a host mapping and the device, one large copy a sample."""
        device = int(call(driver.cuMemAlloc(size)))
        host, stream, rates = self.address(name), self.gpu.stream, {"h2d": [], "d2h": []}
        for direction, copy in (
            ("h2d", driver.cuMemcpyHtoDAsync),
            ("d2h", driver.cuMemcpyDtoHAsync),
        ):
            pair = (device, host) if direction == "h2d" else (host, device)
            for _ in range(repeats + 1):
                start = now()
                call(copy(*pair, size, stream))
                self.gpu.synchronize()
                rates[direction].append(size / (now() - start))
        call(driver.cuMemFree(device))
        return {direction: samples[1:] for direction, samples in rates.items()}

    def pinned(self, name, size):
        """Memory of cudaHostAlloc, to compare with."""
        start = now()
        self.memory[name] = ("pinned", int(call(driver.cuMemHostAlloc(size, 0))), size)
        return {"ms": ms_since(start)}

    def cpu_touch(self, name, size):
        """GB/s of a memset through a host mapping, and whether the bytes came back."""
        start = now()
        ctypes.memset(self.address(name), 0x5A, size)
        rate = size / (now() - start)
        last = ctypes.string_at(self.address(name) + size - 64, 64)
        return {"gbps": rate, "right": last == b"\x5a" * 64}

    # -- writers that do not end --

    def write_counters(self, name, offset, seconds):
        """One kernel that writes a counter a block for `seconds`."""
        stream = self.gpu.new_stream()
        ns = int(seconds * 1e9)
        self.gpu.launch(
            "write_counters", self.address(name) + offset, ns, grid=64, block=32, stream=stream
        )
        return {}

    def kernel_queue(self, name, offset):
        """A queue of kernels as long as the driver takes, each writing for 0.2 ms."""
        target = self.address(name) + offset

        def enqueue(stream):
            self.gpu.launch("write_counters", target, 200_000, grid=64, block=32, stream=stream)

        return self.keep_enqueuing(enqueue)

    def copy_queue(self, name, offset, direction):
        """A queue of 8 MiB copies as long as the driver takes, each with other bytes."""
        target, size = self.address(name) + offset, COPY_BYTES * COPY_SOURCES
        if direction == "h2d":
            source, copy = int(call(driver.cuMemHostAlloc(size, 0))), driver.cuMemcpyHtoDAsync
        else:
            source, copy = int(call(driver.cuMemAlloc(size))), driver.cuMemcpyDtoHAsync
        for i in range(COPY_SOURCES):
            if direction == "h2d":
                ctypes.memset(source + i * COPY_BYTES, i + 1, COPY_BYTES)
            else:
                call(driver.cuMemsetD8(source + i * COPY_BYTES, i + 1, COPY_BYTES))
        turn = iter(range(1 << 62))

        def enqueue(stream):
            at = source + next(turn) % COPY_SOURCES * COPY_BYTES
            call(copy(target, at, COPY_BYTES, stream))

        return self.keep_enqueuing(enqueue)

    def keep_enqueuing(self, enqueue):
        stream = self.gpu.new_stream()
        queued = [0]

        def run():
            self.gpu.use()
            try:
                while True:
                    enqueue(stream)
                    queued[0] += 1
            except CudaError:
                pass  # the fault under test reached this stream too

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.kept.append(thread)
        time.sleep(0.1)
        return {"queued": queued[0]}

    # -- faults --

    def fault(self, kind, name=None, then="stay"):
        """Break in one way; the reply is the worker's own word, with the times on both sides.

        A status of NOT_READY means that the driver reported nothing for WORD_S seconds; `refused`
        names the driver's error if the work was not even queued.
        """
        enqueue = self.prepared_fault(kind, name)
        stream, event = self.gpu.new_stream(), self.gpu.event()
        launched = now()
        try:
            enqueue(stream)
            call(driver.cuEventRecord(event, stream))
        except CudaError as error:
            return {"refused": str(error)}
        status = driver.CUresult.CUDA_ERROR_NOT_READY
        while status == driver.CUresult.CUDA_ERROR_NOT_READY and ms_since(launched) < WORD_S * 1000:
            status = driver.cuEventQuery(event)[0]
        if then == "exit":
            os._exit(70)
        return {"launched_ns": launched, "error_ns": now(), "status": driver.CUresult(status).name}

    def prepared_fault(self, kind, name):
        scratch = int(call(driver.cuMemAlloc(2 * MIB)))
        if kind in ("misaligned", "trap", "assert", "tensor_map"):
            call(driver.cuMemsetD8(scratch, 0, 2 * MIB))
            return lambda stream: self.gpu.launch("fault_" + kind, scratch, 0, stream=stream)
        if kind == "address":
            nowhere = int(call(driver.cuMemAddressReserve(2 * MIB, 2 * MIB, 0, 0)))
            return lambda stream: self.gpu.launch("store_word", nowhere, 7, stream=stream)
        if kind == "store_read_only":
            target = self.address(name)
            return lambda stream: self.gpu.launch("store_word", target, 7, stream=stream)
        host = int(call(driver.cuMemHostAlloc(2 * MIB, 0)))
        if kind == "dma_read_only":
            target = self.address(name)
            return lambda stream: call(driver.cuMemcpyHtoDAsync(target, host, 2 * MIB, stream))
        if kind == "dma_unmapped":  # a graph that outlives the memory it was captured for
            handle, _ = cuda.vmm_create(2 * MIB)
            target = cuda.vmm_map(handle, 2 * MIB)
            stream = self.gpu.new_stream()
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            call(driver.cuStreamBeginCapture(stream, mode))
            call(driver.cuMemcpyHtoDAsync(target, host, 2 * MIB, stream))
            graph = call(driver.cuStreamEndCapture(stream))
            replay = call(driver.cuGraphInstantiate(graph, 0))
            call(driver.cuGraphLaunch(replay, stream))
            self.gpu.synchronize(stream)
            call(driver.cuMemUnmap(target, 2 * MIB))
            return lambda stream: call(driver.cuGraphLaunch(replay, stream))
        raise ValueError(f"unknown fault {kind!r}")


def main() -> None:
    cuda.libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.alarm(LIFE_S)
    keeper = socket.socket(fileno=int(sys.argv[2]))
    os.dup2(int(sys.argv[3]), HIGH_FD)
    os.close(int(sys.argv[3]))
    commands = Commands(sys.argv[1])
    while True:
        message, commands.fds, _, _ = socket.recv_fds(keeper, cuda.MESSAGE_BYTES, 4)
        if not message:
            return
        fields = json.loads(message)
        try:
            reply = getattr(commands, fields.pop("command"))(**fields)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        for fd in commands.fds:
            os.close(fd)
        keeper.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
