"""`holdfast bench serve`: the HTTP side alone, real api processes against a core that pretends.

The null core lives in this process and speaks the production protocol over production links: it
accepts every request and, with --null, gives each a token a step, the next step as soon as the api
process has read the last one.
Clients are another process (bench.load). So what is measured is parsing, validation, tokenising,
detokenising, JSON, SSE and sockets: everything of an answer but the engine. All of it shares the
machine's cores; events per second of api CPU time is the figure that carries over to larger ones.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.bench.load import request_bytes
from holdfast.bench.report import table
from holdfast.config import Limits
from holdfast.core.brain import Brain
from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.errors import LinkError
from holdfast.model.spec import ModelSpec, resolve_model
from holdfast.proc import listen, memfd
from holdfast.proc.child import Child, spawn
from holdfast.proc.options import ServeOptions
from holdfast.sizing import show_bytes
from holdfast.wire.link import Kind, Link
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Finish,
    Sampling,
    State,
    Submit,
    TokenBatch,
    decode_to_core,
    encode,
)

HOST = "127.0.0.1"
READY_TIMEOUT_S = 60.0
# Nothing tells when a peer has read; a step of 64 streams takes an api process more than this.
POLL_S = 0.0002
# Tokens a stream may have in all: none ends while it is measured.
CONTEXT_TOKENS = 1 << 20
IDLE_CONNECTIONS = 1000
QUEUED_REQUESTS = 1000
QUEUED_PROMPT_TOKENS = 256

Report = Callable[[str, int, int], None]


class NullCore:
    """Speaks a core's side of every api link, in a thread of its own. `talk`: give tokens."""

    def __init__(self, links: list[Link], vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._links = links
        self._next: list[dict[int, int]] = [{} for _ in links]
        self._stop = threading.Event()
        self.talk = True
        self.failed: BaseException | None = None
        self.accepted = 0
        # Ordinary ids only: the upper half of a BPE vocabulary is words, not bytes or marks.
        words = np.arange(vocab_size // 2, vocab_size, dtype=np.int32)
        self._words = words[~np.isin(words, end_ids)]
        self._thread = threading.Thread(target=self._run, name="null core", daemon=True)

    def start(self) -> None:
        for link in self._links:
            link.send(Kind.MESSAGE, encode(State(True, "null core")))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        if self.failed is not None:
            raise RuntimeError(f"the null core failed: {self.failed}") from self.failed

    def _run(self) -> None:
        try:
            step = 0
            while not self._stop.is_set():
                step += 1
                # Every link is served, also after one that had something to do.
                moved = [self._serve(api, link, step) for api, link in enumerate(self._links)]
                if not any(moved):
                    select.select(self._links, [], [], POLL_S)
        except (LinkError, OSError) as error:
            if not self._stop.is_set():
                self.failed = error

    def _serve(self, api: int, link: Link, step: int) -> bool:
        """Answer what came and give a step's tokens; False when there was nothing to do."""
        for kind, payload in link.drain():
            if kind == Kind.MESSAGE:
                self._receive(api, link, payload)
        link.flush()
        live = self._next[api]
        if not live or not self.talk or _unread(link):
            return False
        count = len(live)
        indexes = np.fromiter(live.values(), np.int32, count)
        batch = TokenBatch(
            step=step,
            requests=np.fromiter(live, np.uint64, count),
            indexes=indexes,
            tokens=self._words[(indexes * 31 + np.arange(count)) % self._words.size],
            ends=np.full(count, End.NONE, np.uint8),
            cached=np.zeros(count, np.int32),
        )
        link.send(Kind.TOKENS, batch.encode())
        for request in live:
            live[request] += 1
        return True

    def _receive(self, api: int, link: Link, payload: bytes) -> None:
        message = decode_to_core(payload)
        live = self._next[api]
        if isinstance(message, Submit):
            link.send(Kind.MESSAGE, encode(Accepted(message.ids)))
            live.update((request, 0) for request in message.ids)
            self.accepted += len(message.ids)
        elif isinstance(message, Cancel):
            for request in message.ids:
                live.pop(request, None)
        elif isinstance(message, Finish):
            live.pop(message.id, None)


def _unread(link: Link) -> int:
    """Bytes that the peer has not read yet: a step is given when the one before was taken, so that
    a token is an event, as with a real engine, and none are merged."""
    (queued,) = struct.unpack("i", fcntl.ioctl(link.sock, termios.TIOCOUTQ, b"\0" * 4))
    return queued + link.unsent_bytes


@dataclasses.dataclass(slots=True)
class Rig:
    options: ServeOptions
    port: int
    children: list[Child]
    core: NullCore

    def cpu_s(self) -> float:
        """CPU seconds that the api processes have used so far."""
        ticks = 0
        for child in self.children:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Private memory of the api processes: what they would give back."""
        total = 0
        for child in self.children:
            for line in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Dirty:", "Private_Clean:")):
                    total += int(line.split()[1]) * 1024
        return total


@contextmanager
def rig(api_processes: int) -> Iterator[Rig]:
    """`api_processes` real api processes with the bundled model's tokeniser, and a null core."""
    spec = ModelSpec.load(resolve_model(None))
    limits = Limits(
        vocab_size=spec.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        live_tokens=1 << 34,
        timeout_s=3600.0,
        api_processes=api_processes,
    )
    options = ServeOptions(
        spec=spec, limits=limits, served_name=spec.path.name, host=HOST, port=0, log_level="error"
    )
    with ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in listen.listen(HOST, 0, api_processes)]
        metrics = memfd.make("metrics", Metrics.size(2 + api_processes), option="memory")
        stack.callback(os.close, metrics)
        links, children = [], []
        for index, sock in enumerate(sockets):
            ours, theirs = Link.pair()
            stack.callback(ours.close)
            fds = {"core": theirs.fileno(), "listen": sock.fileno(), "metrics": metrics}
            config = options.api_config()
            child = spawn("api", index, module="holdfast.proc.api", config=config, fds=fds)
            stack.callback(_end, child)
            theirs.close()
            links.append(ours)
            children.append(child)
        for child in children:
            _await_ready(child)
        core = NullCore(links, spec.vocab_size, spec.end_ids)
        core.start()
        stack.callback(core.stop)
        yield Rig(options, sockets[0].getsockname()[1], children, core)


def _await_ready(child: Child) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while (left := deadline - time.monotonic()) > 0:
        said = child.control.wait(left)
        if said is not None and said[0]["type"] == "ready":
            return
        if said is not None and said[0]["type"] == "fault":
            raise RuntimeError(f"{child.title}: {said[0]['message']}")
    raise RuntimeError(f"{child.title} was not ready within {READY_TIMEOUT_S} s")


def _end(child: Child) -> None:
    child.kill()
    child.wait(10.0)
    child.close()


def null(
    counts: tuple[int, ...], *, streams: int, seconds: float, report: Report
) -> list[dict[str, Any]]:
    """Events a second with each number of api processes."""
    cases = []
    for done, count in enumerate(counts):
        report("bench serve --null", done, len(counts))
        with rig(count) as running:
            before = running.cpu_s()
            answer = _load(running, streams, seconds)
            cpu_s = running.cpu_s() - before
        cases.append(
            {
                "what": f"{streams} streams, {count} api process{'es' if count > 1 else ''}",
                "api_processes": count,
                "streams": streams,
                **{name: round(value, 1) for name, value in answer.items()},
                "api_cpu_s": round(cpu_s, 2),
                # The clients' start is in the CPU time and not in the events: a lower bound.
                "events_per_api_cpu_s": round(answer["events"] / max(cpu_s, 1e-9), 1),
            }
        )
    report("bench serve --null", len(counts), len(counts))
    return cases


def _load(running: Rig, streams: int, seconds: float) -> dict[str, float]:
    arguments = [HOST, running.port, streams, seconds]
    arguments += [running.options.served_name, CONTEXT_TOKENS - 1024]
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.bench.load", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load client failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def memory(*, report: Report) -> list[dict[str, Any]]:
    """Bytes per idle connection and per queued request, in the api and in the core process."""
    with rig(1) as running:
        running.core.talk = False
        sockets = [_connect(running) for _ in range(16)]  # what the first ones allocate for all
        _settle(running)
        before = running.memory_bytes()
        sockets += [_connect(running) for _ in range(IDLE_CONNECTIONS)]
        _settle(running)
        idle = (running.memory_bytes() - before) / IDLE_CONNECTIONS
        report("bench serve --memory", 1, 3)
        prompt = " word" * QUEUED_PROMPT_TOKENS
        request = request_bytes(
            HOST, model=running.options.served_name, max_tokens=256, prompt=prompt
        )
        accepted = running.core.accepted
        before = running.memory_bytes()
        for sock in sockets[:QUEUED_REQUESTS]:
            sock.sendall(request)
        _wait_for(lambda: running.core.accepted - accepted >= QUEUED_REQUESTS)
        _settle(running)
        queued = (running.memory_bytes() - before) / QUEUED_REQUESTS
        for sock in sockets:
            sock.close()
    report("bench serve --memory", 2, 3)
    brain = _brain_bytes_per_request()
    report("bench serve --memory", 3, 3)
    return [
        {"what": "idle connection, api process", "bytes": round(idle)},
        {
            "what": f"queued request of {QUEUED_PROMPT_TOKENS} words, api process",
            "bytes": round(queued),
        },
        {
            "what": f"queued request of {QUEUED_PROMPT_TOKENS} tokens, core process",
            "bytes": round(brain),
        },
    ]


def _connect(running: Rig) -> socket.socket:
    """A connection that has had one answer and stays open, as clients with a pool keep them."""
    sock = socket.create_connection((HOST, running.port), timeout=10.0)
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n")
    if b" 200 " not in sock.recv(4096)[:32]:
        raise RuntimeError("/health did not answer 200")
    return sock


def _settle(running: Rig) -> None:
    """Wait until the api processes' memory has stopped moving (two equal readings)."""
    seen = [-1]

    def still() -> bool:
        seen.append(running.memory_bytes())
        return abs(seen[-1] - seen[-2]) < 16384

    _wait_for(still, pause_s=0.2)


def _wait_for(done: Callable[[], bool], *, pause_s: float = 0.02, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not there within {timeout_s} s")
        time.sleep(pause_s)


def _brain_bytes_per_request(count: int = QUEUED_REQUESTS) -> float:
    """Python and numpy memory of the brain for one waiting request, by tracemalloc."""
    limits = Limits(vocab_size=32_000, context_tokens=4096, rows_max=4)
    journal = Journal(memoryview(bytearray(Journal.size(limits))), limits)
    brain = Brain(limits, journal, Metrics(memoryview(bytearray(Metrics.size(1))), 0))
    prompt = np.arange(QUEUED_PROMPT_TOKENS, dtype=np.int32)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        submit = Submit(
            ids=(number + 1,),
            prompt=(prompt + number).tobytes(),
            seeds=(number,),
            max_tokens=256,
            sampling=Sampling(),
            deadline_s=600.0,
        )
        brain.receive(0, submit, 0.0)
        brain.take_output()
    gc.collect()
    spent = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return spent / count


def show(cases: list[dict[str, Any]]) -> str:
    """A table of `null`'s or `memory`'s answer."""
    if "bytes" in cases[0]:
        rows = [(case["what"], show_bytes(case["bytes"])) for case in cases]
        return table(("memory for one", "bytes"), rows)
    rows = [
        (
            case["what"],
            f"{case['events_per_s']:,.0f}",
            f"{case['events_per_api_cpu_s']:,.0f}",
            f"{case['bytes_per_event']:.0f}",
        )
        for case in cases
    ]
    return table(("HTTP side alone", "events/s", "per api CPU s", "bytes each"), rows)
