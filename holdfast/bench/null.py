"""`holdfast bench serve --null|--memory`: the HTTP side alone, against a core that pretends.

The null core lives in this process and speaks the production protocol over production links: it
accepts every request and, with --null, gives each a token a step, as many as it asked for, the next
step as soon as the api process has read the last one.
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

import numpy as np

from holdfast.bench.load import request_bytes
from holdfast.bench.report import Figure
from holdfast.config import Limits
from holdfast.core.brain import Brain
from holdfast.core.journal import Journal
from holdfast.core.metrics import Metrics
from holdfast.errors import LinkError
from holdfast.model.spec import ModelSpec, resolve_model
from holdfast.proc import listen, memfd
from holdfast.proc.child import Child, spawn
from holdfast.proc.options import ServeOptions
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
    first_id,
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
        self._most: list[dict[int, int]] = [{} for _ in links]
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
        live, most = self._next[api], self._most[api]
        if not live or not self.talk or _unread(link):
            return False
        count = len(live)
        indexes = np.fromiter(live.values(), np.int32, count)
        last = indexes + 1 >= np.fromiter(most.values(), np.int32, count)
        batch = TokenBatch(
            step=step,
            requests=np.fromiter(live, np.uint64, count),
            indexes=indexes,
            tokens=self._words[(indexes * 31 + np.arange(count)) % self._words.size],
            ends=np.where(last, np.uint8(End.LENGTH), np.uint8(End.NONE)),
            cached=np.zeros(count, np.int32),
        )
        link.send(Kind.TOKENS, batch.encode())
        ended = [request for request, over in zip(live, last, strict=True) if over]
        for request in live:
            live[request] += 1
        for request in ended:
            self._forget(api, request)
        return True

    def _receive(self, api: int, link: Link, payload: bytes) -> None:
        message = decode_to_core(payload)
        if isinstance(message, Submit):
            link.send(Kind.MESSAGE, encode(Accepted(message.ids)))
            self._next[api].update((request, 0) for request in message.ids)
            self._most[api].update((request, message.max_tokens) for request in message.ids)
            self.accepted += len(message.ids)
        elif isinstance(message, Cancel):
            for request in message.ids:
                self._forget(api, request)
        elif isinstance(message, Finish):
            self._forget(api, message.id)

    def _forget(self, api: int, request: int) -> None:
        """Both tables have the same requests in the same order."""
        self._next[api].pop(request, None)
        self._most[api].pop(request, None)


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
            config = options.api_config() | {"first_id": first_id(index, 1)}
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
    counts: tuple[int, ...], *, streams: int, seconds: float, repeats: int, report: Report
) -> list[Figure]:
    """Events a second with each number of api processes, and each second of their CPU."""
    figures = []
    total = len(counts) * repeats
    for done, count in enumerate(counts):
        rates, cpu_rates = [], []
        with rig(count) as running:
            for run in range(repeats):
                report("bench serve --null", done * repeats + run, total)
                before = running.cpu_s()
                answer = _load(running, streams, seconds)
                cpu_s = running.cpu_s() - before
                rates.append(answer["events_per_s"])
                # The clients' start is in the CPU time and not in the events: a lower bound.
                cpu_rates.append(answer["events"] / max(cpu_s, 1e-9))
        for metric, runs in (("event rate", rates), ("event rate of an api CPU", cpu_rates)):
            figures.append(
                Figure(
                    bench="serve-null",
                    work=f"api processes {count}",
                    concurrency=streams,
                    metric=metric,
                    unit="events/s",
                    runs=tuple(runs),
                    options={"api_processes": count, "seconds": seconds},
                )
            )
    report("bench serve --null", total, total)
    return figures


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


def memory(*, repeats: int, report: Report) -> list[Figure]:
    """Bytes per idle connection and per queued request, in the api and in the core process."""
    rounds = []
    for run in range(repeats):
        report("bench serve --memory", run, repeats)
        rounds.append((*_api_bytes(), _brain_bytes_per_request()))
    report("bench serve --memory", repeats, repeats)
    names = (
        "idle connection, api process",
        f"queued request of {QUEUED_PROMPT_TOKENS} words, api process",
        f"queued request of {QUEUED_PROMPT_TOKENS} tokens, core process",
    )
    return [
        Figure(
            bench="serve-memory",
            work=name,
            metric="memory",
            unit="bytes",
            runs=runs,
            options={"connections": IDLE_CONNECTIONS, "requests": QUEUED_REQUESTS},
        )
        for name, runs in zip(names, zip(*rounds, strict=True), strict=True)
    ]


def _api_bytes() -> tuple[float, float]:
    """Of an api process: for one idle connection, and for one queued request."""
    with rig(1) as running:
        running.core.talk = False
        sockets = [_connect(running) for _ in range(16)]  # what the first ones allocate for all
        _settle(running)
        before = running.memory_bytes()
        sockets += [_connect(running) for _ in range(IDLE_CONNECTIONS)]
        _settle(running)
        idle = (running.memory_bytes() - before) / IDLE_CONNECTIONS
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
    return idle, queued


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
