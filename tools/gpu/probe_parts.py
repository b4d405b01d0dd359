"""Runs one part of probe_faults.py as a process of its own, the keeper, which owns the memory.

    probe_parts.py PART CUBIN ROWS_FILE SECONDS

A part appends one JSON row for each finding, so that what was measured survives what fails later.
"""

from __future__ import annotations

import signal
import sys

import probe_cuda as cuda
from probe_containment import dma, faults
from probe_fence import verify, writers
from probe_keeper import Keeper
from probe_loop import loop
from probe_memory import hostmem, vmm

PARTS = {part.__name__: part for part in (writers, faults, vmm, verify, loop, hostmem, dma)}


def main() -> None:
    part, cubin, rows, seconds = sys.argv[1:]
    cuda.libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.alarm(int(float(seconds)) + 5)
    PARTS[part](Keeper(part, cubin, rows, float(seconds)))


if __name__ == "__main__":
    main()
