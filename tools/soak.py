"""Saturate a real server for minutes and demand that nothing is restarted: zero false restarts.

    python tools/soak.py --minutes 45 [--streams 24] [--json FILE] [-- OPTION OF SERVE ...]

It starts `holdfast serve` with the bundled model (on the CPU unless options say else), keeps many
clients busy with prompts of every length, leaves some of them at random moments and all of them at
the end, and kills the waiting standby now and then, so that the next one warms up beside the load.
At the end every process but the standby must be the one that was started, every answer complete,
and no fault counted but the standby's. Exit code 1 when not. Ends only what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from holdfast.proc import status

START_S = 180.0
STANDBY_KILL_S = 20.0
# An answer takes its time when dozens are computed on two busy cores.
ANSWER_S = 600.0
WORDS = ("tell", "me", "about", "lists", "in", "Python", "and", "how", "they", "grow", "?")


@dataclass
class Report:
    """What happened. codes: answers by HTTP status. wrong: what should not have been."""

    seconds: float = 0.0
    whole: int = 0
    left: int = 0
    events: int = 0
    standby_kills: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    exit_code: int | None = None
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One server under load; `run` once."""

    def __init__(
        self, streams: int, seconds: float, seed: int, options: Sequence[str] = ()
    ) -> None:
        self.streams, self.seconds = streams, seconds
        self.rng = random.Random(seed)
        self.report = Report()
        command = [sys.executable, "-m", "holdfast", "serve", "--port", "0", "--max-rows", "16"]
        self.server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)

    def run(self) -> Report:
        """Raises RuntimeError when the server does not start."""
        try:
            self.url = self._address()
            self.before = self._pids()
            asyncio.run(self._load())
            self._judge()
            self.server.send_signal(signal.SIGTERM)
            self.report.exit_code = self.server.wait(120)
            if self.report.exit_code != 0:
                self.report.wrong.append(f"exit code {self.report.exit_code}")
        finally:
            self.server.kill()
            self.server.wait()
        return self.report

    def _address(self) -> str:
        assert self.server.stdout is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            line = self.server.stdout.readline()
            if not line:
                break
            if found := re.search(r"http://\S+", line):
                return found.group()
        raise RuntimeError("the server did not start")

    def _pids(self) -> dict[str, int | None]:
        seen = status.read(self.server.pid)
        if seen is None:
            raise RuntimeError("the server does not say how it is")
        return {process["title"]: process["pid"] for process in seen["processes"]}

    async def _load(self) -> None:
        started = time.monotonic()
        end = started + self.seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=ANSWER_S, limits=limits) as client:
            clients = [self._client(client, end) for _ in range(self.streams)]
            await asyncio.gather(self._kill_standbys(end), *clients)
        self.report.seconds = round(time.monotonic() - started, 1)

    async def _client(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            try:
                await self._ask(client, end)
            except httpx.HTTPError as error:
                self.report.wrong.append(f"a stream broke: {error!r}")

    async def _ask(self, client: httpx.AsyncClient, end: float) -> None:
        rng = self.rng
        words = rng.choice([3, 30, 120, 400])
        tokens = rng.choice([1, 20, 100, 300])
        prompt = " ".join(rng.choice(WORDS) for _ in range(words))
        body = {"model": "holdfast-tiny", "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"ignore_eos": True, "temperature": rng.choice([0, 1]), "n": rng.choice([1, 1, 3])}
        leaves_after = rng.randint(0, 2 * tokens) if rng.random() < 0.3 else None
        async with client.stream("POST", self.url + "/v1/completions", json=body) as response:
            code = str(response.status_code)
            self.report.codes[code] = self.report.codes.get(code, 0) + 1
            if response.status_code != 200:
                self.report.wrong.append(f"{code}: {(await response.aread())[:200]!r}")
                await asyncio.sleep(0.5)
                return
            seen = 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    self.report.whole += 1
                    return
                if line.startswith("data: "):
                    seen += 1
                    self.report.events += 1
                    # The model may say "error" too: it is one where it stands beside no choice.
                    if '"error"' in line and "error" in json.loads(line.removeprefix("data: ")):
                        self.report.wrong.append(line[:200])
                leaves = leaves_after is not None and seen > leaves_after
                if leaves or time.monotonic() > end:
                    self.report.left += 1
                    return
        self.report.wrong.append("a stream ended without [DONE]")

    async def _kill_standbys(self, end: float) -> None:
        while time.monotonic() + STANDBY_KILL_S < end:
            await asyncio.sleep(STANDBY_KILL_S)
            pid = self._pids().get("holdfast standby 0")
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.report.standby_kills += 1

    def _judge(self) -> None:
        report, seen = self.report, status.read(self.server.pid)
        if seen is None:
            report.wrong.append("the server is gone")
            return
        report.epoch = seen["epoch"]
        for process in seen["processes"]:
            title = process["title"]
            if "standby" not in title and process["pid"] != self.before[title]:
                report.wrong.append(f"{title} was replaced: {process['last_end']}")
        text = httpx.get(self.url + "/metrics", timeout=30).text
        for kind, count in re.findall(r'faults_total\{kind="(\w+)"\} (\S+)', text):
            report.faults[kind] = float(count)
            if kind != "standby":
                report.wrong.append(f"{count} faults of kind {kind}")
        if report.epoch != 1:
            report.wrong.append(f"epoch {report.epoch}")
        if not report.whole:
            report.wrong.append("no answer was complete")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="of holdfast serve, behind --")
    asked = parser.parse_args()
    report = Soak(asked.streams, asked.minutes * 60, asked.seed, asked.options).run()
    text = json.dumps(asdict(report), indent=1)
    if asked.json:
        asked.json.write_text(text + "\n")
    print(text)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
