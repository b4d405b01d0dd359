"""`holdfast replay JOURNAL`: what a server was computing, computed again here, token by token.

Reading is proc.journal_files', running is holdfast.replay's; this is the table and the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from holdfast.cli.options import EngineOptions, grouped
from holdfast.cli.show import bars, err, out
from holdfast.errors import OptionError
from holdfast.wire.messages import End

if TYPE_CHECKING:
    from holdfast.core.journal import JournalledRequest
    from holdfast.proc.journal_files import JournalRun
    from holdfast.replay import Rerun

EXIT_DIFFERENT = 1


@grouped
def replay(
    journal: Annotated[
        Path,
        typer.Argument(
            metavar="JOURNAL", help="A folder of serve --journal-dir, or one file of it."
        ),
    ],
    *,
    request: Annotated[
        str | None,
        typer.Option(help="Only this request, also one that has ended; an id as shown here."),
    ] = None,
    ended: Annotated[
        bool, typer.Option("--ended", help="Also requests that had ended when the journal did.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Read damaged files up to their first damage.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Show the texts as well: prompts and answers.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A folder or hub id.", show_default="the bundled holdfast-tiny"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    engine: EngineOptions,
) -> None:
    """Run again what was live in a server's journal, and compare the tokens."""
    from holdfast.cli.engine import open_llm
    from holdfast.proc.journal_files import read_runs
    from holdfast.replay import rerun

    runs = read_runs(journal, partial=partial)
    run, chosen = choose(runs, request, ended)
    for note in run.notes:
        err.print(f"holdfast: {note}", markup=False, style="yellow")
    if not chosen:
        _print_nothing(run, as_json)
        return
    with open_llm(model, engine) as llm, bars(unit="requests") as report:
        reruns = rerun(llm, chosen, done=lambda over, all: report("running again", over, all))
        decode = llm.tokenizer.decode if text else None
        facts = [facts_of(one, decode) for one in reruns]
    if as_json:
        out.print_json(json.dumps({"run": run.name, "notes": run.notes, "requests": facts}))
    else:
        _print_table(run, facts)
    if not all(one.same for one in reruns):
        raise typer.Exit(EXIT_DIFFERENT)


def choose(
    runs: list[JournalRun], request: str | None, ended: bool
) -> tuple[JournalRun, list[JournalledRequest]]:
    """The newest run with what was asked for, and that. Raises OptionError when nobody has it."""
    if request is None:
        run = runs[-1]
        return run, [one for one in run.requests.values() if ended or not one.end]
    try:
        number = int(request, 0)
    except ValueError as error:
        message = f"a number like 0x0000123456789abc, got {request!r}"
        raise OptionError("--request", message) from error
    for run in reversed(runs):
        if number in run.requests:
            return run, [run.requests[number]]
    raise OptionError("--request", f"{request} is not in this journal, or not any more")


def facts_of(rerun: Rerun, decode: Any = None) -> dict[str, Any]:
    """One re-run as plain data; `decode` turns ids into text, or None."""
    import numpy as np

    request = rerun.request
    prompt = np.frombuffer(request.admission.prompt, np.int32).tolist()
    at = rerun.differs_at
    facts: dict[str, Any] = {
        "id": f"{request.admission.id:#018x}",
        "tenant": request.admission.tenant,
        "was": _was(request.end),
        "prompt_tokens": len(prompt),
        "journal_tokens": len(request.tokens),
        "rerun_tokens": len(rerun.tokens),
        "rerun_end": rerun.end.name.lower(),
        "compared": rerun.compared,
        "same": rerun.same,
        "differs_at": at,
        "journal_token": request.tokens[at] if at is not None else None,
        "rerun_token": rerun.tokens[at] if at is not None and at < len(rerun.tokens) else None,
        "error": rerun.refused or rerun.failed,
    }
    if decode is not None:
        facts["prompt"] = decode(prompt)
        facts["journal_text"] = decode(request.tokens)
        facts["rerun_text"] = decode(rerun.tokens)
    return facts


def _was(end: int) -> str:
    return End(end).name.lower() if end else "live"


def _print_nothing(run: JournalRun, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps({"run": run.name, "notes": run.notes, "requests": []}))
        return
    over = len(run.requests)
    out.print(f"nothing was live at the end of run {run.name}; {over} requests had ended (--ended)")


def _print_table(run: JournalRun, facts: list[dict[str, Any]]) -> None:
    table = Table(title=f"run {run.name}", title_justify="left")
    for name, side in (
        ("request", "left"),
        ("was", "left"),
        ("prompt", "right"),
        ("journal", "right"),
        ("re-run", "right"),
        ("verdict", "left"),
    ):
        table.add_column(name, justify=side, no_wrap=name == "request")  # type: ignore[arg-type]
    for one in facts:
        table.add_row(
            one["id"],
            one["was"],
            str(one["prompt_tokens"]),
            str(one["journal_tokens"]),
            f"{one['rerun_tokens']}, {one['rerun_end']}",
            "same" if one["same"] else "did not run" if one["error"] else "differs",
        )
    out.print(table)
    for one in facts:
        if not one["same"]:
            out.print(f"{one['id']} {_verdict(one)}", markup=False)
    for one in facts:
        if "prompt" in one:
            for name in ("prompt", "journal_text", "rerun_text"):
                out.print(f"{one['id']} {name}: {one[name]!r}", markup=False)
    same = sum(one["same"] for one in facts)
    tokens = sum(one["compared"] for one in facts)
    out.print(f"{same} of {len(facts)} requests say the same; {tokens} tokens compared")


def _verdict(one: dict[str, Any]) -> str:
    if one["error"]:
        return f"did not run: {one['error']}"
    if one["rerun_token"] is None:
        return f"the re-run ends at {one['differs_at']}"
    tokens = f"journal {one['journal_token']}, re-run {one['rerun_token']}"
    return f"differs at {one['differs_at']}: {tokens}"
