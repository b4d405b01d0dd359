"""Inter-token latency of live streams while a standby prepares itself, on the CPU.

    python tools/bench_standby.py [--streams 8] [--rounds 5] [--foreground] [--json FILE]

A server with the bundled model runs `--streams` endless streams. Each round measures the gaps
between the tokens of each stream over a quiet window, kills the standby, and measures them again
while the next one is in state `starting`. `--foreground` prepares it at the usual priority instead,
which is what it would cost without proc.background. Bound: p99 at most 1.2 times the quiet one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from holdfast.bench.machine import environment
from holdfast.bench.report import Figure, append, summary
from holdfast.proc import status

QUIET_S = 4.0
SERVER = """
import sys
from holdfast.cli.engine import share_cores
from holdfast.cli.options import EngineOptions, ServerOptions, Standby
from holdfast.cli.serve import serve_options
from holdfast.proc.supervisor import Supervisor
import dataclasses

share_cores()
engine = EngineOptions(max_rows=64, max_context_tokens=2048, threads=int(sys.argv[2]))
options = serve_options(None, ServerOptions(port=0, standby=Standby.WARM), engine)
extra = {"background": False} if sys.argv[1] == "foreground" else {}
options = dataclasses.replace(options, restarts_per_minute=1000, extra=extra)
def show(event):
    if event.kind == "ready":
        print(event.facts["port"], flush=True)
sys.exit(Supervisor(options, on_event=show).run())
"""


class Streams:
    """Endless streams of one server; `gaps` are noted under the current label."""

    def __init__(self, port: int, count: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._count = count
        self.label = ""
        self.gaps: dict[str, list[float]] = {}

    async def run(self, script: Any) -> None:
        limits = httpx.Limits(max_connections=self._count)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            tasks = [asyncio.create_task(self._one(client, n)) for n in range(self._count)]
            await script
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "holdfast-tiny",
            "prompt": f"A list is number {number}",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
            "seed": number,
        }
        while True:
            async with client.stream("POST", self._url, json=body) as response:
                response.raise_for_status()
                before, label = None, self.label
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    # A gap counts where both of its ends lie in one window.
                    if before is not None and label and label == self.label:
                        self.gaps.setdefault(label, []).append(now - before)
                    before, label = now, self.label


def standby_of(pid: int) -> dict[str, Any]:
    found = status.read(pid)
    assert found is not None, "the server is gone"
    return {p["title"].split()[1]: p for p in found["processes"]}["standby"]


async def in_state(pid: int, state: str, streams: Streams, label: str) -> float:
    """Wait until the standby is in `state`, measuring under `label` meanwhile; the seconds."""
    start = time.perf_counter()
    streams.label = label
    while standby_of(pid)["state"] != state:
        await asyncio.sleep(0.02)
        if time.perf_counter() - start > 120:
            raise SystemExit(f"no standby in state {state} after 120 s")
    streams.label = ""
    return time.perf_counter() - start


async def rounds(pid: int, streams: Streams, count: int) -> list[float]:
    await in_state(pid, "prepared", streams, "")
    await asyncio.sleep(2)
    prepared_s = []
    for _ in range(count):
        streams.label = "quiet"
        await asyncio.sleep(QUIET_S)
        streams.label = ""
        os.kill(standby_of(pid)["pid"], signal.SIGKILL)
        await in_state(pid, "starting", streams, "")
        prepared_s.append(await in_state(pid, "prepared", streams, "warming"))
    return prepared_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--json", type=Path, help="append a row to this file")
    asked = parser.parse_args()
    mode = "foreground" if asked.foreground else "background"
    command = [sys.executable, "-c", SERVER, mode, str(asked.threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        streams = Streams(int(server.stdout.readline()), asked.streams)
        prepared_s: list[float] = []

        async def script() -> None:
            prepared_s.extend(await rounds(server.pid, streams, asked.rounds))

        try:
            asyncio.run(streams.run(script()))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    figures: dict[str, Any] = {
        "mode": mode,
        "model": "holdfast-tiny",
        "streams": asked.streams,
        "threads": asked.threads,
        "prepared_s": [round(seconds, 2) for seconds in prepared_s],
    }
    for label, gaps in streams.gaps.items():
        figures[f"{label}_gap_ms"] = {
            name: round(value, 2) for name, value in summary([gap * 1e3 for gap in gaps]).items()
        }
    figures["p99_ratio"] = round(
        figures["warming_gap_ms"]["p99"] / figures["quiet_gap_ms"]["p99"], 2
    )
    print(_text(figures))
    if asked.json is not None:
        append(asked.json, _figures(figures), environment())


def _figures(found: dict[str, Any]) -> list[Figure]:
    options = {"mode": found["mode"], "threads": found["threads"], "rounds_s": found["prepared_s"]}
    return [
        Figure(
            bench="standby",
            model=found["model"],
            work=f"{label} standby, {found['mode']}",
            concurrency=found["streams"],
            metric=f"ITL {share}",
            unit="ms",
            runs=(found[f"{label}_gap_ms"][share],),
            options=options,
        )
        for label in ("quiet", "warming")
        for share in ("p50", "p99")
    ]


def _text(figures: dict[str, Any]) -> str:
    lines = [f"{k}: {v}" for k, v in figures.items() if k.endswith("_gap_ms")]
    seconds = figures["prepared_s"]
    end = f"p99 {figures['p99_ratio']} times; prepared in {seconds} s ({figures['mode']})"
    return "\n".join([*lines, end])


if __name__ == "__main__":
    main()
