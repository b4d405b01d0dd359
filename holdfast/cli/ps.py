"""`holdfast ps`: the running servers of this user, their processes and what state they are in.

Asks each server's supervisor (proc.status); a process's own title is all that is shown of it, since
options may hold secrets.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdfast.cli.show import out
from holdfast.proc import status
from holdfast.sizing import show_bytes


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the processes of running servers, and their state."""
    servers = status.read_all()
    if as_json:
        out.print_json(json.dumps(servers))
        return
    if not servers:
        out.print("no Holdfast server of yours runs here; start one with: holdfast serve")
    for server in servers:
        out.print(_table(server))
        # In full, under the table: what they say is too long for a column.
        for process in server["processes"]:
            if process["last_end"]:
                out.print(f"{process['title']} ended: {process['last_end']}", markup=False)


def _table(server: dict[str, Any]) -> Table:
    ready = "ready" if server["ready"] else "not ready"
    title = f"{server['model']} on {server['host']}:{server['port']}, {server['phase']}, {ready}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, side in (
        ("pid", "right"),
        ("process", "left"),
        ("state", "left"),
        ("since", "right"),
        ("memory", "right"),
        ("restarts", "right"),
    ):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_row(
        str(server["pid"]),
        server["title"],
        server["phase"],
        _age(server["uptime_s"]),
        show_bytes(server["rss_bytes"]),
        "",
    )
    for process in server["processes"]:
        table.add_row(
            str(process["pid"] or "-"),
            process["title"],
            process["state"],
            _age(process["since_s"]),
            show_bytes(process["rss_bytes"]),
            str(process["restarts"]),
        )
    return table


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
