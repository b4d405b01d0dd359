"""Shared memory: allocated at once or refused, and never cut off under a holder."""

from __future__ import annotations

import mmap
import os
import resource

import pytest

from holdfast.errors import OptionError
from holdfast.proc import memfd

MIB = 1 << 20


def test_a_memfd_is_allocated_zero_and_closed_on_exec() -> None:
    fd = memfd.make("test", 3 * MIB + 1, option="--kv-pages")
    try:
        facts = os.fstat(fd)
        assert facts.st_size == 3 * MIB + mmap.PAGESIZE
        assert facts.st_blocks * 512 == facts.st_size  # Every page is there already.
        assert not os.get_inheritable(fd)
        view = memfd.attach(fd)
        assert view.nbytes == facts.st_size and not any(view[:: mmap.PAGESIZE])
    finally:
        os.close(fd)


def test_no_holder_can_change_its_size() -> None:
    fd = memfd.make("test", MIB, option="--kv-pages")
    try:
        for size in (0, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_more_than_is_available_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memfd, "memory_available_bytes", lambda: 65 * MIB)
    os.close(memfd.make("pool", MIB, option="--kv-pages"))
    with pytest.raises(OptionError, match=r"^--kv-pages: pool needs 2.0 MiB of memory and 65.0"):
        memfd.make("pool", 2 * MIB, option="--kv-pages")


def test_a_failing_allocation_is_an_option_error_and_leaks_nothing() -> None:
    """RLIMIT_FSIZE makes the kernel refuse it, as a full machine would."""
    before = set(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OptionError, match=r"--kv-pages: pool: 2.0 MiB cannot be allocated"):
            memfd.make("pool", 2 * MIB, option="--kv-pages")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(os.listdir("/proc/self/fd")) == before
