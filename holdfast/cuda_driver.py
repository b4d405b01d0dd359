"""The CUDA driver by ctypes: devices, contexts and memory that outlives the process that uses it.

Owns the few structures and calls of libcuda.so.1 that the keeper, the probe and the worker need; so
the keeper needs neither torch nor a binding package. Every call that fails raises CudaError with
the driver's own name for it. Called by proc (which hands its tests' fake library in) and by
device.provoke_cuda. It must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from holdfast.errors import OptionError, WorkerFault

LIBRARY = "libcuda.so.1"
# Values of cuda.h, unchanged since CUDA 11.
_PINNED = 1
_POSIX_FD = 1
_ON_DEVICE = 1
_MINIMUM_GRANULARITY = 0
READ = 1
READ_WRITE = 3
OUT_OF_MEMORY = 2
_NAME_BYTES = 256


class CudaError(WorkerFault):
    """A call of the driver failed. code: its CUresult; call: the function."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call = call
        self.code = code


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", _AllocationFlags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", c_int))


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """name, and bytes of memory in all."""

    name: str
    total_bytes: int


class Driver:
    """The driver of this machine, initialised. `library`: a stand-in for libcuda (tests)."""

    def __init__(self, library: Any = None) -> None:
        """Raises OptionError("--device") when there is no driver, or it does not start."""
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise OptionError(
                    "--device", f"cuda needs an NVIDIA driver, and {error}; say cpu"
                ) from None
        self._library = library
        try:
            self._call("cuInit", c_uint(0))
        except CudaError as error:
            raise OptionError("--device", f"the CUDA driver does not start: {error}") from None

    def device_count(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def version(self) -> int:
        """Of CUDA that the driver speaks: 13000 is 13.0."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return version.value

    def facts(self, ordinal: int) -> DeviceFacts:
        device = self._device(ordinal)
        name = (c_char * _NAME_BYTES)()
        self._call("cuDeviceGetName", name, c_int(_NAME_BYTES), device)
        total = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(total), device)
        return DeviceFacts(name.value.decode(errors="replace"), total.value)

    # --- contexts: only for those who touch memory, the keeper has none while it waits ---

    def enter(self, ordinal: int) -> None:
        """Make the device's primary context and let this thread use it."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device(ordinal))
        self._call("cuCtxSetCurrent", context)

    def leave(self, ordinal: int) -> None:
        """Give the primary context back; memory that was made by `create` stays."""
        self._call("cuCtxSetCurrent", c_void_p())
        self._call("cuDevicePrimaryCtxRelease_v2", self._device(ordinal))

    def free_bytes(self) -> int:
        """Of the current context's device."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    # --- memory: made here, mapped anywhere through a file descriptor ---

    def granularity(self, ordinal: int) -> int:
        """Sizes of `create` are multiples of it."""
        found = c_size_t()
        properties = _properties(ordinal)
        kind = c_int(_MINIMUM_GRANULARITY)
        self._call("cuMemGetAllocationGranularity", byref(found), byref(properties), kind)
        return found.value

    def create(self, size: int, ordinal: int) -> int:
        """A handle to `size` bytes on the device, whose contents are anything."""
        handle = c_ulonglong()
        properties = _properties(ordinal)
        self._call("cuMemCreate", byref(handle), c_size_t(size), byref(properties), c_ulonglong(0))
        return handle.value

    def release(self, handle: int) -> None:
        """The memory is freed once no handle, descriptor or mapping is left anywhere."""
        self._call("cuMemRelease", c_ulonglong(handle))

    def export(self, handle: int) -> int:
        """A new file descriptor of the memory, which keeps it alive in any process."""
        fd = c_int()
        kind = c_int(_POSIX_FD)
        self._call(
            "cuMemExportToShareableHandle", byref(fd), c_ulonglong(handle), kind, c_ulonglong(0)
        )
        return fd.value

    def open(self, fd: int) -> int:
        """A handle to the memory behind a descriptor, which stays the caller's."""
        handle = c_ulonglong()
        call = "cuMemImportFromShareableHandle"
        self._call(call, byref(handle), c_void_p(fd), c_int(_POSIX_FD))
        return handle.value

    def reserve(self, size: int, align: int) -> int:
        """An address range of the current context, not yet mapped."""
        address = c_ulonglong()
        self._call(
            "cuMemAddressReserve",
            byref(address),
            c_size_t(size),
            c_size_t(align),
            c_ulonglong(0),
            c_ulonglong(0),
        )
        return address.value

    def map(self, address: int, size: int, handle: int) -> None:
        """Put a handle's memory at a reserved address; nobody may touch it before `allow`."""
        zero = c_size_t(0), c_ulonglong(handle), c_ulonglong(0)
        self._call("cuMemMap", c_ulonglong(address), c_size_t(size), *zero)

    def allow(self, address: int, size: int, ordinal: int, access: int) -> None:
        """access: READ | READ_WRITE of the device's kernels and copies, kept by the hardware."""
        description = _Access(_Location(_ON_DEVICE, ordinal), access)
        where = c_ulonglong(address), c_size_t(size)
        self._call("cuMemSetAccess", *where, byref(description), c_size_t(1))

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", c_ulonglong(address), c_size_t(size))

    def unreserve(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", c_ulonglong(address), c_size_t(size))

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero, and wait until they are."""
        self._call("cuMemsetD8_v2", c_ulonglong(address), ctypes.c_ubyte(0), c_size_t(size))
        self._call("cuCtxSynchronize")

    def copy_in(self, address: int, data: bytes) -> None:
        self._call("cuMemcpyHtoD_v2", c_ulonglong(address), c_char_p(data), c_size_t(len(data)))

    def copy_out(self, address: int, size: int) -> bytes:
        buffer = (c_char * size)()
        self._call("cuMemcpyDtoH_v2", buffer, c_ulonglong(address), c_size_t(size))
        return buffer.raw

    def _device(self, ordinal: int) -> c_int:
        device = c_int()
        self._call("cuDeviceGet", byref(device), c_int(ordinal))
        return device

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise CudaError(name, code, self._name(code))

    def _name(self, code: int) -> str:
        text = c_char_p()
        known = self._library.cuGetErrorName(c_int(code), byref(text)) == 0
        return text.value.decode() if known and text.value else "an unknown error"


def _properties(ordinal: int) -> _AllocationProperties:
    return _AllocationProperties(
        type=_PINNED, handle_types=_POSIX_FD, location=_Location(_ON_DEVICE, ordinal)
    )


def parse_device(text: str) -> tuple[str, int]:
    """'cpu' -> ('cpu', 0), 'cuda:1' -> ('cuda', 1). Raises OptionError("--device")."""
    kind, colon, number = text.partition(":")
    if kind == "cpu" and not colon:
        return "cpu", 0
    if kind == "cuda" and (not colon or (number.isascii() and number.isdecimal())):
        return "cuda", int(number or 0)
    raise OptionError("--device", f"auto, cpu, cuda or cuda:N, got {text!r}")
