"""The machine, the versions, the commit and the date: what makes two figures comparable or not.

Reads /proc, package metadata, git and nvidia-smi; never torch, so that a bench of the HTTP side
does not load it. HOLDFAST_COMMIT says the commit where the sources lie in no checkout.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from holdfast import __version__

_PACKAGES = ("torch", "triton", "transformers", "numpy", "uvicorn", "fastapi", "uvloop")
_KERNEL_PACKAGES = ("flashinfer-python",)
_COMMAND_S = 10.0


def environment() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "holdfast": __version__}
    for name in (*_PACKAGES, *_KERNEL_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "load_1m": round(os.getloadavg()[0], 2),
            "system": platform.platform(),
            **_gpu(),
        },
        "versions": versions,
    }


def gpu_name() -> str | None:
    """Of the first GPU; None without one, or without its driver's tool."""
    return _gpu().get("gpu")


def _gpu() -> dict[str, Any]:
    """gpu, gpus (their count), driver, cuda; empty where nvidia-smi finds none."""
    try:
        text = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [line.split(", ") for line in text.splitlines() if ", " in line]
    if not lines:
        return {}
    return {
        "gpu": lines[0][0],
        "gpus": len(lines),
        "driver": lines[0][1],
        "cuda": _cuda_version(),
    }


def _cuda_version() -> str | None:
    """What the driver supports, as nvidia-smi's head says it."""
    try:
        head = _run("nvidia-smi")
    except (OSError, subprocess.SubprocessError):
        return None
    _, found, rest = head.partition("CUDA Version:")
    return rest.split()[0] if found and rest.split() else None


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with '+' when it has changes; else None."""
    if said := os.environ.get("HOLDFAST_COMMIT"):
        return said
    here = str(Path(__file__).parent)
    try:
        head = _run("git", "-C", here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _run("git", "-C", here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMMAND_S)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
