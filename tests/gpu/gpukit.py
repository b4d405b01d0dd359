"""What the GPU tests share: a keeper's memory, and a server with streams to break."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.proc import status
from holdfast.proc.child import Child, spawn

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


@contextlib.contextmanager
def keeper(weights_bytes: int, pool_bytes: int, device: str = "cuda:0") -> Iterator[dict[str, int]]:
    """The descriptors of a real keeper's GPU memory, by name."""
    config = {"weights_bytes": weights_bytes, "pool_bytes": pool_bytes, "device": device}
    child: Child = spawn("keeper", 0, module="holdfast.proc.keeper", config=config, fds={})
    fds: list[int] = []
    try:
        received = child.control.wait(DEADLINE_S)
        assert received is not None, "the keeper said nothing"
        message, fds = received
        assert message["type"] == "ready" and not message["unshared"], message
        yield dict(zip(("weights", "pool"), fds, strict=True))
    finally:
        for fd in fds:
            os.close(fd)
        child.kill()
        assert child.wait(DEADLINE_S) is not None
        child.close()


@dataclass
class Stream:
    """One completion being streamed: pieces of text with the moment each came (monotonic s)."""

    prompt: str
    pieces: list[str] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Server:
    """`holdfast serve` on a GPU, as a process; `stop` ends it and gives its stderr."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self._log = log.open("w+")
        command = [sys.executable, "-m", "holdfast", "serve", "--port", "0", *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT
        )
        self.started_s = time.monotonic()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if " on http://" not in line:
            self._process.wait(DEADLINE_S)
            raise AssertionError(f"no server: {self.log()[-3000:]}")
        self.ready_s = time.monotonic() - self.started_s
        self.name, _, address = line.split("serves ")[1].strip().partition(" on http://")
        self.host, _, port = address.rpartition(":")
        self.port = int(port)

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def status(self) -> dict[str, Any]:
        found = status.read(self._process.pid)
        assert found is not None, "the supervisor does not answer"
        return found

    def process(self, title: str) -> dict[str, Any]:
        return next(p for p in self.status()["processes"] if p["title"].startswith(title))

    def wait_standby(self) -> None:
        """Until the next kill finds what `--standby` promises; one that is cold is never waited
        for, since it has no process."""
        end_s = time.monotonic() + DEADLINE_S
        while not status.at_rest(self.status()):
            assert time.monotonic() < end_s, f"no standby: {self.log()[-3000:]}"
            time.sleep(0.05)

    def metrics(self) -> str:
        with self._connected() as connection:
            connection.request("GET", "/metrics")
            with connection.getresponse() as response:
                return response.read().decode()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        try:
            yield connection
        finally:
            connection.close()

    def stream(
        self, prompts: list[str], tokens: int
    ) -> tuple[list[Stream], list[threading.Thread]]:
        """Begin a greedy completion a prompt; the threads end with their streams."""
        streams = [Stream(prompt) for prompt in prompts]
        threads = [
            threading.Thread(target=self._read, args=(stream, tokens), daemon=True)
            for stream in streams
        ]
        for thread in threads:
            thread.start()
        return streams, threads

    def answer(self, prompts: list[str], tokens: int) -> list[Stream]:
        streams, threads = self.stream(prompts, tokens)
        for thread in threads:
            thread.join(DEADLINE_S)
        return streams

    def _read(self, stream: Stream, tokens: int) -> None:
        body = {
            "model": self.name,
            "prompt": stream.prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        kind = {"Content-Type": "application/json"}
        try:
            with self._connected() as connection:
                connection.request("POST", "/v1/completions", json.dumps(body), kind)
                with connection.getresponse() as response:
                    _take(response, stream)
        except OSError as error:
            stream.error = repr(error)

    def stop(self) -> str:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(DEADLINE_S)
        text = self.log()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        return text

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def until_streaming(streams: list[Stream], pieces: int) -> None:
    """Every stream has shown at least so many pieces."""
    end_s = time.monotonic() + DEADLINE_S
    while not all(len(stream.pieces) >= pieces for stream in streams):
        failed = [stream.error for stream in streams if stream.error]
        assert not failed, failed
        assert time.monotonic() < end_s, [len(stream.pieces) for stream in streams]
        time.sleep(0.002)


def _take(response: http.client.HTTPResponse, stream: Stream) -> None:
    """Read an answer's events until its end."""
    if response.status != 200:
        stream.error = f"{response.status} {response.read()[:300]!r}"
        return
    for raw in response:
        line = raw.decode().strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            stream.error = str(event["error"])
            return
        for choice in event["choices"]:
            if choice["text"]:
                stream.pieces.append(choice["text"])
                stream.at_s.append(time.monotonic())
            stream.finish = choice["finish_reason"] or stream.finish
