"""`holdfast faults PATH`: the fault reports of a folder (`serve --fault-dir`), or one of them, read
by people. What is in a report is core.report's; `--json` shows it as it is.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from holdfast.cli.show import out
from holdfast.core.report import FORMAT, line_of
from holdfast.errors import OperatorError
from holdfast.proc.fault_files import reports_in


def faults(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder of reports, or one report's file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show reports of faults: a folder's as a list, one in full."""
    if path.is_dir():
        reports = [(one.name, read(one)) for one in reports_in(path)]
        if as_json:
            out.print_json(json.dumps([report for _, report in reports]))
        else:
            _print_list(path, reports)
        return
    report = read(path)
    if as_json:
        out.print_json(json.dumps(report))
    elif report["kind"] == "worker":
        _print_worker(report)
    else:
        _print_facts(report)


def read(path: Path) -> dict[str, Any]:
    """One report. Raises OperatorError when the file is none."""
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise OperatorError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OperatorError(f"{path} is no fault report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise OperatorError(f"{path} is no fault report of this version ({FORMAT!r})")
    return report


def _print_list(folder: Path, reports: list[tuple[str, dict[str, Any]]]) -> None:
    if not reports:
        out.print(f"no fault reports in {folder}", markup=False)
        return
    table = Table(title=f"{folder}, oldest first", title_justify="left")
    for name in ("file", "when", "what"):
        table.add_column(name, no_wrap=name != "what")
    for name, report in reports:
        table.add_row(name, _when(report), escape(line_of(report)))
    out.print(table)


def _print_worker(report: dict[str, Any]) -> None:
    out.print(f"{_when(report)}  {line_of(report)}", markup=False)
    facts = {
        "said": report["said"],
        "ended": report["ended"] or "not known when this was written",
        "by its own fault": _yes(report["implicates"]),
        "hung": _yes(report["hung"]),
        "next epoch": report["next_epoch"] or "none yet",
        "live, running": f"{report['live']}, {report['running']}",
        "runs alone": report.get("alone") or "nobody",
    }
    for name, value in facts.items():
        out.print(f"  {name}: {value}", markup=False)
    _print_plans(report)
    _print_requests(report)
    _print_pages(report)
    for group in report["ledger"]:
        counts = ", ".join(f"{name} {count}" for name, count in group.items() if name != "group")
        out.print(f"ledger, group {group['group']}: {counts}", markup=False)


def _print_plans(report: dict[str, Any]) -> None:
    table = Table(title="Plans, newest last", title_justify="left")
    for name in ("plan", "state", "age", "rows (request: from + query tokens)", "besides"):
        table.add_column(name, no_wrap=name in ("plan", "state", "age"))
    for state, plans in (("answered", "acknowledged"), ("in flight", "in_flight")):
        for plan in report[plans]:
            rows = [
                f"{row['row']} ({row['request']}: {row['from']} + {row['query_len']}"
                + (f", {row['drafts']} drafts)" if row["drafts"] else ")")
                for row in plan["rows"]
            ]
            if plan["rows_total"] > len(rows):
                rows.append(f"and {plan['rows_total'] - len(rows)} more")
            names = ("admits", "clears", "page_writes", "seals", "zeros", "loads", "stores")
            # Reports of before 2026-11-22 name no graph.
            besides = [f"graph: {plan['graph']}"] if plan.get("graph") else []
            besides += [f"{name} {plan[name]}" for name in names if plan[name]]
            age = f"{plan['launched_s_ago']:.3f} s"
            table.add_row(
                f"{plan['epoch']}.{plan['step']}", state, age, ", ".join(rows), ", ".join(besides)
            )
    out.print(table)


def _print_requests(report: dict[str, Any]) -> None:
    table = Table(title="Requests of these plans", title_justify="left")
    for name in ("request", "tenant", "phase", "row", "prompt", "tokens", "pages", "suspected"):
        table.add_column(name)
    for one in report["requests"]:
        suspected = ""
        if "suspected_at" in one:
            times = one["faults_there"]
            suspected = f"at {one['suspected_at']}, {times} fault{'s' * (times != 1)} there"
        elif one["in_flight"]:
            suspected = "in flight"
        names = ("id", "tenant", "phase", "row", "prompt_tokens", "tokens", "pages")
        table.add_row(*(escape(str(one.get(name, ""))) for name in names), suspected)
    out.print(table)
    if left_out := report["requests_left_out"]:
        out.print(f"  and {left_out} more")


def _print_pages(report: dict[str, Any]) -> None:
    table = Table(title="Pages that these plans wrote", title_justify="left")
    for name in ("group", "page", "generation", "state", "request", "column", "steps"):
        table.add_column(name)
    for one in report["pages"]:
        names = ("group", "page", "generation", "state", "request", "column")
        steps = ", ".join(str(step) for step in one["steps"])
        table.add_row(*(str(one[name]) for name in names), steps)
    out.print(table)
    if left_out := report["pages_left_out"]:
        out.print(f"  and {left_out} more")


def _print_facts(report: dict[str, Any]) -> None:
    """A report of another kind: every fact on a line."""
    out.print(f"{_when(report)}  {line_of(report)}", markup=False)
    for name, value in report.items():
        if name not in ("format", "time_ns"):
            shown = value if isinstance(value, str | int | float) else json.dumps(value)
            out.print(f"  {name}: {shown}", markup=False)


def _when(report: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report["time_ns"] / 1e9))


def _yes(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"
