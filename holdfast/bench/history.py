"""Rows of before the present form (bench.report), as figures: what they measured, unchanged.

They had one object a bench, each with keys of its own. They stay in bench/results as they were
written; this is the one place that knows them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from holdfast.bench.report import Figure, PeerFigure, is_row

Row = Mapping[str, Any]


def rows_of(objects: Iterable[Row]) -> list[dict[str, Any]]:
    """Every object as rows of the present form, in order; those that have it already untouched."""
    rows: list[dict[str, Any]] = []
    for found in objects:
        if is_row(found):
            rows.append(dict(found))
            continue
        environment = {key: found.get(key) for key in ("date", "commit", "machine", "versions")}
        for figure in _BENCHES[found["bench"]](found):
            rows.append(figure.row(environment))
    return rows


def _offline(row: Row) -> list[Figure]:
    tokens, ours = row["output_tokens"], row["holdfast"]
    options = {key: row[key] for key in ("device", "dtype", "threads", "rows_max") if key in row}
    peer = None
    if sides := row.get("transformers"):
        name = max(sides, key=lambda side: sides[side]["tokens_per_s"])
        peer = PeerFigure(
            name="transformers",
            version=row["versions"]["transformers"],
            runs=tuple(tokens / run for run in sides[name]["runs_s"]),
            options={"cut": name},
        )
    runs = tuple(tokens / run for run in ours["runs_s"])
    return [
        Figure(
            bench="offline",
            model=row["model"],
            work=row["work"],
            metric="output rate",
            unit="tok/s",
            runs=runs,
            peer=peer,
            options=options,
        )
    ]


def _core(row: Row) -> list[Figure]:
    return [
        Figure(
            bench="core",
            work=f"context {case['context_tokens']}",
            batch=case["rows"],
            metric=f"brain step {share}",
            unit="us",
            runs=(case["brain_us"][share],),
            options={"steps": case["steps"]},
        )
        for case in row["cases"]
        for share in ("p50", "p99")
    ]


def _null(row: Row) -> list[Figure]:
    return [
        Figure(
            bench="serve-null",
            work=f"api processes {case['api_processes']}",
            concurrency=case["streams"],
            metric=metric,
            unit="events/s",
            runs=(case[key],),
            options={"api_processes": case["api_processes"], "seconds": case["seconds"]},
        )
        for case in row["cases"]
        for key, metric in (
            ("events_per_s", "event rate"),
            ("events_per_api_cpu_s", "event rate of an api CPU"),
        )
    ]


def _memory(row: Row) -> list[Figure]:
    return [
        Figure(
            bench="serve-memory",
            work=case["what"],
            metric="memory",
            unit="bytes",
            runs=(float(case["bytes"]),),
        )
        for case in row["cases"]
    ]


def _standby(row: Row) -> list[Figure]:
    return [
        Figure(
            bench="standby",
            model=row["model"],
            work=f"{label} standby, {row['mode']}",
            concurrency=row["streams"],
            metric=f"ITL {share}",
            unit="ms",
            runs=(row[f"{label}_gap_ms"][share],),
            options={"mode": row["mode"], "threads": row["threads"]},
        )
        for label in ("quiet", "warming")
        for share in ("p50", "p99")
    ]


_BENCHES: dict[str, Callable[[Row], list[Figure]]] = {
    "offline": _offline,
    "core": _core,
    "serve-null": _null,
    "serve-memory": _memory,
    "standby": _standby,
}
