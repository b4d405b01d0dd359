"""`holdfast bench offline|decode|prefill|generate`: LLM.generate against the clock.

`generate` is the first three with one start of each engine, as a session on a rented GPU wants it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.bench_options import (
    JsonFile,
    Peer,
    PeerOptions,
    Repeats,
    finish,
    model_name,
    numbers,
)
from holdfast.cli.options import EngineOptions, Model, grouped
from holdfast.cli.show import bars
from holdfast.errors import OptionError

if TYPE_CHECKING:
    from holdfast.bench.report import Figure
    from holdfast.bench.timed import Bench, OurSide, PeerSide
    from holdfast.bench.workload import Work
    from holdfast.cli.engine import Prepared

# The peers' scripts sample at this; greedy is what transformers is compared at.
PEERS_TEMPERATURE = 0.6
PREFILL_TOKENS = 4096


class WorkName(enum.StrEnum):
    MIXED = "mixed"
    PEERS = "peers"


Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0.0, max=2.0)]
Batches = Annotated[str, typer.Option("--batch", help="Rows of a step, comma-separated.")]
Context = Annotated[int, typer.Option(help="Prompt tokens of each row.", min=1)]
Steps = Annotated[int, typer.Option(help="Steps timed.", min=1)]
Prompts = Annotated[int, typer.Option(help="Prompts handed in at once.", min=1)]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of each prompt.",
        min=1,
        show_default=f"{PREFILL_TOKENS}, or what the context leaves",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the requests.")]
WorkChoice = Annotated[
    WorkName,
    typer.Option(help="mixed: 64..512 in, 64..256 out; peers: 100..1024 in and out, 256 requests."),
]
Requests = Annotated[int | None, typer.Option(help="Requests.  [64; peers 256]", min=1)]


@grouped
def offline(
    model: Model = None,
    *,
    work: WorkChoice = WorkName.MIXED,
    requests: Requests = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", show_default="0; peers 0.6", min=0.0, max=2.0),
    ] = None,
    repeats: Repeats = 3,
    seed: Seed = 0,
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """Output tokens per second of a pile of requests."""
    from holdfast.bench.offline import Offline

    prepared = _prepare(model, engine)
    vocab_size = prepared.spec.vocab_size
    if temperature is None:
        temperature = PEERS_TEMPERATURE if work is WorkName.PEERS else 0.0
    chosen = _work(work, vocab_size, requests, seed)
    bench = Offline(vocab_size, chosen, repeats=repeats, temperature=temperature)
    if peers.peer is Peer.TRANSFORMERS:
        if temperature:
            raise OptionError("--temperature", "transformers is compared greedy: say 0")
        _beside_transformers(prepared, engine, bench, json_file)
    else:
        _measure(prepared, engine, peers, [bench], json_file)


@grouped
def decode(
    model: Model = None,
    *,
    batch: Batches = "1,8,64",
    context: Context = 512,
    steps: Steps = 256,
    temperature: Temperature = PEERS_TEMPERATURE,
    repeats: Repeats = 3,
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """Milliseconds of a decode step, for each batch size."""
    from holdfast.bench.decode import Decode

    prepared = _prepare(model, engine)
    bench = Decode(
        prepared.spec.vocab_size,
        numbers("--batch", batch),
        context=context,
        steps=steps,
        repeats=repeats,
        temperature=temperature,
    )
    _measure(prepared, engine, peers, [bench], json_file)


@grouped
def prefill(
    model: Model = None,
    *,
    prompts: Prompts = 16,
    tokens: Tokens = None,
    temperature: Temperature = PEERS_TEMPERATURE,
    repeats: Repeats = 3,
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """Prompt tokens per second, up to the first token of every prompt."""
    from holdfast.bench.prefill import Prefill

    prepared = _prepare(model, engine)
    bench = Prefill(
        prepared.spec.vocab_size,
        prompts,
        tokens or _prefill_tokens(prepared),
        repeats=repeats,
        temperature=temperature,
    )
    _measure(prepared, engine, peers, [bench], json_file)


@grouped
def generate(
    model: Model = None,
    *,
    work: WorkChoice = WorkName.PEERS,
    requests: Requests = None,
    batch: Batches = "1,8,64",
    context: Context = 512,
    steps: Steps = 256,
    prompts: Prompts = 16,
    tokens: Tokens = None,
    temperature: Temperature = PEERS_TEMPERATURE,
    repeats: Repeats = 3,
    seed: Seed = 0,
    json_file: JsonFile = None,
    peers: PeerOptions,
    engine: EngineOptions,
) -> None:
    """offline, decode and prefill, with one start of each engine."""
    from holdfast.bench.decode import Decode
    from holdfast.bench.offline import Offline
    from holdfast.bench.prefill import Prefill

    prepared = _prepare(model, engine)
    vocab_size = prepared.spec.vocab_size
    shared: dict[str, Any] = {"repeats": repeats, "temperature": temperature}
    benches = [
        Offline(vocab_size, _work(work, vocab_size, requests, seed), **shared),
        Decode(vocab_size, numbers("--batch", batch), context=context, steps=steps, **shared),
        Prefill(vocab_size, prompts, tokens or _prefill_tokens(prepared), **shared),
    ]
    _measure(prepared, engine, peers, benches, json_file)


def _prepare(model: str | None, engine: EngineOptions) -> Prepared:
    from holdfast.cli.engine import prepare, share_cores

    prepared = prepare(model, engine, streams=False)
    share_cores()  # both sides run under the same setting; the row records it
    return prepared


def _work(name: WorkName, vocab_size: int, requests: int | None, seed: int) -> Work:
    from holdfast.bench import workload

    sizes = {} if requests is None else {"requests": requests}
    return workload.WORKS[name.value](vocab_size, seed=seed, **sizes)


def _prefill_tokens(prepared: Prepared) -> int:
    return min(PREFILL_TOKENS, prepared.sizing.limits.context_tokens - 1)


def _measure(
    prepared: Prepared,
    engine: EngineOptions,
    peers: PeerOptions,
    benches: Sequence[Bench],
    json_file: Path | None,
) -> None:
    """Ours, then the peer, then the figures of both."""
    from holdfast.bench import ours, timed
    from holdfast.cli.engine import open_prepared

    limits = prepared.sizing.limits
    timed.check_fits(benches, limits.context_tokens, limits.rows_max)
    peer = peers.vllm(prepared, engine)
    tasks = timed.all_tasks(benches)
    opener = functools.partial(open_prepared, prepared, engine)
    mine, side = timed.OurSide(), None if peer is None else peer.side()
    try:
        with bars(unit="") as report:
            # A peer needs the memory that this process would keep.
            run = ours.in_process if peer is None else ours.in_child
            run(opener, tasks, report, mine)
            if peer is not None and side is not None:
                few = [dataclasses.replace(b, repeats=peers.runs(b.repeats)) for b in benches]
                peer.measure(timed.all_tasks(few), report, side)
    finally:  # What was measured before a failure stays measured.
        finish(_figures(prepared, engine, benches, mine, side), json_file)


def _beside_transformers(
    prepared: Prepared, engine: EngineOptions, bench: Bench, json_file: Path | None
) -> None:
    """Round by round in this process, so that a change of the machine's speed meets both."""
    from holdfast.bench import ours, timed
    from holdfast.bench.peers.hf_generate import HfGenerate
    from holdfast.cli.engine import open_prepared, settings

    limits = prepared.sizing.limits
    timed.check_fits([bench], limits.context_tokens, limits.rows_max)
    warm_up, *tasks = timed.all_tasks([bench])
    threads = settings(prepared, engine)["threads"]
    other = HfGenerate(prepared.spec, prepared.sizing.dtype, threads, warm_up)
    mine = timed.OurSide()
    with bars(unit="tokens") as report, open_prepared(prepared, engine, report) as llm:
        mine.facts.update(ours.facts(llm))
        ours.time_task(llm, warm_up, report)
        for task in tasks:
            mine.spent[task.key] = ours.time_task(llm, task, report)
            other.round(task, report)
    finish(_figures(prepared, engine, [bench], mine, other.side()), json_file)


def _figures(
    prepared: Prepared,
    engine: EngineOptions,
    benches: Sequence[Bench],
    mine: OurSide,
    side: PeerSide | None,
) -> list[Figure]:
    from holdfast.bench import floors, timed
    from holdfast.bench.machine import gpu_name
    from holdfast.cli.engine import settings

    gpu = None if prepared.device == "cpu" else gpu_name()
    return timed.figures(
        benches,
        mine.spent,
        side,
        model=model_name(prepared),
        options=settings(prepared, engine)
        | mine.facts
        | {"temperature": benches[0].tasks()[0].temperature},
        floor=floors.of(prepared.spec, prepared.sizing.dtype, gpu, tuple(benches)),
    )
