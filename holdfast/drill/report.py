"""What a drill found: `Report`, and how a list of them looks as a table and as JSON.

A number that nobody could know is None, in the table a dash: a drill never fills in what it hopes.
"""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import holdfast

# How a provocation was met (DESIGN 4): the work was refused before a kernel ran; a slower path did
# it; a process or a request was lost and nothing else.
CAUGHT = ("refused before launch", "slow path", "contained")


@dataclass(slots=True)
class Failure:
    """kind: what was judged (tokens, lost, clock, metric, ...); text: what it was instead."""

    kind: str
    text: str


@dataclass(slots=True)
class Report:
    """One case of a drill. Clocks are seconds from the provocation; `pause_s` is the longest gap
    between two tokens that a client saw. tokens: that reached clients whose streams must be
    right; explained and equal: of those."""

    drill: str
    case: str
    sabotage: bool
    broken: str = ""
    caught: str = ""
    streams: int = 0
    lost: int = 0
    tokens: int = 0
    tokens_equal: int = 0
    tokens_explained: int = 0
    tau: float | None = None
    farthest: float | None = None
    """Of all judged tokens: how far the worst lies below the maximum (docs/equality.md)."""
    noticed_s: float | None = None
    fenced_s: float | None = None
    resumed_s: float | None = None
    pause_s: float | None = None
    pages_verified: int | None = None
    pages_failed: int | None = None
    tokens_recomputed: int | None = None
    compiles_after_ready: int | None = None
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    planted: bool = False
    """Under sabotage: the server said that it did what shall not go unseen."""
    sabotage_kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.drill}/{self.case}" if self.case else self.drill

    @property
    def passed(self) -> bool:
        """Clean: nothing failed. Under sabotage: it was planted, and seen by what must see it."""
        if not self.sabotage:
            return not self.failures
        return self.planted and any(f.kind == self.sabotage_kind for f in self.failures)

    @property
    def verdict(self) -> str:
        if not self.sabotage:
            return "pass" if self.passed else "FAIL"
        return "caught" if self.passed else "NOT CAUGHT"

    def json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "verdict": self.verdict}


def line(report: Report) -> str:
    """One line as the drill ends."""
    mode = " under sabotage" if report.sabotage else ""
    text = f"{report.verdict:<10} {report.name}{mode}: {report.broken or 'nothing was broken'}"
    if report.streams:
        text += f"; {report.streams} streams, {report.lost} lost"
        text += f", {report.tokens_equal} of {report.tokens} tokens equal"
    if report.resumed_s is not None:
        text += f", resumed in {report.resumed_s:.2f} s"
    return text + f" ({report.seconds:.1f} s)"


def table(reports: list[Report]) -> Table:
    """All of them, for the terminal."""
    drawn = Table(title="drills", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("drill", "verdict", "caught"):
        drawn.add_column(name, no_wrap=True)
    for name in (
        "lost",
        "equal tokens",
        "explained",
        "noticed",
        "fenced",
        "resumed",
        "verified",
        "recomputed",
        "compiles",
    ):
        drawn.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        clocks = (report.noticed_s, report.fenced_s, report.resumed_s)
        drawn.add_row(
            report.name,
            report.verdict,
            report.caught,
            f"{report.lost} of {report.streams}",
            f"{report.tokens_equal} of {report.tokens}",
            str(report.tokens_explained),
            *("-" if s is None else f"{s * 1000:.0f} ms" for s in clocks),
            *(_count(n) for n in (report.pages_verified, report.tokens_recomputed)),
            _count(report.compiles_after_ready),
            style="" if report.passed else "bold red",
        )
    return drawn


def document(reports: list[Report], *, device: str, model: str) -> dict[str, Any]:
    """What --json writes: everything, and what it was measured with."""
    return {
        "holdfast": holdfast.__version__,
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "model": model,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _version("torch"),
        "command": sys.argv,
        "passed": all(report.passed for report in reports),
        "drills": [report.json() for report in reports],
    }


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the source tree that this runs from, if it is one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(holdfast.__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
