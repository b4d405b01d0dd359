"""What people see: consoles, progress bars and byte counts; plain text when nobody is watching.

Results go to stdout, progress and notes to stderr, so that output can be piped. Progress bars are
drawn on a terminal only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from holdfast.sizing import show_bytes

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# (what, done, total): what a long piece of work reports.
Report = Callable[[str, int, int], None]

# Work that is counted by the piece; all other is bytes.
_PIECES = ("graphs",)


def shown(what: str, done: int, total: int, unit: str = "bytes") -> str:
    """How far a piece of work is, for people."""
    if unit == "bytes" and what not in _PIECES:
        return f"{show_bytes(done)} of {show_bytes(total)}"
    return f"{done:,} of {total:,} {what if what in _PIECES else unit}"


@contextlib.contextmanager
def bars(*, unit: str = "bytes") -> Iterator[Report]:
    """A report function that draws one bar per `what`; it draws nothing off a terminal."""
    if not err.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=32),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, shown="")
            text = shown(what, done, total, unit)
            progress.update(tasks[what], completed=done, total=total, shown=text)

        yield report
