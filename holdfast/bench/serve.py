"""`holdfast bench serve`: a server under closed-loop load, ours and a peer's, by the same client.

A server runs in processes of its own on a loopback port; the client (bench.client, which has the
definitions) in another. Each run sends `prompts_per` requests a place of concurrency, random token
ids that no other run has, so that nothing is cached; a peer gets the very same ids, after our
server has ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.bench.process import Server
from holdfast.bench.report import Figure, PeerFigure
from holdfast.bench.workload import even_work
from holdfast.errors import OperatorError, OptionError

PATH = "/v1/completions"
# (metric, unit, the client's key)
METRICS = (
    ("output rate", "tok/s", "output_rate"),
    ("TTFT mean", "ms", "ttft_mean_ms"),
    ("TTFT p99", "ms", "ttft_p99_ms"),
    ("ITL mean", "ms", "itl_mean_ms"),
    ("ITL p99", "ms", "itl_p99_ms"),
)
# More than one: tokens were merged into one event, and ITL are gaps between events.
MERGED = ("tokens an event", "tokens", "merged")

Report = Callable[[str, int, int], None]
# By concurrency: what the client said of each run.
Answers = dict[int, list[dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Load:
    """timeout_s: of one run at one concurrency."""

    vocab_size: int
    concurrencies: tuple[int, ...] = (1, 64, 256)
    input_tokens: int = 512
    output_tokens: int = 256
    prompts_per: int = 4
    repeats: int = 3
    timeout_s: float = 600.0

    @property
    def name(self) -> str:
        return f"{self.input_tokens} in, {self.output_tokens} out"

    def check_fits(self, context_tokens: int) -> None:
        """Raises OptionError for requests that are longer than the model's context."""
        longest = self.input_tokens + self.output_tokens
        if longest > context_tokens:
            raise OptionError(
                "--input", f"{longest} tokens in and out; this model takes {context_tokens}"
            )

    def prompts(self, concurrency: int, run: int) -> tuple[tuple[int, ...], ...]:
        return even_work(
            self.name,
            self.vocab_size,
            requests=concurrency * self.prompts_per,
            prompt_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            seed=concurrency * 1009 + run,
        ).prompts


def measure(
    url: str, model: str, load: Load, report: Report, answers: Answers, *, who: str, repeats: int
) -> None:
    """Load a server that is there; `answers` is told each run as it ends.

    Raises OperatorError with the client's words.
    """
    address = urllib.parse.urlsplit(url)
    if address.scheme != "http" or address.hostname is None or address.port is None:
        raise OptionError("--url", f"want http://HOST:PORT, got {url!r}")
    total, done = len(load.concurrencies) * repeats, 0
    for concurrency in load.concurrencies:
        for run in range(repeats):
            report(f"serve, {who}", done, total)
            job = {
                "host": address.hostname,
                "port": address.port,
                "path": PATH,
                "model": model,
                "prompts": load.prompts(concurrency, run),
                "output_tokens": load.output_tokens,
                "concurrency": concurrency,
                "timeout_s": load.timeout_s,
            }
            found = run_client(job, load.timeout_s)
            found["merged"] = found["output_tokens"] / found["events"]
            answers.setdefault(concurrency, []).append(found)
            done += 1
    report(f"serve, {who}", total, total)


def run_client(job: Mapping[str, Any], timeout_s: float) -> dict[str, float]:
    """What one process of the client says. Raises OperatorError."""
    with tempfile.TemporaryDirectory(prefix="holdfast-load-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "holdfast.bench.client", str(path)],
                capture_output=True,
                text=True,
                timeout=timeout_s + 60.0,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise OperatorError(f"the load client was not done within {timeout_s:g} s") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OperatorError(f"the load client failed: {last}") from None
    if "error" in found:
        raise OperatorError(f"under load: {found['error']}")
    return found


def figures(
    load: Load,
    ours: Answers,
    *,
    model: str,
    options: Mapping[str, Any],
    peer: Callable[[tuple[float, ...]], PeerFigure] | None = None,
    theirs: Answers | None = None,
) -> list[Figure]:
    """`peer` makes a peer's figure of its runs."""
    found = []
    for concurrency, answers in ours.items():
        others = (theirs or {}).get(concurrency)
        for metric, unit, key in (*METRICS, MERGED):
            other = None
            if peer is not None and others:
                other = peer(tuple(one[key] for one in others))
            found.append(
                Figure(
                    bench="serve",
                    model=model,
                    work=load.name,
                    concurrency=concurrency,
                    metric=metric,
                    unit=unit,
                    runs=tuple(one[key] for one in answers),
                    peer=other,
                    options={**options, "prompts_per": load.prompts_per},
                )
            )
    return found


def measure_server(
    server: Server,
    model: str,
    load: Load,
    report: Report,
    answers: Answers,
    *,
    repeats: int,
    facts: dict[str, Any] | None = None,
) -> None:
    """Start a server, load it once its standby is warm, end it: a standby that warms up takes turns
    with the streams, which is a figure of its own. `facts` is told how the standby was.

    Raises OperatorError with the server's or the client's words.
    """
    with server.running() as started:
        report(f"standby of {server.name}", 0, 1)
        standby = server.await_standby(started)
        if facts is not None and standby:
            facts["standby"] = standby
        measure(started.url, model, load, report, answers, who=server.name, repeats=repeats)
