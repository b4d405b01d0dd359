"""Gathered rows on a Hopper GPU against the torch reference, at the edges of pages, tiles, blocks
and windows. Every check is a process of its own with a deadline: a kernel whose warps waited for
one another for ever would otherwise hold the session. They run side by side: most of their time is
compiling."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefill_checks import ALL

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 150.0
Running = dict[str, tuple[subprocess.Popen, Path]]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    """Every check's process, started, and what it says."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no warp groups: not a Hopper GPU")
    folder, found = tmp_path_factory.mktemp("prefill"), {}
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "ops"))),
        # The references are small; as many threads as cores in each process would be in the way.
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("prefill_checks.py"))
    try:
        for name in ALL:
            said = folder / name
            with said.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, script, name], env=env, stdout=file, stderr=file
                )
            found[name] = process, said
        yield found
    finally:
        for process, _ in found.values():
            process.kill()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def deadline_s(running: Running) -> float:
    return time.monotonic() + TIMEOUT_S


@pytest.mark.parametrize("check", sorted(ALL))
def test_gathered_rows_match_the_reference(running: Running, deadline_s: float, check: str) -> None:
    process, said = running[check]
    code = process.wait(timeout=max(0.1, deadline_s - time.monotonic()))
    assert code == 0, said.read_text()[-4000:]
