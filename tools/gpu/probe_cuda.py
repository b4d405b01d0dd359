"""What keeper and children of probe_faults.py share: CUDA calls, shared memory, child processes.

Times are `time.monotonic_ns()`, one clock for all processes of a host. A child is a command server
on a SOCK_SEQPACKET pair made before CUDA starts; a second pair is moved to a high file descriptor,
to see whether the descriptor's number decides when the kernel closes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda.bindings import driver

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
MIB = 1 << 20
GRID, BLOCK = 132 * 8, 256  # one grid for every checksum: the sum depends on it
MESSAGE_BYTES = 200_000
FD_TYPE = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
READ_ONLY = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
READ_WRITE = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
MADV_HUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 22, 23, 25
KERNELS = (
    "fill",
    "checksum",
    "write_counters",
    "spin",
    "store_word",
    "fault_misaligned",
    "fault_trap",
    "fault_assert",
    "fault_tensor_map",
)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class CudaError(RuntimeError):
    """A driver call did not succeed; `code` is its CUresult."""

    def __init__(self, code):
        self.code = int(code)
        super().__init__(driver.CUresult(self.code).name)


def now() -> int:
    return time.monotonic_ns()


def ms_since(start_ns: int) -> float:
    return (now() - start_ns) / 1e6


def call(result):
    """The value of a driver call. Raises CudaError unless it succeeded."""
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(result[0])
    return result[1] if len(result) == 2 else result[1:]


class Gpu:
    """The primary context of device 0, the probe's kernels and a stream."""

    def __init__(self, cubin: str):
        call(driver.cuInit(0))
        self.device = call(driver.cuDeviceGet(0))
        self.context = call(driver.cuDevicePrimaryCtxRetain(self.device))
        self.use()
        module = call(driver.cuModuleLoadData(Path(cubin).read_bytes()))
        self.kernels = {k: call(driver.cuModuleGetFunction(module, k.encode())) for k in KERNELS}
        self.stream = self.new_stream()
        self.result = int(call(driver.cuMemAlloc(4096)))

    def use(self) -> None:
        """Make the context current in the calling thread."""
        call(driver.cuCtxSetCurrent(self.context))

    def new_stream(self):
        return call(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def launch(self, name: str, *values: int, grid=1, block=1, stream=None) -> None:
        parameters = (values, (ctypes.c_ulonglong,) * len(values))
        stream = self.stream if stream is None else stream
        kernel = self.kernels[name]
        call(driver.cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, 0, stream, parameters, 0))

    def synchronize(self, stream=None) -> None:
        call(driver.cuStreamSynchronize(self.stream if stream is None else stream))

    def fill(self, address: int, size: int, seed: int) -> None:
        self.launch("fill", address, size // 8, seed, grid=GRID, block=BLOCK)
        self.synchronize()

    def checksum(self, address: int, size: int) -> int:
        call(driver.cuMemsetD8Async(self.result, 0, 8, self.stream))
        self.launch("checksum", address, size // 16, self.result, grid=GRID, block=BLOCK)
        return int.from_bytes(self.read(self.result, 8), "little")

    def read(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        call(driver.cuMemcpyDtoHAsync(ctypes.addressof(buffer), address, size, self.stream))
        self.synchronize()
        return buffer.raw

    def event(self):
        return call(driver.cuEventCreate(0))


# -- VMM: memory made here, mapped anywhere through a file descriptor ------------------------------


def allocation(location: str = "device") -> driver.CUmemAllocationProp:
    """Properties of shareable memory: `device` (GPU 0) or `host_numa` (node 0)."""
    types = driver.CUmemLocationType
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = FD_TYPE
    place = driver.CUmemLocation()
    place.type = (
        types.CU_MEM_LOCATION_TYPE_DEVICE
        if location == "device"
        else types.CU_MEM_LOCATION_TYPE_HOST_NUMA
    )
    place.id = 0
    properties.location = place
    return properties


def vmm_create(size: int, location: str = "device"):
    """A handle to `size` bytes (a multiple of 2 MiB) and a descriptor for other processes."""
    handle = call(driver.cuMemCreate(size, allocation(location), 0))
    return handle, int(call(driver.cuMemExportToShareableHandle(handle, FD_TYPE, 0)))


def vmm_import(fd: int):
    return call(driver.cuMemImportFromShareableHandle(fd, FD_TYPE))


def vmm_map(handle, size: int, access=READ_WRITE, location: str = "device") -> int:
    """Map a handle for device 0, and for the CPU too if it is host memory."""
    address = int(call(driver.cuMemAddressReserve(size, 2 * MIB, 0, 0)))
    call(driver.cuMemMap(address, size, 0, handle, 0))
    types = driver.CUmemLocationType
    places = [types.CU_MEM_LOCATION_TYPE_DEVICE]
    if location == "host_numa":
        places.append(types.CU_MEM_LOCATION_TYPE_HOST_NUMA)
    descriptions = []
    for kind in places:
        description = driver.CUmemAccessDesc()
        place = driver.CUmemLocation()
        place.type, place.id = kind, 0
        description.location = place
        description.flags = access
        descriptions.append(description)
    call(driver.cuMemSetAccess(address, size, descriptions, len(descriptions)))
    return address


def vmm_unmap(address: int, size: int) -> None:
    call(driver.cuMemUnmap(address, size))
    call(driver.cuMemAddressFree(address, size))


def ipc_export(address: int) -> str:
    return bytes(call(driver.cuIpcGetMemHandle(address)).reserved).hex()


def ipc_open(handle: str) -> int:
    shared = driver.CUipcMemHandle()
    shared.reserved = bytes.fromhex(handle)
    return int(call(driver.cuIpcOpenMemHandle(shared, 1)))


# -- host memory -----------------------------------------------------------------------------------


def map_shared(fd: int, size: int) -> int:
    """Map a memfd at a 2 MiB boundary, so that huge pages can be used; returns the address."""
    protection, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED
    reserved = libc.mmap(None, size + 2 * MIB, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = (reserved + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
    mapped = libc.mmap(address, size, protection, shared | 0x10, fd, 0)  # 0x10: MAP_FIXED
    if mapped != address:
        raise OSError(ctypes.get_errno(), "mmap of a memfd failed")
    return address


def advise(address: int, size: int, advice: int) -> int:
    """madvise; returns errno, 0 if it was taken."""
    return 0 if libc.madvise(address, size, advice) == 0 else ctypes.get_errno()


def populate(address: int, size: int, advice: int) -> None:
    """Apply an madvise to a mapping from 8 threads, 256 MiB a call. Raises OSError if one fails."""

    def one(offset):
        return advise(address + offset, min(256 * MIB, size - offset), advice)

    with ThreadPoolExecutor(8) as pool:
        failed = [code for code in pool.map(one, range(0, size, 256 * MIB)) if code]
    if failed:
        raise OSError(failed[0], f"madvise({advice}) failed")


def page_kib_of(address: int) -> dict[str, int]:
    """Size, resident and huge-mapped KiB of the mapping at `address` (/proc/self/smaps)."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            inside = head.startswith(f"{address:x}-")
        elif inside and head in ("Size:", "Rss:", "ShmemPmdMapped:", "KernelPageSize:"):
            found[head[:-1]] = int(line.split()[1])
    return found


# -- children --------------------------------------------------------------------------------------


class Child:
    """A probe_child.py process: commands out, replies in, and the three moments of its death."""

    def __init__(self, cubin: str, name: str = "worker"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.high, high = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [theirs.fileno(), high.fileno()]
        command = [sys.executable, str(HERE / "probe_child.py"), cubin, *map(str, fds)]
        self.process = subprocess.Popen(command, pass_fds=fds)
        theirs.close()
        high.close()
        self.socket, self.name = ours, name
        self.pidfd = os.pidfd_open(self.process.pid)

    def send(self, command: str, fds=(), **fields) -> None:
        message = json.dumps({"command": command, **fields}).encode()
        socket.send_fds(self.socket, [message], list(fds))

    def receive(self, deadline_s: float = 30.0) -> dict:
        """The next reply. Raises TimeoutError, EOFError, or RuntimeError with the child's error."""
        if not select.select([self.socket], [], [], deadline_s)[0]:
            raise TimeoutError(f"{self.name} gave no answer within {deadline_s} s")
        message = self.socket.recv(MESSAGE_BYTES)
        if not message:
            raise EOFError(f"{self.name} is gone")
        reply = json.loads(message)
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply

    def ask(self, command: str, fds=(), deadline_s: float = 30.0, **fields) -> dict:
        self.send(command, fds, **fields)
        return self.receive(deadline_s)

    def kill(self) -> int:
        start = now()
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return start

    def watch(self, start_ns: int, deadline_s: float = 30.0) -> dict[str, float]:
        """Milliseconds from `start_ns` to EOF (low and high descriptor) and to the pidfd."""
        watched = {
            self.socket.fileno(): "eof",
            self.high.fileno(): "eof_high",
            self.pidfd: "pidfd",
        }
        poll, seen = select.poll(), {}
        for fd in watched:
            poll.register(fd, select.POLLIN)
        end = now() + int(deadline_s * 1e9)
        while watched:
            left = (end - now()) / 1e6
            if left <= 0:
                raise TimeoutError(f"{self.name} not gone {deadline_s} s after its kill: {seen}")
            for fd, _ in poll.poll(left):
                at = now()
                if fd == self.socket.fileno() and self.socket.recv(MESSAGE_BYTES):
                    continue  # a word that was still on the way
                seen[watched.pop(fd)] = (at - start_ns) / 1e6
                if fd == self.pidfd:
                    self.fenced_ns = at
                poll.unregister(fd)
        self.close()
        return seen

    def close(self) -> None:
        """End the process if it lives; never waits more than 10 s for it."""
        if self.pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.socket.close()
        self.high.close()
        os.close(self.pidfd)
        self.pidfd = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
