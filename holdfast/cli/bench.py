"""`holdfast bench`: the figures in the README and in docs/benches.md, each by one command.

Every command prints a table; `--json FILE` also appends one row a figure. offline, decode, prefill
and generate are in cli.bench_llm.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.bench.report import SAFETY_OFF, Figure
from holdfast.cli.bench_llm import decode, generate, offline, prefill
from holdfast.cli.bench_options import (
    JsonFile,
    PeerOptions,
    Repeats,
    finish,
    model_name,
    numbers,
    safety_off,
)
from holdfast.cli.options import EngineOptions, Model, arguments, grouped
from holdfast.cli.show import bars
from holdfast.errors import OptionError

bench = typer.Typer(
    help="Measure: offline, decode, prefill, generate, serve, start, core.", no_args_is_help=True
)
bench.command()(offline)
bench.command()(decode)
bench.command()(prefill)
bench.command()(generate)

if TYPE_CHECKING:
    from holdfast.bench.process import Server
    from holdfast.config import Limits

ServerWords = Annotated[
    str,
    typer.Option(
        "--server-options",
        metavar="WORDS",
        help="Options for holdfast serve besides the engine's, as on its command line.",
    ),
]
ReadyTimeout = Annotated[
    float, typer.Option(help="A server must be ready within so many seconds.", min=1.0)
]


@bench.command()
@grouped
def serve(
    model: Model = None,
    *,
    concurrency: Annotated[
        str, typer.Option(help="Requests open at once, comma-separated.")
    ] = "1,64,256",
    input_tokens: Annotated[
        int, typer.Option("--input", help="Prompt tokens of each request.", min=1)
    ] = 512,
    output_tokens: Annotated[
        int, typer.Option("--output", help="Output tokens of each request.", min=2)
    ] = 256,
    prompts_per: Annotated[
        int, typer.Option(help="Requests of a run, for each place of concurrency.", min=1)
    ] = 4,
    repeats: Repeats = 3,
    url: Annotated[
        str | None, typer.Option(help="Load this server, http://HOST:PORT, and start none.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="The model's name there, with --url.")
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", help="Events a second of the HTTP side, with a null core.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Memory per idle connection and per queued request.")
    ] = False,
    streams: Annotated[
        int, typer.Option(help="Concurrent streams, with --null.", min=1, max=4000)
    ] = 64,
    seconds: Annotated[float, typer.Option(help="Time of a run, with --null.", min=0.5)] = 5.0,
    api_processes: Annotated[
        str, typer.Option(help="Numbers of api processes with --null, comma-separated.")
    ] = "1,2",
    run_timeout_s: Annotated[
        float, typer.Option(help="One run of the client takes no longer.", min=1.0)
    ] = 600.0,
    ready_timeout_s: ReadyTimeout = 600.0,
    server_options: ServerWords = "",
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """A server under load: output tokens per second, time to first token, inter-token latency."""
    if null + memory + (url is not None) > 1:
        raise OptionError("bench serve", "--null, --memory and --url exclude each other")
    if peers.peer is not None and (null or memory or url is not None):
        raise OptionError("--peer", "runs beside a server of ours; --url loads any other")
    if served_name is not None and url is None:
        raise OptionError("--served-name", "is for --url")
    if null or memory:
        from holdfast.bench import null as bench_null

        with bars(unit="") as progress:
            if memory:
                figures = bench_null.memory(repeats=repeats, report=progress)
            else:
                figures = bench_null.null(
                    numbers("--api-processes", api_processes),
                    streams=streams,
                    seconds=seconds,
                    repeats=repeats,
                    report=progress,
                )
        finish(figures, json_file)
        return

    from holdfast.bench import serve as bench_serve
    from holdfast.cli.engine import prepare, settings

    prepared = prepare(model, engine, gpu_processes=2)
    load = bench_serve.Load(
        prepared.spec.vocab_size,
        numbers("--concurrency", concurrency),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        prompts_per=prompts_per,
        repeats=repeats,
        timeout_s=run_timeout_s,
    )
    load.check_fits(prepared.sizing.limits.context_tokens)
    name = served_name or model_name(prepared)
    found: bench_serve.Answers = {}
    theirs: bench_serve.Answers = {}
    if url is not None:
        try:
            with bars(unit="") as progress:
                bench_serve.measure(url, name, load, progress, found, who=url, repeats=repeats)
        finally:  # What was measured before a failure stays measured.
            finish(bench_serve.figures(load, found, model=name, options={"url": url}), json_file)
        return
    words = _words(server_options)
    vllm = peers.vllm(prepared, engine)
    options = settings(prepared, engine) | _server_record(words, prepared.sizing.limits)
    peer = None if vllm is None else vllm.figure
    ours = _our_server(model, engine, words, ready_timeout_s)
    try:
        with bars(unit="") as progress:
            bench_serve.measure_server(
                ours, name, load, progress, found, repeats=repeats, facts=options
            )
            if vllm is not None:
                few = peers.runs(repeats)
                with vllm.server(name, prepared.spec) as server:
                    bench_serve.measure_server(server, name, load, progress, theirs, repeats=few)
    finally:
        figures = bench_serve.figures(
            load, found, model=name, options=options, peer=peer, theirs=theirs
        )
        finish(figures, json_file)


@bench.command()
@grouped
def start(
    model: Model = None,
    *,
    repeats: Repeats = 3,
    ready_timeout_s: ReadyTimeout = 600.0,
    server_options: ServerWords = "",
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """Seconds from a server's start to ready: with empty build caches, and again."""
    from holdfast.bench import start as bench_start
    from holdfast.cli.engine import prepare, settings

    prepared = prepare(model, engine, gpu_processes=2)
    words = _words(server_options)
    vllm = peers.vllm(prepared, engine)
    ours = _our_server(model, engine, words, ready_timeout_s)
    found: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    try:
        with bars(unit="") as progress:
            bench_start.measure(ours, found, repeats=repeats, report=progress)
            if vllm is not None:
                few = peers.runs(repeats)
                with vllm.server(model_name(prepared), prepared.spec) as server:
                    bench_start.measure(server, theirs, repeats=few, report=progress)
    finally:  # What was measured before a failure stays measured.
        figures = [
            Figure(
                bench="start",
                model=model_name(prepared),
                work=f"load {engine.load.value}",
                metric=kind,
                unit="s",
                runs=tuple(runs),
                peer=vllm.figure(tuple(theirs[kind])) if vllm and kind in theirs else None,
                options=settings(prepared, engine) | _server_record(words, prepared.sizing.limits),
            )
            for kind, runs in found.items()
        ]
        finish(figures, json_file)


@bench.command()
def core(
    rows: Annotated[str, typer.Option(help="Rows to measure, comma-separated.")] = "1,16,64,256",
    contexts: Annotated[
        str, typer.Option(help="Context lengths to measure, comma-separated.")
    ] = "512,4096,32768",
    steps: Annotated[int, typer.Option(help="Steps timed, each case and run.", min=10)] = 1000,
    repeats: Repeats = 3,
    json_file: JsonFile = None,
) -> None:
    """Microseconds of the brain's whole step, with a fake worker."""
    from holdfast.bench import core as bench_core

    with bars(unit="cases") as progress:
        figures = bench_core.run(
            rows=numbers("--rows", rows),
            contexts=numbers("--contexts", contexts),
            steps=steps,
            repeats=repeats,
            report=progress,
        )
    finish(figures, json_file)


def _words(server_options: str) -> list[str]:
    """Raises OptionError for quotes that no shell would take."""
    try:
        return shlex.split(server_options)
    except ValueError as error:
        raise OptionError("--server-options", f"{error}, in {server_options!r}") from None


def _our_server(
    model: str | None, engine: EngineOptions, words: list[str], timeout_s: float
) -> Server:
    from holdfast.bench.process import our_server

    return our_server(([] if model is None else [model]) + arguments(engine) + words, timeout_s)


def _server_record(words: list[str], limits: Limits) -> dict[str, Any]:
    """What of a server's own options a row keeps."""
    from holdfast.bench.process import word_of

    off = safety_off(words)
    said = word_of(words, "--steps-ahead", str(limits.steps_ahead))
    # A word that is no number is for the server to refuse.
    ahead = {"steps_ahead": int(said)} if said.isdigit() else {}
    return {"server_options": words} | ahead | ({SAFETY_OFF: off} if off else {})
