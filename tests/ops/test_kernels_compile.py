"""Every kernel of kernel_builds.BUILDS compiles for an H200, without one, and fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.ops import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="triton is not installed"),
    pytest.mark.slow,
]

ROOT = Path(__file__).parents[2]
# Of an SM: what a block may have of shared memory, and 64 Ki registers.
SHARED_BYTES_MAX = 227 << 10
REGISTERS = 1 << 16


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[dict[str, Any]]:
    """kernel_builds.Build of each kernel, from a process that does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kernel_builds.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_fits_an_sm(builds) -> None:
    assert len(builds) >= 13
    for build in builds:
        print(build)
        assert build["shared_bytes"] <= SHARED_BYTES_MAX, build
        assert build["registers"] * build["warps"] * 32 <= REGISTERS, build


def test_no_kernel_spills_a_register(builds) -> None:
    # Warp groups with 240 registers a thread: some words, stored before the walk and loaded behind
    # it; how many depends on the version of triton.
    few = [build for build in builds if build["spill_bytes"] and "attend_warps" in build["name"]]
    assert [build for build in builds if build["spill_bytes"] and build not in few] == []
    assert [build for build in few if build["spill_bytes"] > 16] == []


def test_gathered_prefill_is_multiplied_by_warp_groups_from_bulk_copies(builds) -> None:
    found = [build for build in builds if "attend_warps" in build["name"]]
    assert len(found) >= 4
    for build in found:
        assert build["bulk_copies"] >= 2 and build["warp_group_products"] >= 48, build


def test_no_integer_makes_another_kernel_after_ready(builds) -> None:
    assert [(build["name"], build["specialised"]) for build in builds if build["specialised"]] == []


def test_attention_loads_while_it_multiplies(builds) -> None:
    found = [build for build in builds if "attend_" in build["name"]]
    assert found
    for build in found:
        assert build["tensor_products"] and build["buffers"] >= 2, build
