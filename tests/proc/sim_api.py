"""An api process that submits fixed requests and notes what it gets, token by token. Not a test.

`config["requests"]` requests of `config["tokens"]` tokens; a line of `config["log"]` a token:
[request, index, token], or [request, "end", reason]; one line ["boot", pid] at its start.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

import numpy as np

from holdfast.errors import LinkClosed
from holdfast.proc.child import boot
from holdfast.wire.link import Kind, Link
from holdfast.wire.messages import (
    Ended,
    Refused,
    Resume,
    Sampling,
    State,
    Submit,
    TokenBatch,
    decode_to_api,
    encode,
)

start = boot()
control = start.control()
log_fd = os.open(start.config["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def prompt_of(request: int) -> np.ndarray:
    return np.arange(request, request + 4 + request, dtype=np.int32) % start.limits.vocab_size


class Api:
    def __init__(self) -> None:
        self.link: Link | None = Link(start.socket("core"))
        self.submitted = False
        self.next_index = dict.fromkeys(range(start.config["requests"]), 0)
        self.live = set(self.next_index)

    def message(self, payload: bytes) -> None:
        message = decode_to_api(payload)
        if isinstance(message, State) and message.ready and not self.submitted:
            self.submitted = True
            for request in self.next_index:
                self.submit(request)
        elif isinstance(message, Ended):
            self.end(message.id, message.end)
        elif isinstance(message, Refused):
            note([message.ids[0], "refused", message.status])

    def submit(self, request: int) -> None:
        sampling = Sampling(temperature=0.0)
        prompt = prompt_of(request).tobytes()
        count = start.config["tokens"]
        self.send(Submit((request,), prompt, (1,), count, sampling, timeout_s=60.0))

    def tokens(self, batch: TokenBatch) -> None:
        for at, request in enumerate(batch.requests.tolist()):
            note([request, int(batch.indexes[at]), int(batch.tokens[at])])
            self.next_index[request] = int(batch.indexes[at]) + 1
            if batch.ends[at]:
                self.end(request, int(batch.ends[at]))

    def end(self, request: int, reason: int) -> None:
        note([request, "end", int(reason)])
        self.live.discard(request)

    def send(self, message: object) -> None:
        assert self.link is not None
        self.link.send(Kind.MESSAGE, encode(message))

    def resume(self, fd: int) -> None:
        self.link = Link(socket.socket(fileno=fd))
        if self.submitted:
            self.send(Resume(tuple((r, self.next_index[r]) for r in sorted(self.live))))


def note(line: list[object]) -> None:
    os.write(log_fd, json.dumps(line).encode() + b"\n")


def main() -> int:
    note(["boot", os.getpid()])
    api = Api()
    control.ready()
    while True:
        watched = [control, *([api.link] if api.link is not None else [])]
        readable, _, _ = select.select(watched, [], [], 60)
        if api.link in readable:
            try:
                for kind, payload in api.link.drain():
                    if kind == Kind.TOKENS:
                        api.tokens(TokenBatch.decode(payload))
                    else:
                        api.message(payload)
            except LinkClosed:
                api.link.close()
                api.link = None
        if control in readable:
            try:
                for message, fds in control.receive():
                    if message["type"] == "stop":
                        return 0
                    if message["type"] == "ping":
                        control.send({"type": "pong"})
                    if message["type"] == "core":
                        api.resume(fds[0])
            except LinkClosed:
                return 70


if __name__ == "__main__":
    sys.exit(main())
