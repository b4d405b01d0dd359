"""`holdfast plan MODEL`: what fits on this machine, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from holdfast.cli.options import EngineOptions, Model, grouped
from holdfast.cli.show import out
from holdfast.sizing import Sizing, show_bytes

if TYPE_CHECKING:
    from holdfast.cli.engine import Prepared


@grouped
def plan(
    model: Model = None,
    *,
    engine: EngineOptions,
    api_processes: Annotated[
        int, typer.Option(help="HTTP processes to leave room for.", min=1, max=64)
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what fits before loading: weights, KV pages, tokens, rows.

    Reads the model's config only. `serve` with the same options decides the same.
    """
    from holdfast.cli.engine import prepare

    prepared = prepare(model, engine, gpu_processes=2, api_processes=api_processes)
    name, sizing = prepared.spec.path.name, prepared.sizing
    if as_json:
        computation = prepared.computation
        facts = {
            "model": name,
            "device": prepared.device,
            "kernels": computation.kernels,
            "graphs": computation.graphs,
            **sizing.as_dict(),
        }
        out.print_json(json.dumps(facts))
        return
    out.print(_table(name, prepared))


def _table(name: str, prepared: Prepared) -> Table:
    sizing = prepared.sizing
    limits = sizing.limits
    title = f"{name} on this machine's {prepared.device}, {sizing.dtype}, {prepared.computation}"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("why")
    rows = [
        ("memory available", show_bytes(sizing.available_bytes), "free now, within cgroup limits"),
        *_gpu_rows(sizing),
        ("weights", show_bytes(sizing.weights_bytes), "in shared memory, once"),
        ("KV cache", show_bytes(sizing.kv_bytes), f"set by {sizing.binds}"),
        ("journal", show_bytes(sizing.journal_bytes), "bound; grows with live requests"),
        ("processes", show_bytes(sizing.process_bytes), "code and buffers, estimated"),
        ("left", show_bytes(sizing.left_bytes), "for everything else on the machine"),
        ("KV of one token", show_bytes(sizing.kv_token_bytes), "keys and values of all layers"),
        (
            "KV pages",
            f"{limits.pages:,}",
            f"of {limits.page_tokens} tokens, {show_bytes(sizing.page_bytes)} each; one is trash",
        ),
        ("KV tokens", f"{sizing.kv_tokens:,}", "of all requests together"),
        ("context", f"{limits.context_tokens:,}", "tokens, prompt and answer of one request"),
        ("rows", f"{limits.rows_max:,}", "requests computed in one step"),
        ("step", f"{limits.prefill_tokens:,}", "tokens at most, prompts included"),
        (
            "mixed step",
            f"{limits.mixed_tokens:,}",
            "tokens at most that decode and take prompts",
        ),
        ("full rows", f"{sizing.full_rows:,}", "requests of the longest context at once"),
        ("queue", f"{limits.queue_requests:,}", "requests that may wait"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _gpu_rows(sizing: Sizing) -> list[tuple[str, str, str]]:
    """What a GPU adds: weights and KV cache are taken from its memory, not the machine's."""
    gpu = sizing.gpu
    if gpu is None:
        return []
    ours = f"{gpu.utilization:.0%} of {show_bytes(gpu.total_bytes)}, less what others hold"
    return [
        ("GPU memory to take", show_bytes(gpu.ours_bytes), ours),
        (
            "GPU work",
            show_bytes(sizing.gpu_work_bytes),
            f"contexts and steps of {gpu.processes} processes",
        ),
    ]
