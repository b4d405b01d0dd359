"""Change bytes of GPU memory behind a descriptor.

    python -m holdfast.proc.cuda_flip ORDINAL FD BYTES EVERY

For the drill of wrong weights: workers map them read-only and the supervisor has no context, so a
process of its own does what broken hardware would. The sign of one number in every EVERY bytes.
"""

from __future__ import annotations

import sys

import numpy as np

from holdfast.cuda_driver import Driver
from holdfast.proc.cuda_memory import Mapping

_CHUNK_BYTES = 64 << 20


def main() -> int:
    ordinal, fd, size, every = map(int, sys.argv[1:5])
    driver = Driver()
    driver.enter(ordinal)
    mapping = Mapping(driver, fd, size, ordinal, write=True)
    for first in range(0, size, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, size - first)
        chunk = np.frombuffer(driver.copy_out(mapping.address + first, count), np.uint8).copy()
        chunk[3::every] ^= 0x80
        driver.copy_in(mapping.address + first, chunk.tobytes())
    mapping.close()
    driver.leave(ordinal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
