"""One row a measurement: what was measured, on what machine, with what versions, from which commit.

Rows are JSON objects, one a line, appended to a file that stays in the repository
(bench/results/*.jsonl). Knows nothing of what the figures mean.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from holdfast import __version__
from holdfast.errors import OptionError

_PACKAGES = ("torch", "transformers", "numpy", "uvicorn", "fastapi", "uvloop")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least `share` of the values at or below it (nearest rank)."""
    assert values, "no values"
    ordered = sorted(values)
    return ordered[max(0, -(-round(share * 1e6) * len(ordered) // 1_000_000) - 1)]


def summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
        "mean": statistics.fmean(values),
        "max": max(values),
        "count": len(values),
    }


def environment() -> dict[str, object]:
    """Machine, versions, commit and date; what makes two rows comparable or not."""
    versions = {"python": platform.python_version(), "holdfast": __version__}
    for name in _PACKAGES:
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
        },
        "versions": versions,
    }


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one row to the JSON-lines file `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            out.write(json.dumps(row, sort_keys=True) + "\n")
    except OSError as error:
        raise OptionError("--json", f"cannot write {path}: {error.strerror}") from error


def table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text columns, the first left-aligned and the others right-aligned."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with '+' when it has changes; else None."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
