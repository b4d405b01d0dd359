"""`holdfast serve [MODEL]`: decide what fits, start the supervisor, show what happens.

Everything about processes is proc.supervisor's. API keys go into the options, never onto a command
line of a child; the supervisor retitles this process, so that `ps` does not show them either.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from holdfast.cli.options import (
    EngineOptions,
    LogLevel,
    Model,
    ServerOptions,
    Standby,
    grouped,
)
from holdfast.cli.show import err, shown
from holdfast.config import Computation

if TYPE_CHECKING:
    from holdfast.proc.lifecycle.actions import Notice
    from holdfast.proc.options import ServeOptions


@grouped
def serve(model: Model = None, *, server: ServerOptions, engine: EngineOptions) -> None:
    """Serve a model over an OpenAI-compatible API, until Ctrl-C or SIGTERM."""
    from holdfast.cli.engine import share_cores
    from holdfast.proc.supervisor import Supervisor

    share_cores()
    options = serve_options(model, server, engine)
    screen = Screen(options, server.log_level)
    try:
        code = Supervisor(options, on_event=screen.event).run()
    finally:
        screen.close()
    if code:
        raise typer.Exit(code)


def serve_options(model: str | None, server: ServerOptions, engine: EngineOptions) -> ServeOptions:
    """Everything resolved and checked. Raises OperatorError."""
    from holdfast.cli.engine import prepare
    from holdfast.proc.options import ServeOptions

    keys = server.keys()
    prepared = prepare(
        model,
        engine,
        gpu_processes=1 if server.standby is Standby.NONE else 2,
        api_processes=server.api_processes,
        timeout_s=server.request_timeout_s,
        steps_ahead=server.steps_ahead,
    )
    return ServeOptions(
        spec=prepared.spec,
        limits=prepared.sizing.limits,
        served_name=server.served_name or prepared.spec.path.resolve().name,
        host=server.host,
        port=server.port,
        api_keys=keys,
        cors_origins=tuple(server.cors_origin or ()),
        device=prepared.device,
        load=engine.load.value,
        dtype=prepared.sizing.dtype,
        pool_dtype=prepared.sizing.dtype,
        kernels=prepared.computation.kernels,
        graphs=prepared.computation.graphs,
        threads=engine.threads or os.cpu_count() or 1,
        standby=server.standby.value,
        scrub_gbps=server.scrub,
        step_timeout_s=server.step_timeout_s,
        drain_timeout_s=server.drain_timeout_s,
        write_timeout_s=server.write_timeout_s,
        keepalive_s=server.keepalive_s,
        journal_dir=server.journal_dir,
        journal_sync=server.journal_sync.value,
        fault_dir=server.fault_dir,
        fault_tokens=server.fault_tokens,
        gpu_coredump=server.gpu_coredump,
        log_level=server.log_level.value,
        drills=server.drills,
    )


class Screen:
    """The supervisor's events as lines on stderr; loading is a bar while there is a terminal."""

    def __init__(self, options: ServeOptions, level: LogLevel) -> None:
        self._options = options
        self._level = level
        self._progress: Progress | None = None
        self._bar: TaskID | None = None

    def event(self, event: Notice) -> None:
        if event.kind == "progress":
            self._load(event)
            return
        if event.kind == "ready":
            self.close()
            self._ready(event.facts["host"], event.facts["port"])
            return
        if event.kind in ("lost", "restarted"):
            self.close()  # A bar of a worker that was being prepared.
        bad = event.kind in ("lost", "failed", "warning")
        quiet = self._level in (LogLevel.WARNING, LogLevel.ERROR)
        # A recovery is told in one line: resumed, with its clocks.
        passing = ("starting", "prepared", "restarted")
        usual = event.kind in passing and self._level is not LogLevel.DEBUG
        if usual or (quiet and not bad):
            return
        line = f"{event.title}: {event.kind}"
        if event.message and event.message != event.kind:
            line += f": {event.message}"
        err.print(line, style="yellow" if bad else "", markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._bar = None

    def _load(self, event: Notice) -> None:
        if not err.is_terminal:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[at]}"),
            )
            self._progress = Progress(*columns, console=err, transient=True)
            self._progress.start()
            self._bar = self._progress.add_task("", total=event.total, at="")
        assert self._bar is not None
        self._progress.update(
            self._bar,
            description=f"{event.title}: {event.message}",
            completed=event.done,
            total=event.total,
            at=shown(event.message, event.done, event.total),
        )

    def _ready(self, host: str, port: int) -> None:
        """The address, and a line to paste; on stdout, so that a script can wait for it."""
        limits = self._options.limits
        kv_tokens = limits.pages_usable * limits.page_tokens
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            host, f"[{host}]" if ":" in host else host
        )
        address = f"http://{shown}:{port}"
        name = self._options.served_name
        print(f"holdfast serves {name} on {address}")
        if self._level not in (LogLevel.WARNING, LogLevel.ERROR):
            options = self._options
            computation = Computation(options.kernels, options.graphs)
            print(f"  {options.device}, {options.dtype}, {computation}")
            print(
                f"  {limits.rows_max} rows, {kv_tokens:,} KV tokens, "
                f"context {limits.context_tokens:,}; docs at {address}/docs; Ctrl-C ends it"
            )
            print("  try it:")
            text = (self._options.spec.path / "tokenizer.json").is_file()
            print(f"    {curl_line(address, name, keys=bool(self._options.api_keys), text=text)}")
        sys.stdout.flush()


def curl_line(address: str, name: str, *, keys: bool, text: bool = True) -> str:
    """A chat request for a shell; of ids, where the model has no tokenizer (`text`). With API keys
    it names the variable, never a key."""
    path, asked = (
        "chat/completions",
        {"messages": [{"role": "user", "content": "What is a list in Python?"}]},
    )
    if not text:
        path, asked = "completions", {"prompt": [1, 2, 3], "max_tokens": 16}
    body = json.dumps({"model": name, **asked})
    key = ' -H "Authorization: Bearer $HOLDFAST_API_KEY"' if keys else ""
    return (
        f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
