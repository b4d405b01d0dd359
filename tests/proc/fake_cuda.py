"""A libcuda of Python objects: memory that is shared by descriptors, and calls that can fail.

Its descriptors are real memfds, so that closing them means something; its addresses are numbers.
`fail` maps the name of a call to the CUresult it shall return.
"""

from __future__ import annotations

import os
from ctypes import c_char_p, string_at
from dataclasses import dataclass, field
from typing import Any

OUT_OF_MEMORY = 2
INVALID_CONTEXT = 201
NOT_SUPPORTED = 801
_NAMES = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    801: b"CUDA_ERROR_NOT_SUPPORTED",
}
GRANULE = 2 << 20


@dataclass
class Library:
    """One machine's driver as one process sees it. memory: bytes of every allocation by number."""

    devices: int = 1
    total_bytes: int = 1 << 30
    fail: dict[str, int] = field(default_factory=dict)
    memory: dict[int, bytearray] = field(default_factory=dict)
    handles: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    contexts: int = 0
    current: bool = False
    _next: int = 1

    def __getattr__(self, name: str) -> Any:
        call = object.__getattribute__(self, "_" + name)

        def checked(*arguments: Any) -> int:
            return self.fail.get(name) or call(*arguments) or 0

        return checked

    @property
    def taken_bytes(self) -> int:
        held = set(self.handles.values()) | {number for number, _ in self.mapped.values()}
        return sum(len(self.memory[number]) for number in held)

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _cuGetErrorName(self, code, text):
        text._obj.value = c_char_p(_NAMES.get(code.value, b"CUDA_ERROR_UNKNOWN")).value

    def _cuInit(self, flags):
        pass

    def _cuDeviceGetCount(self, count):
        count._obj.value = self.devices

    def _cuDriverGetVersion(self, version):
        version._obj.value = 13000

    def _cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal.value

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"Fake GPU"

    def _cuDeviceTotalMem_v2(self, total, device):
        total._obj.value = self.total_bytes

    def _cuDevicePrimaryCtxRetain(self, context, device):
        self.contexts += 1
        context._obj.value = 77

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1

    def _cuCtxSetCurrent(self, context):
        self.current = bool(context.value)

    def _cuCtxSynchronize(self):
        pass

    def _cuMemGetInfo_v2(self, free, total):
        if not self.current:
            return INVALID_CONTEXT
        free._obj.value = self.total_bytes - self.taken_bytes

    def _cuMemGetAllocationGranularity(self, found, properties, kind):
        found._obj.value = GRANULE

    def _cuMemCreate(self, handle, size, properties, flags):
        asked = properties._obj
        assert (asked.type, asked.handle_types, asked.location.type) == (1, 1, 1)
        assert size.value % GRANULE == 0
        if self.taken_bytes + size.value > self.total_bytes:
            return OUT_OF_MEMORY
        number = self._number()
        self.memory[number] = bytearray(b"\xaa" * size.value)  # What was there before.
        handle._obj.value = self._number()
        self.handles[handle._obj.value] = number

    def _cuMemRelease(self, handle):
        del self.handles[handle.value]

    def _cuMemExportToShareableHandle(self, fd, handle, kind, flags):
        fd._obj.value = os.memfd_create(str(self.handles[handle.value]))

    def _cuMemImportFromShareableHandle(self, handle, fd, kind):
        name = os.readlink(f"/proc/self/fd/{fd.value}")
        handle._obj.value = self._number()
        self.handles[handle._obj.value] = int(name.split(":")[1].split()[0])

    def _cuMemAddressReserve(self, address, size, align, hint, flags):
        if not self.current:
            return INVALID_CONTEXT
        address._obj.value = self._number() * align.value
        self.reserved[address._obj.value] = size.value

    def _cuMemMap(self, address, size, offset, handle, flags):
        assert self.reserved[address.value] == size.value
        assert address.value not in self.mapped
        number = self.handles[handle.value]
        assert len(self.memory[number]) == size.value
        self.mapped[address.value] = (number, 0)

    def _cuMemSetAccess(self, address, size, access, count):
        number, _ = self.mapped[address.value]
        self.mapped[address.value] = (number, access._obj.flags)

    def _cuMemUnmap(self, address, size):
        del self.mapped[address.value]

    def _cuMemAddressFree(self, address, size):
        assert address.value not in self.mapped
        assert self.reserved.pop(address.value) == size.value

    def _cuMemsetD8_v2(self, address, value, size):
        self._written(address.value)[: size.value] = bytes([value.value]) * size.value

    def _cuMemcpyHtoD_v2(self, address, data, size):
        self._written(address.value)[: size.value] = string_at(data, size.value)

    def _cuMemcpyDtoH_v2(self, buffer, address, size):
        number, access = self.mapped[address.value]
        assert access & 1
        buffer.raw = bytes(self.memory[number][: size.value])

    def _written(self, address: int) -> bytearray:
        number, access = self.mapped[address]
        assert access == 3, "a store into memory that is mapped read-only"
        return self.memory[number]
