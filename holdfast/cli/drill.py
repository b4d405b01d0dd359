"""`holdfast drill`: break a server on purpose and judge what came of it.

A line as each drill ends, one table last, all of it as JSON with --json. Exit code 1 when a drill
failed, or when one did not fail under --sabotage.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from holdfast.cli.show import err, out
from holdfast.drill.registry import DRILLS, chosen
from holdfast.drill.report import Report, document, line, table
from holdfast.drill.runner import Plan, Runner, passed
from holdfast.errors import OptionError

EXIT_FAILED = 1
TABLE_COLUMNS = 170

drill = typer.Typer(
    name="drill",
    help="Break a running server on purpose, and see what its clients see.",
    no_args_is_help=True,
)


@drill.command("list")
def list_drills() -> None:
    """Every drill, what it breaks, and what --sabotage breaks besides."""
    for each in DRILLS:
        out.print(f"{each.name:<18}{each.what} ({each.streams} streams)", markup=False)
        for name, text in (("cases", _cases(each.cases)), ("sabotage", each.sabotage)):
            if text:
                out.print(f"{'':<18}{name}: {text}", style="dim", markup=False)


class Device(enum.StrEnum):
    """What breaks, and how tokens are judged, is told by the kind of device alone."""

    CPU = "cpu"
    CUDA = "cuda"


def _cases(cases: tuple[str, ...]) -> str:
    """address/decode, dma/decode, ... as kinds and phases."""
    columns = zip(*(case.split("/") for case in cases), strict=True)
    return " x ".join(", ".join(dict.fromkeys(column)) for column in columns)


@drill.command("run")
def run_drills(
    name: Annotated[str, typer.Argument(metavar="NAME|all", help="See `holdfast drill list`.")],
    model: Annotated[
        str | None, typer.Option(help="A folder or hub id. Left out: the bundled holdfast-tiny.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.CPU,
    streams: Annotated[
        int | None, typer.Option(help="Streams of each drill; left out, its own.", min=2)
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Cases of this kind only, e.g. address or decode.")
    ] = None,
    sabotage: Annotated[
        bool, typer.Option("--sabotage", help="Break something that the drill must see.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="On the CPU: judge tokens as on a GPU is done.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Every server replays decode steps from graphs.")
    ] = False,
    threads: Annotated[
        int, typer.Option(help="CPU threads of the worker and of the reference.", min=1)
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything here, too.")
    ] = None,
) -> None:
    """Start a server, break it, and judge every stream. Exit code 1 when a drill fails."""
    from holdfast.cli.engine import share_cores

    share_cores()
    if json_file is not None and not json_file.parent.is_dir():
        raise OptionError("--json", f"there is no folder {json_file.parent}")
    plan = Plan(
        drills=chosen(name),
        model=model,
        device=device.value,
        streams=streams,
        sabotage=sabotage,
        kind=kind,
        threads=threads,
        explain=explain,
        graphs=graphs,
    )
    runner = Runner(plan)
    try:
        reports = runner.run(_show)
    finally:
        runner.close()
    # Columns that are cut or folded say nothing: a narrow terminal wraps the lines instead.
    Console(width=max(out.width, TABLE_COLUMNS), highlight=False).print(table(reports))
    if json_file is not None:
        facts = document(reports, device=device.value, model=model or "holdfast-tiny")
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    bad = sum(not report.passed for report in reports)
    wrong = "were not caught" if sabotage else "failed"
    out.print(f"{len(reports) - bad} of {len(reports)} as they should be; {bad} {wrong}")
    if not passed(reports):
        raise typer.Exit(EXIT_FAILED)


def _show(report: Report) -> None:
    out.print(line(report), style="" if report.passed else "bold red", markup=False)
    if report.sabotage and report.passed:
        return
    for failure in report.failures:
        err.print(f"    {failure.kind}: {failure.text}", style="yellow", markup=False)
