"""GPU memory that outlives a worker: made by the keeper, mapped by whoever holds its descriptor.

Owns allocations and mappings of CUDA's virtual memory calls; the bytes are freed by the driver once
the last holder is gone, as with a memfd. Invariants: memory is zero when it is handed over; a
mapping that is read-only is so in hardware (a store through it is this process's own illegal
address, docs/gpu-faults.md); nobody who waits holds a context. Used by the keeper, the worker and
the probe. It must not know what lies in the memory.
"""

from __future__ import annotations

import contextlib
import os

from holdfast.cuda_driver import OUT_OF_MEMORY, READ, READ_WRITE, CudaError, Driver
from holdfast.errors import OptionError, require
from holdfast.sizing import show_bytes

# What the driver asks of sizes and addresses on every GPU so far; `slab_bytes` rounds to it where
# no driver is at hand, and `make` checks it against the driver's own.
GRANULE_BYTES = 2 << 20
_PATTERN = bytes(range(256))


def slab_bytes(size: int) -> int:
    """`size` rounded up to what can be allocated."""
    return max(1, -(-size // GRANULE_BYTES)) * GRANULE_BYTES


class Mapping:
    """Memory behind a descriptor, mapped into the current context.

    address: of the first byte; size: bytes asked for. The mapping lasts until `close`.
    """

    def __init__(self, driver: Driver, fd: int, size: int, ordinal: int, *, write: bool) -> None:
        """Raises CudaError when the memory cannot be mapped; the descriptor stays the caller's."""
        self.size = size
        self._driver = driver
        self._ordinal = ordinal
        self._bytes = slab_bytes(size)
        with contextlib.ExitStack() as undo:
            self._handle = driver.open(fd)
            undo.callback(driver.release, self._handle)
            self.address = driver.reserve(self._bytes, GRANULE_BYTES)
            undo.callback(driver.unreserve, self.address, self._bytes)
            self._map(READ_WRITE if write else READ)
            undo.pop_all()

    def protect(self) -> None:
        """Read-only from here on, at the same address. Nothing may be running on the memory."""
        self._driver.unmap(self.address, self._bytes)
        self._map(READ)

    def close(self) -> None:
        self._driver.unmap(self.address, self._bytes)
        self._driver.unreserve(self.address, self._bytes)
        self._driver.release(self._handle)

    def _map(self, access: int) -> None:
        self._driver.map(self.address, self._bytes, self._handle)
        try:
            self._driver.allow(self.address, self._bytes, self._ordinal, access)
        except CudaError:
            self._driver.unmap(self.address, self._bytes)
            raise


def make(driver: Driver, name: str, size: int, ordinal: int, *, option: str) -> int:
    """A descriptor of `size` zero bytes on the device, rounded up; it alone keeps them alive.

    Needs a current context. Raises OptionError(option) with the numbers when the device has no
    room, CudaError when the memory cannot be shared here.
    """
    granularity = driver.granularity(ordinal)
    require(GRANULE_BYTES % granularity == 0, f"allocations are multiples of {granularity} bytes")
    rounded = slab_bytes(size)
    try:
        handle = driver.create(rounded, ordinal)
    except CudaError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        free = show_bytes(driver.free_bytes())
        message = f"{name} needs {show_bytes(rounded)} of GPU memory and {free} are free"
        raise OptionError(option, f"{message}; ask for less") from error
    try:
        fd = driver.export(handle)
    finally:
        driver.release(handle)
    try:
        mapping = Mapping(driver, fd, size, ordinal, write=True)
        driver.zero(mapping.address, rounded)
        mapping.close()
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_slabs(driver: Driver, ordinal: int, slabs: list[tuple[str, int, str]]) -> list[int]:
    """Descriptors of (name, bytes, option) each, as `make` says; none when one cannot be had.

    The context it takes to zero them is given back: the keeper waits without one.
    """
    driver.enter(ordinal)
    fds: list[int] = []
    try:
        for name, size, option in slabs:
            fds.append(make(driver, name, size, ordinal, option=option))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    finally:
        driver.leave(ordinal)
    return fds


def shares(driver: Driver, ordinal: int) -> str:
    """Why memory cannot be shared between processes here, or "": tried, not asked.

    Makes a granule, maps it twice, the second time read-only, writes through the one and reads
    through the other. Needs a current context.
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = make(driver, "a trial", GRANULE_BYTES, ordinal, option="--device")
            stack.callback(os.close, fd)
            first = Mapping(driver, fd, GRANULE_BYTES, ordinal, write=True)
            stack.callback(first.close)
            second = Mapping(driver, fd, GRANULE_BYTES, ordinal, write=False)
            stack.callback(second.close)
            driver.copy_in(first.address, _PATTERN)
            found = driver.copy_out(second.address, len(_PATTERN))
        except CudaError as error:
            return str(error)
    return "" if found == _PATTERN else "another mapping of the memory shows other bytes"
