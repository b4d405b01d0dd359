"""Write the tables and plots of docs/benches.md from bench/results/*.jsonl.

    python3 tools/bench_tables.py [--check]

Between `<!-- tables: NAME -->` and `<!-- end -->` it puts the newest row of each figure of
bench/results/NAME.jsonl, a table a bench, and beside the page one SVG a table that compares
something. --check changes nothing and fails when the page is not what the rows say.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "tools"):
    sys.path.insert(0, str(_folder))

import bench_bars  # noqa: E402

from holdfast.bench import history, report  # noqa: E402
from holdfast.bench.report import SAFETY_OFF  # noqa: E402

PAGE = ROOT / "docs" / "benches.md"
RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "plots"
TITLES = {
    "offline": "Offline: output tokens of a pile of requests",
    "decode": "Decode: one step",
    "prefill": "Prefill: prompt tokens, up to the first token",
    "serve": "Server under load",
    "start": "Start to ready",
    "core": "The brain's whole step, with a fake worker",
    "serve-null": "The HTTP side alone, with a core that pretends",
    "serve-memory": "Memory of one",
    "standby": "Streams beside a standby that warms up",
}
_MARKS = re.compile(r"(<!-- tables: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_ROWS = "No rows yet.\n"

Row = dict[str, Any]


def page(text: str) -> tuple[str, dict[str, str]]:
    """The page with its tables written anew, and the plots by file name."""
    plots: dict[str, str] = {}

    def tables(match: re.Match[str]) -> str:
        name = match[2]
        path = RESULTS / f"{name}.jsonl"
        rows = report.newest(history.rows_of(report.read(path))) if path.exists() else []
        body = _tables(name, rows, plots) if rows else NO_ROWS
        return f"{match[1]}\n{body}\n{match[3]}"

    return _MARKS.sub(tables, text), plots


def _tables(name: str, rows: Sequence[Row], plots: dict[str, str]) -> str:
    parts = []
    for bench in TITLES:
        found = [row for row in rows if row["bench"] == bench]
        if not found:
            continue
        parts.append(f"### {TITLES[bench]}\n")
        parts.append(_table(found))
        for metric, group in _plotted(found):
            file = re.sub(r"[^a-z0-9]+", "-", f"{name} {bench} {metric}".lower()) + ".svg"
            plots[file] = _plot(f"{bench}: {metric}", group)
            parts.append(f"![{bench}, {metric}](plots/{file})\n")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """Columns that no row fills are left out."""
    optional = {
        "model": any(row["model"] for row in rows),
        "work": any(row["work"] for row in rows),
        "at": any(_place(row) for row in rows),
        "peer": any(row["peer"] for row in rows),
        "floor": any(row["floor"] is not None for row in rows),
        "not safe": any(row["options"].get(SAFETY_OFF) for row in rows),
    }
    columns = [name for name in ("model", "work", "at") if optional[name]]
    columns += ["figure", "ours", "unit", "lowest .. highest", "runs"]
    columns += ["peer", "ratio"] if optional["peer"] else []
    columns += ["floor"] if optional["floor"] else []
    columns += ["not safe"] if optional["not safe"] else []
    columns += ["commit", "date"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        peer, runs = row["peer"], row["runs"]
        cells = {
            "model": row["model"],
            "work": row["work"],
            "at": _place(row),
            "figure": row["metric"],
            "ours": f"**{report.short(row['value'])}**",
            "unit": row["unit"],
            "lowest .. highest": ""
            if len(runs) == 1
            else f"{report.short(min(runs))} .. {report.short(max(runs))}",
            "runs": str(len(runs)),
            "peer": ""
            if peer is None
            else f"{report.short(peer['value'])} ({peer['name']} {peer['version']})",
            "ratio": "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "floor": "" if row["floor"] is None else report.short(row["floor"]),
            "not safe": ", ".join(row["options"].get(SAFETY_OFF, ())),
            "commit": f"`{row['commit'][:10]}`",
            "date": str(row["date"])[:10],
        }
        lines.append("| " + " | ".join(cells[name] for name in columns) + " |")
    return "\n".join(lines) + "\n"


def _plotted(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by metric and unit, where there is a peer, a floor, or more than one to compare."""
    found = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        group = [row for row in rows if row["metric"] == metric]
        compares = len(group) > 1 or any(row["peer"] or row["floor"] for row in group)
        if compares and len({row["unit"] for row in group}) == 1:
            found.append((metric, group))
    return found


def _plot(title: str, rows: Sequence[Row]) -> str:
    parts = ("model", "work", "place")
    named = [{"model": row["model"], "work": row["work"], "place": _place(row)} for row in rows]
    # What is the same in all bars is not repeated in each label.
    telling = [part for part in parts if len({one[part] for one in named}) > 1] or ["model"]
    groups = [
        bench_bars.Group(
            label=", ".join(filter(None, (one[part] for part in telling))) or row["metric"],
            ours=row["value"],
            ours_shown=report.short(row["value"]),
            peer=row["peer"]["value"] if row["peer"] else None,
            peer_shown=report.short(row["peer"]["value"]) if row["peer"] else "",
            floor=row["floor"],
        )
        for row, one in zip(rows, named, strict=True)
    ]
    peers = dict.fromkeys(
        f"{row['peer']['name']} {row['peer']['version']}" for row in rows if row["peer"]
    )
    unit = rows[0]["unit"]
    better = "more" if report.more_is_better(unit) else "less"
    return bench_bars.draw(title, unit, groups, peer=", ".join(peers), better=better)


def _place(row: Row) -> str:
    place = report.place(row["batch"], row["concurrency"])
    return ", ".join(filter(None, (place, report.mixed_bound(row))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    text = PAGE.read_text()
    new, plots = page(text)
    files = {PAGE: new, **{PLOTS / name: svg for name, svg in plots.items()}}
    stale = sorted(set(PLOTS.glob("*.svg")) - set(files))
    changed = [
        path for path, body in files.items() if not path.exists() or path.read_text() != body
    ]
    if asked.check:
        for path in itertools.chain(changed, stale):
            print(f"{path.relative_to(ROOT)} is not what the rows say: run tools/bench_tables.py")
        return 1 if changed or stale else 0
    PLOTS.mkdir(exist_ok=True)
    for path in changed:
        path.write_text(files[path])
    for path in stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
