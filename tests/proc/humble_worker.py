"""A real worker without CAP_SYS_NICE, as an ordinary user's has none. Not a test."""

from __future__ import annotations

import ctypes
import sys

from holdfast.proc.worker import main

_CAP_SYS_NICE = 1 << 23
_VERSION_3 = 0x2008_0522
_libc = ctypes.CDLL(None, use_errno=True)


def drop() -> None:
    """Take the privilege from this process's only thread; those it starts inherit that."""
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # effective, permitted, inheritable of capabilities 0..31, then of 32..63
    data = (ctypes.c_uint32 * 6)()
    assert _libc.capget(header, data) == 0
    data[0] &= ~_CAP_SYS_NICE
    data[1] &= ~_CAP_SYS_NICE
    assert _libc.capset(header, data) == 0


if __name__ == "__main__":
    drop()
    sys.exit(main())
