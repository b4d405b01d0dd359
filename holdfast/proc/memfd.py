"""Shared memory that cannot leak: memfds, fully allocated, sealed in size.

A memfd has no name, so it is gone with its last holder; it is allocated when it is made, so that a
full machine is an error at start and not a SIGBUS later; its size is sealed, so that no holder can
cut it off under another. Used by the supervisor (journal, metrics) and the keeper (weights, pool).
"""

from __future__ import annotations

import fcntl
import mmap
import os

from holdfast.errors import OptionError
from holdfast.sizing import memory_available_bytes, show_bytes

# Left to the rest of the machine when a slab is allocated: the processes that map it also run.
SPARE_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 20


def make(name: str, size: int, *, option: str) -> int:
    """A memfd of `size` bytes (rounded up to pages), all zero and allocated.

    Raises OptionError(option) with the numbers when the machine has no room for it.
    """
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    available = memory_available_bytes()
    # Asked first: an over-large tmpfs allocation does not fail, it calls the OOM killer.
    if size + SPARE_BYTES > available:
        raise OptionError(
            option,
            f"{name} needs {show_bytes(size)} of memory and {show_bytes(available)} are "
            f"available; ask for less, or free some memory",
        )
    fd = os.memfd_create(f"holdfast-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # In pieces, because one call over many GiB cannot be interrupted.
        for start in range(0, size, _CHUNK_BYTES):
            os.posix_fallocate(fd, start, min(_CHUNK_BYTES, size - start))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(fd)
        message = f"{name}: {show_bytes(size)} cannot be allocated: {error.strerror}; ask for less"
        raise OptionError(option, message) from error
    return fd


def attach(fd: int) -> memoryview:
    """The whole memfd, mapped shared and writable; the mapping lives as long as the view."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
