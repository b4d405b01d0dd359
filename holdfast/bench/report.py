"""Figure: one measured number, with all that makes it comparable; one JSON object a line in a file.

The form of every row of bench/results/*.jsonl. A value is the median of its runs, all of which are
kept. `ratio` is our value divided by the peer's, whatever the unit: above 1 is better where more is
better (units that end in "/s"), below 1 elsewhere. Rows are appended and never changed; of equal
ones the last counts (`newest`). Rows of before this form are read by bench.history. Knows nothing
of how a figure is measured.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import OptionError

# Key of `options`: names of the safety switches that were off; a row without it had all of them on.
SAFETY_OFF = "safety_off"
# Digits that are kept: more than any run repeats.
_DIGITS = 6
_SHARE_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFigure:
    """Another engine's value of the same figure, from the same session.

    options: what of its settings moves the figure.
    """

    name: str
    version: str
    runs: tuple[float, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """bench, model, work, batch, concurrency and metric say what was measured.

    work: which requests, in a few words. batch: rows of a step; concurrency: requests open at once;
    None where neither applies. runs: values in `unit`, in order. options: every setting of ours
    that moves the figure. floor: what the machine's bandwidth or arithmetic alone would give, in
    `unit`.
    """

    bench: str
    metric: str
    unit: str
    runs: tuple[float, ...]
    model: str = ""
    work: str = ""
    batch: int | None = None
    concurrency: int | None = None
    peer: PeerFigure | None = None
    floor: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.runs, f"{self.bench} {self.metric}: no runs"

    @property
    def value(self) -> float:
        return statistics.median(self.runs)

    @property
    def ratio(self) -> float | None:
        """Ours / the peer's."""
        if self.peer is None or not self.peer.value:
            return None
        return self.value / self.peer.value

    @property
    def more_is_better(self) -> bool:
        return more_is_better(self.unit)

    def row(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object; `environment`: bench.machine.environment()."""
        peer = self.peer
        return {
            "bench": self.bench,
            "model": self.model,
            "work": self.work,
            "batch": self.batch,
            "concurrency": self.concurrency,
            "metric": self.metric,
            "unit": self.unit,
            "value": _rounded(self.value),
            "runs": [_rounded(run) for run in self.runs],
            "peer": None
            if peer is None
            else {
                "name": peer.name,
                "version": peer.version,
                "value": _rounded(peer.value),
                "runs": [_rounded(run) for run in peer.runs],
                "options": dict(peer.options),
            },
            "ratio": None if self.ratio is None else round(self.ratio, _SHARE_DIGITS),
            "floor": None if self.floor is None else _rounded(self.floor),
            "options": dict(self.options),
            **environment,
        }


def more_is_better(unit: str) -> bool:
    return unit.endswith("/s")


def is_row(value: Mapping[str, Any]) -> bool:
    """Whether a line's object is a row of this form (not one of before it)."""
    return "metric" in value and "runs" in value


def append(path: Path, figures: Iterable[Figure], environment: Mapping[str, Any]) -> None:
    """Append figures to the JSON-lines file `path`. Raises OptionError("--json")."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            for figure in figures:
                out.write(json.dumps(figure.row(environment)) + "\n")
    except OSError as error:
        raise OptionError("--json", f"cannot write {path}: {error.strerror}") from error


def read(path: Path) -> list[dict[str, Any]]:
    """Every object of a JSON-lines file. Raises OptionError naming the file and the line."""
    rows = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise OptionError("--json", f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise OptionError("--json", f"{path}, line {number}: {error}") from None
        if not isinstance(value, dict) or "bench" not in value:
            raise OptionError("--json", f"{path}, line {number}: no row of a bench")
        rows.append(value)
    return rows


def newest(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that measure the same thing the last; in the order of their first appearance. Loads
    of a server with another bound beside decode are another thing: it trades rate for evenness."""
    keys = ("bench", "model", "work", "batch", "concurrency", "metric")
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        off = tuple(row["options"].get(SAFETY_OFF, ()))
        last[(*(row[key] for key in keys), mixed_bound(row), off)] = dict(row)
    return list(last.values())


def mixed_bound(row: Mapping[str, Any]) -> str:
    """Of a row about a loaded server, the bound of its steps with decode and prompts, in words: of
    all their tokens, in older rows (of before 2026-11-22, 02:00) of prompts alone; "" where a row
    says nothing of it."""
    if row["bench"] == "serve":
        for option, name in (("mixed_tokens", "mixed"), ("mixed_prefill_tokens", "chunk")):
            if row["options"].get(option):
                return f"{name} {row['options'][option]:,}"
    return ""


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


def place(batch: int | None, concurrency: int | None) -> str:
    """batch 8, c=64, or nothing."""
    if batch is not None:
        return f"batch {batch}"
    return f"c={concurrency}" if concurrency is not None else ""


def show(figures: Sequence[Figure]) -> str:
    """A table for the terminal: a line a figure, ours beside the peer's."""
    with_peer = any(figure.peer is not None for figure in figures)
    with_floor = any(figure.floor is not None for figure in figures)
    columns = ["", "ours", "unit", "lowest", "highest", "runs"]
    columns += ["peer", "ratio"] if with_peer else []
    columns += ["floor"] if with_floor else []
    lines = []
    for figure in figures:
        name = ", ".join(
            part
            for part in (
                figure.bench,
                figure.model,
                figure.work,
                place(figure.batch, figure.concurrency),
                figure.metric,
            )
            if part
        )
        line = [name, short(figure.value), figure.unit]
        line += [short(min(figure.runs)), short(max(figure.runs)), str(len(figure.runs))]
        if with_peer:
            peer, ratio = figure.peer, figure.ratio
            line.append("" if peer is None else f"{peer.name} {short(peer.value)}")
            line.append("" if ratio is None else f"{ratio:.2f}")
        if with_floor:
            line.append("" if figure.floor is None else short(figure.floor))
        lines.append(line)
    return table(columns, lines)


def short(value: float) -> str:
    """Three or four digits that matter, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if value < 10 ** (_DIGITS - 1) else round(value, 1)
