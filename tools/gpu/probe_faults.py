"""What DESIGN 1 assumes of the CUDA driver: faults, fences, mappings, a standby. Measured.

    python3 tools/gpu/probe_faults.py [--budget SECONDS] [--parts writers,faults,...] [--json FILE]

Run it on a machine with one GPU, nvcc and cuda-bindings; torch is needed by the part `loop` only.
Each part is a process with a deadline, and what hangs is killed, so the whole ends within the
budget. The last thing printed is one table; the JSON (default $OUT/probe_faults.json) has every run
behind it. docs/gpu-faults.md says what the numbers mean.

writers   a dead process's kernels and copies: does memory stop changing once its pidfd fired?
faults    each kind of fault in a worker, with the memory's owner and a third process unharmed
vmm       CUDA VMM and CUDA IPC mappings, read-only weights, host memory that needs no registration
verify    a standby reads pages while the worker dies
loop      a 5 ms graph loop beside a standby that imports, captures and pins
hostmem   time from kill to EOF to pidfd against the host memory that is registered
dma       copies that fault on the copy engine (last: the least known)
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The most each part may take; DMA_RESERVE_S is kept for the last.
LIMITS_S = {
    "writers": 110,
    "faults": 80,
    "vmm": 60,
    "verify": 45,
    "loop": 110,
    "hostmem": 180,
    "dma": 40,
}
DMA_RESERVE_S = 20
TABLE_WIDTH = 44


def output_of(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


def machine() -> dict[str, object]:
    versions = {}
    for package in ("torch", "triton", "cuda-bindings", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    query = "--query-gpu=name,driver_version,memory.total,mig.mode.current,pstate"
    memory = Path("/proc/meminfo").read_text().splitlines()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python3", *sys.argv]),
        "gpu": output_of("nvidia-smi", query, "--format=csv,noheader"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": memory,
        "nvcc": (output_of("nvcc", "--version").splitlines() or ["none"])[-1],
        "versions": versions,
    }


def build(folder: str) -> str:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    cubin = f"{folder}/probe.cubin"
    source = str(HERE / "probe_kernels.cu")
    subprocess.run([nvcc, "-cubin", "-arch=sm_90", "-o", cubin, source], check=True, timeout=60)
    return cubin


def end_group(process: subprocess.Popen) -> None:
    """Kill a part and its children; give up after 10 s rather than hang."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def run_part(part: str, cubin: str, rows: Path, seconds: float) -> dict[str, object]:
    start = time.monotonic()
    command = [
        sys.executable,
        str(HERE / "probe_parts.py"),
        part,
        cubin,
        str(rows),
        f"{seconds:.0f}",
    ]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code: int | str = process.wait(seconds + 3)
    except subprocess.TimeoutExpired:
        code = "out of time"
    end_group(process)
    return {"part": part, "exit": code, "seconds": round(time.monotonic() - start, 1)}


def print_table(found: list[dict], ends: list[dict], about: dict) -> None:
    print(f"\n{about['gpu']} | kernel {about['kernel']} | {about['versions']} | {about['date']}")
    part = None
    for row in found:
        if row["part"] != part:
            part = row["part"]
            end = next(e for e in ends if e["part"] == part)
            print(f"-- {part} ({end['seconds']} s, exit {end['exit']})")
        mark = {True: "ok", False: "NO", None: "  "}[row["ok"]]
        print(f"{mark} {row['what']:<{TABLE_WIDTH}} {row['result']}")
    for end in ends:
        if end["exit"] != 0:
            print(f"NO {end['part']} ended with {end['exit']} after {end['seconds']} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything")
    parser.add_argument("--parts", default=",".join(LIMITS_S), help="comma-separated, in order")
    parser.add_argument(
        "--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "probe_faults.json"
    )
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(LIMITS_S):
        parser.error(f"--parts: unknown {sorted(unknown)}; known: {', '.join(LIMITS_S)}")
    end = time.monotonic() + options.budget - 5
    about, ends, found = machine(), [], []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        cubin = build(folder)
        for part in parts:
            reserve = DMA_RESERVE_S if "dma" in parts and part != "dma" else 0
            seconds = min(LIMITS_S[part], end - time.monotonic() - reserve)
            if seconds < 10:
                ends.append({"part": part, "exit": "no time left", "seconds": 0})
                continue
            print(f"-- {part}, at most {seconds:.0f} s", flush=True)
            ends.append(run_part(part, cubin, rows, seconds))
            found = [json.loads(line) for line in rows.read_text().splitlines()]
            report = {"machine": about, "parts": ends, "rows": found}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(found, ends, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
