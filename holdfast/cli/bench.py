"""`holdfast bench offline|core|serve`: the figures in the README, each by one command.

Prints a table; `--json FILE` also appends a row with machine, versions, commit and all runs.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.options import EngineOptions, Model, grouped
from holdfast.cli.show import bars, out
from holdfast.errors import OptionError

bench = typer.Typer(help="Measure: offline, core, serve.", no_args_is_help=True)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Append a row (JSON lines) to FILE.")
]


class WorkName(enum.StrEnum):
    MIXED = "mixed"
    PEERS = "peers"


class Peer(enum.StrEnum):
    TRANSFORMERS = "transformers"


@bench.command()
@grouped
def offline(
    model: Model = None,
    *,
    work: Annotated[
        WorkName,
        typer.Option(
            help="mixed: 64..512 in, 64..256 out; peers: 100..1024 in and out, 256 requests."
        ),
    ] = WorkName.MIXED,
    requests: Annotated[int | None, typer.Option(help="Requests.  [64; peers 256]", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each side; the median counts.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    peer: Annotated[
        Peer | None,
        typer.Option(help="Also run transformers generate, batch 8, 32, 64, on the same requests."),
    ] = None,
    json_file: JsonFile = None,
    engine: EngineOptions,
) -> None:
    """Output tokens per second of LLM.generate, in this process."""
    from holdfast.bench import offline as bench_offline
    from holdfast.bench import report, workload
    from holdfast.cli.engine import prepare, share_cores

    prepared = prepare(model, engine)
    share_cores()  # both sides run in this process, under the same setting; the row records it
    vocab = prepared.spec.vocab_size
    sizes = {} if requests is None else {"requests": requests}
    chosen = workload.WORKS[work.value](vocab, seed=seed, **sizes)
    longest = max(map(sum, zip(map(len, chosen.prompts), chosen.output_tokens, strict=True)))
    if longest > prepared.sizing.limits.context_tokens:
        raise OptionError(
            "--work",
            f"{work.value} has a request of {longest} tokens; this model takes "
            f"{prepared.sizing.limits.context_tokens}",
        )
    with bars(unit="tokens") as progress:
        row = bench_offline.run(
            prepared.spec,
            prepared.sizing,
            chosen,
            device=prepared.device,
            kernels=prepared.kernels,
            load=engine.load.value,
            threads=engine.threads or os.cpu_count() or 1,
            repeats=repeats,
            peer=peer is not None,
            report=progress,
        )
    out.print(bench_offline.show(row))
    if json_file is not None:
        report.append(json_file, {"bench": "offline", **row, **report.environment()})


@bench.command()
def core(
    rows: Annotated[str, typer.Option(help="Rows to measure, comma-separated.")] = "1,16,64,256",
    contexts: Annotated[
        str, typer.Option(help="Context lengths to measure, comma-separated.")
    ] = "512,4096,32768",
    steps: Annotated[int, typer.Option(help="Steps timed, each case.", min=10)] = 1000,
    as_json: Annotated[bool, typer.Option("--json-out", help="Print JSON, no table.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Microseconds of the brain's whole step, with a fake worker."""
    import json

    from holdfast.bench import core as bench_core
    from holdfast.bench import report

    with bars(unit="cases") as progress:
        cases = bench_core.run(
            rows=_numbers("--rows", rows),
            contexts=_numbers("--contexts", contexts),
            steps=steps,
            report=progress,
        )
    row = {"bench": "core", "cases": cases, **report.environment()}
    if as_json:
        out.print_json(json.dumps(row))
    else:
        out.print(bench_core.show(cases))
    if json_file is not None:
        report.append(json_file, row)


@bench.command()
def serve(
    null: Annotated[
        bool, typer.Option("--null", help="Events a second of the HTTP side, with a null core.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Memory per idle connection and per queued request.")
    ] = False,
    streams: Annotated[int, typer.Option(help="Concurrent streams.", min=1, max=4000)] = 64,
    seconds: Annotated[float, typer.Option(help="Time measured.", min=0.5)] = 5.0,
    api_processes: Annotated[
        str, typer.Option(help="Numbers of api processes to measure, comma-separated.")
    ] = "1,2",
    json_file: JsonFile = None,
) -> None:
    """What the HTTP side alone can do: events a second, and memory."""
    from holdfast.bench import report
    from holdfast.bench import serve as bench_serve

    if null == memory:
        raise OptionError("bench serve", "say what to measure: --null or --memory")
    counts = _numbers("--api-processes", api_processes)
    with bars(unit="") as progress:
        if null:
            cases = bench_serve.null(counts, streams=streams, seconds=seconds, report=progress)
        else:
            cases = bench_serve.memory(report=progress)
    row = {"bench": "serve-null" if null else "serve-memory", "cases": cases}
    out.print(bench_serve.show(cases))
    if json_file is not None:
        report.append(json_file, {**row, **report.environment()})


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise OptionError(option, f"positive numbers separated by commas, got {text!r}")
    return numbers
