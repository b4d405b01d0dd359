"""Shared by all tests: helpers that lie beside a test file are importable from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Where there is no GPU, kernels run in Triton's interpreter. Whether one does is decided where it
# is decorated, Triton's own library included, so this stands before anything imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

for folder in Path(__file__).parent.iterdir():
    if folder.is_dir() and not folder.name.startswith(("_", ".")):
        sys.path.insert(0, str(folder))
