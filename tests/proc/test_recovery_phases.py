"""The worker is killed with requests in every phase of their lives: clients see a pause.

The real worker with the bundled model, and what a client can hold against us: text, logprobs, why
and after how many tokens each choice ended. Which phases a kill really met is read from the report
of the fault, so that a kill that came too early or too late fails the test instead of proving
nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Server, until
from test_http_failover import MODEL, url
from test_standby import WORKER, prepared

from holdfast.api.format import LOGPROB_UNKNOWN

Serve = Callable[..., Server]
CONTEXT = 768
# 40 tokens of prompt a step beside the decode rows: a long prompt takes a dozen steps.
LIMITS = {
    "vocab_size": 6144,
    "context_tokens": CONTEXT,
    "pages": 400,
    "live_tokens": 1 << 15,
    "rows_max": 6,
    "queue_requests": 64,
    "prefill_tokens": 40,
}
# Kills at these chunks of a case: early, while the long prompts come, and of one that ends soon.
LATER_MOMENTS = (("greedy", 3), ("done", 1), ("greedy", 8), ("done", 3))
ROUNDS_MAX = 2 + len(LATER_MOMENTS)
SHARED = "The library keeps every book that was ever lent, and the librarian knows them all. " * 14
BASE: dict[str, Any] = {"model": "fake", "stream": True, "temperature": 0, "ignore_eos": True}


@dataclass
class Heard:
    """What the client of one request got, by choice."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    # How the text was cut is a matter of timing.
    chunks: int = field(default=0, compare=False)
    closed: bool = False

    def take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        usage = event.get("usage") or {}
        self.usage = {k: v for k, v in usage.items() if isinstance(v, int)} or self.usage
        for choice in event["choices"]:
            at = choice["index"]
            self.chunks += 1
            self.texts[at] = self.texts.get(at, "") + choice["text"]
            if choice["finish_reason"]:
                assert at not in self.reasons, "a choice ended twice"
                self.reasons[at] = choice["finish_reason"]
            if choice["logprobs"]:
                entries = choice["logprobs"]
                for names in zip(
                    entries["tokens"],
                    entries["token_logprobs"],
                    entries["top_logprobs"],
                    entries["text_offset"],
                    strict=True,
                ):
                    self.logprobs.setdefault(at, []).append(names)


def cases(stop: str | None = None) -> dict[str, dict[str, Any]]:
    """Requests by the phase or feature that they are there for."""
    long = {"max_tokens": 24, "temperature": 0.9, "priority": 8}
    return {
        # In this order: two that decode at once, then prompts that are long in coming.
        "greedy": {"prompt": "What a day", "max_tokens": 150, "priority": 9},
        "n": {"prompt": "A list is", "max_tokens": 60, "n": 3, "temperature": 0.9, "seed": 5},
        "logprobs": {"prompt": "A tuple is", "max_tokens": 90, "logprobs": 3},
        "penalties": {
            "prompt": "Say it again and again",
            "max_tokens": 70,
            "temperature": 0.7,
            "seed": 11,
            "presence_penalty": 0.6,
            "frequency_penalty": 0.4,
            "repetition_penalty": 1.2,
        },
        "stop": {"prompt": "The weather", "max_tokens": 150, **({"stop": [stop]} if stop else {})},
        "done": {"prompt": "Yes", "max_tokens": 3, "priority": 9},
        "json": {"prompt": '{"name": "Ada", "born": 1815, "works": ["', "max_tokens": 60},
        # Three that share a long prefix, and more than there are rows.
        **{f"long{n}": {"prompt": f"{SHARED} {n}", "seed": n, **long} for n in range(3)},
        "queued": {"prompt": "Wait for me", "max_tokens": 20, "seed": 3, "temperature": 1.0},
    }


class Crowd:
    """All cases at once on one server; `at`: called once, when that case has so many chunks, or
    when a choice of it ends: a slow reader gets several tokens in a chunk."""

    def __init__(
        self, server: Server, wanted: dict[str, dict[str, Any]], key: str | None = None
    ) -> None:
        self.server = server
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.wanted = wanted
        self.heard = {name: Heard() for name in wanted}
        self._at: tuple[str, int, Callable[[], None]] | None = None
        self._leaves: str | None = None

    def at(self, name: str, chunks: int, act: Callable[[], None]) -> Crowd:
        self._at = (name, chunks, act)
        return self

    def leaving(self, name: str) -> Crowd:
        """This client closes its connection right after `at` came."""
        self._leaves = name
        return self

    def run(self) -> dict[str, Heard]:
        asyncio.run(self._run())
        return self.heard

    async def _run(self) -> None:
        self._gone = asyncio.Event()
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=60, limits=limits, headers=self._headers) as client:
            await asyncio.gather(*(self._one(client, name) for name in self.wanted))

    async def _one(self, client: httpx.AsyncClient, name: str) -> None:
        body = {**BASE, **self.wanted[name], "stream_options": {"include_usage": True}}
        task = asyncio.create_task(self._read(client, name, body))
        if name != self._leaves:
            await task
            return
        await self._gone.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.heard[name].closed = True

    async def _read(self, client: httpx.AsyncClient, name: str, body: dict[str, Any]) -> None:
        heard = self.heard[name]
        address = url(self.server) + "/v1/completions"
        async with client.stream("POST", address, json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                heard.take(json.loads(line.removeprefix("data: ")))
                due = self._at is not None and self._at[0] == name
                if due and (heard.chunks >= self._at[1] or heard.reasons):
                    (_, _, act), self._at = self._at, None
                    act()
                    self._gone.set()


def kill(server: Server) -> Callable[[], None]:
    return lambda: os.kill(server.pids()[WORKER], signal.SIGKILL)


def newest_report(folder: Path, count: int) -> dict[str, Any]:
    files = until("a report", lambda: f if len(f := sorted(folder.glob("*.json"))) >= count else 0)
    return json.loads(files[-1].read_text())


def phases(report: dict[str, Any]) -> set[str]:
    """What the requests of a report were doing when the worker was lost."""
    found = set()
    for one in report["requests"]:
        if one["phase"] == "ENDED":
            found.add("just finished")
        elif one["phase"] == "RUNNING" and one["tokens"] > one["prompt_tokens"]:
            found.add("decoding")
        elif one["phase"] == "RUNNING":
            begun = 0 < one["planned_tokens"] < one["prompt_tokens"]
            found.add("mid-chunk" if begun else "admitted")
    if report["live"] > report["running"]:
        found.add("queued")
    return found


def test_requests_in_every_phase_go_on_as_if_nothing_had_happened(
    serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "faults"
    server = serve(
        api_processes=1,
        limits=LIMITS,
        modules={},
        model=MODEL,
        real=True,
        standby="warm",
        fault_dir=str(folder),
        # Prefixes are shared within a key, so that each round computes its prompts anew.
        api_keys=["clean", *(f"round {count}" for count in range(ROUNDS_MAX))],
        restarts_per_minute=2 * ROUNDS_MAX,
    ).wait_ready()
    # The stop string is one that the model says by itself, over several tokens.
    said = Crowd(server, {"stop": cases()["stop"]}, "clean").run()["stop"].texts[0]
    stop = said[len(said) // 3 : len(said) // 3 + 24]
    wanted = cases(stop)
    clean = Crowd(server, wanted, "clean").run()
    assert clean["stop"].reasons == {0: "stop"} and stop not in clean["stop"].texts[0]
    assert clean["n"].reasons == dict.fromkeys(range(3), "length")
    assert len(clean["logprobs"].logprobs[0]) == 90
    wanted_phases = {"queued", "mid-chunk", "decoding", "just finished"}
    met: set[str] = set()
    # Two kills always: among the prompts, and just before the stop string is complete. Which phases
    # they meet is a matter of how fast clients are beside the engine, so further moments follow
    # until all were met.
    moments = [("done", 2), ("stop", clean["stop"].chunks - 2), *LATER_MOMENTS]
    for count, (name, chunks) in enumerate(moments):
        if count >= 2 and met >= wanted_phases:
            break
        prepared(server)
        again = Crowd(server, wanted, f"round {count}").at(name, chunks, kill(server)).run()
        met |= phases(newest_report(folder, count + 1))
        for case, heard in clean.items():
            assert again[case] == heard, case
        until("the next epoch", lambda n=count: server.status()["epoch"] == n + 2)
    assert met >= wanted_phases, met


def test_a_client_that_leaves_while_there_is_no_worker_is_forgotten(serve: Serve) -> None:
    """And nobody else notices: neither its cancellation nor the worker's death."""
    server = serve(
        api_processes=1, limits=LIMITS, modules={}, model=MODEL, real=True, standby="none"
    ).wait_ready()
    wanted = {name: cases()[name] for name in ("greedy", "penalties", "n")}
    clean = Crowd(server, wanted).run()
    again = Crowd(server, wanted).at("greedy", 5, kill(server)).leaving("n").run()
    assert again["n"].closed and not again["n"].reasons
    for case in ("greedy", "penalties"):
        assert again[case] == clean[case], case

    def metric(name: str) -> float:
        lines = httpx.get(url(server) + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"holdfast_{name}"))

    until("it is forgotten", lambda: metric('requests_ended_total{reason="cancelled"}') == 3)
    until("nothing runs", lambda: metric("rows_running") == 0)
    assert server.status()["epoch"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_equal_whenever_the_worker_is_killed(serve: Serve, seed: int) -> None:
    """Five random moments each; a device of integers, whose text is wrong if a page or row is."""
    moments = random.Random(seed)
    limits = {**LIMITS, "context_tokens": 256, "pages": 128}
    options: dict[str, Any] = {"modules": {"worker": "sim_worker"}, "model": MODEL}
    server = serve(api_processes=1, limits=limits, extra={"step_s": 0.004}, **options).wait_ready()
    wanted = {
        "greedy": {"prompt": "What a day", "max_tokens": 60},
        "long": {"prompt": SHARED[:600], "max_tokens": 40, "n": 2, "seed": 1, "temperature": 1},
    }
    clean = Crowd(server, wanted).run()
    for kills in range(1, 6):
        name = moments.choice(["greedy", "long"])
        # "long" has two choices of 40 tokens; the last chunks are left for the kill to matter.
        at = moments.randint(1, 50)
        again = Crowd(server, wanted).at(name, at, kill(server)).run()
        assert again == clean, f"killed after {at} chunks of {name}"
        until("restarted", lambda n=kills: server.status()["epoch"] == n + 1)


def test_every_token_has_its_logprob_entry_when_the_core_dies(serve: Serve) -> None:
    """Those that were journalled and not sent have a value that says it is not known."""
    server = serve(
        api_processes=1, limits=LIMITS, modules={}, model=MODEL, real=True, standby="warm"
    ).wait_ready()
    wanted = {"logprobs": cases()["logprobs"], "n": {**cases()["n"], "logprobs": 1}}
    clean = Crowd(server, wanted).run()
    prepared(server)
    crowd = Crowd(server, wanted)

    def kill_core() -> None:
        os.kill(server.pids()["holdfast core"], signal.SIGKILL)

    again = crowd.at("logprobs", 10, kill_core).run()
    for name, before in clean.items():
        after = again[name]
        assert (after.texts, after.reasons, after.usage) == (
            before.texts,
            before.reasons,
            before.usage,
        )
        for choice, entries in before.logprobs.items():
            known = 0
            for old, new in zip(entries, after.logprobs[choice], strict=True):
                assert (new[0], new[3]) == (old[0], old[3]), "token and offset"
                assert new == old or new[1] == LOGPROB_UNKNOWN
                known += new == old
            assert known >= len(entries) - 4, "only the last steps of a core are not known"
    assert server.status()["epoch"] == 2
