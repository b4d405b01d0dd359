"""One module for every role: obeys the control protocol and nothing else, and says what it saw.

`config["log"]` names a file to which each process appends one JSON line an event; `config["act"]`
maps "<role>" to what it does differently. Not a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time

import setproctitle

from holdfast.errors import LinkClosed, ModelError
from holdfast.proc import memfd
from holdfast.proc.child import boot
from holdfast.proc.lifecycle.slot import title

start = boot()
control = start.control()
act = start.config.get("act", {}).get(start.role, "")
# A standby is a worker from its promotion on.
role = start.role


def log(event: str, **facts: object) -> None:
    line = {"role": role, "index": start.index, "pid": os.getpid(), "event": event, **facts}
    fd = os.open(start.config["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.close(fd)


def weights_sum() -> int:
    # A worker that did not load finds other bytes when it is told to.
    damaged = start.config.get("act", {}).get("worker", "") == "damaged"
    return (1 << 63) + (damaged and start.config["loaded"])


def main() -> int:
    global role
    config = {k: v for k, v in start.config.items() if k in ("epoch", "recover", "loaded")}
    log("boot", fds=sorted(start.fds), **config)
    if act == "operator":
        control.fault(ModelError("no such model"))
        return 2
    if act == "crash":
        return 3
    if act == "mute":
        time.sleep(600)
    if start.role == "keeper":
        names = () if act == "unshared" else ("weights", "pool")
        fds = [memfd.make(n, 4096, option="x") for n in names]
        control.send({"type": "ready", "unshared": "" if fds else "CUDA_ERROR"}, fds)
    else:
        if start.role == "worker":
            control.progress("weights", 1, 2)
        if act != "preparing":
            control.ready()
    watched = {control.fileno(): "control"}
    for name in ("core",):
        if name in start.fds:
            watched[start.fds[name]] = name
    held: list[int] = []
    introduced: dict[int, int] = {}
    while True:
        readable, _, _ = select.select(list(watched), [], [], 60)
        for fd in readable:
            if watched[fd] != "control":
                if not os.read(fd, 1 << 16):
                    log("eof", link=watched[fd])
                    del watched[fd]
                continue
            try:
                messages = control.receive()
            except LinkClosed:
                return 70
            for message, fds in messages:
                held += fds
                kind = message["type"]
                if kind == "ping":
                    control.send({"type": "pong"})
                    continue
                if kind == "promote":
                    role = "worker"
                    setproctitle.setproctitle(title("worker", start.index))
                log("message", message=message, fds=len(fds))
                if kind == "stop":
                    return 0
                if kind == "weights_sum":
                    ok = message["sum"] == 1 << 63 or not message["loaded"]
                    verdict = {"process": message["process"], "ok": ok, "step": message["step"]}
                    control.send({"type": "weights", **verdict})
                if kind == "verify" and act != "stuck":
                    control.send({"type": "weights_sum", "sum": weights_sum()})
                if kind == "worker" and start.role == "core":
                    # A worker may be gone again: a core hears of that by the next message.
                    with contextlib.suppress(OSError):
                        socket.socket(fileno=os.dup(fds[0])).send(b"hello")
                if kind == "api" and act == "accuse":
                    # Of whoever was there before, when the next one is there already.
                    before = introduced.get(message["index"])
                    introduced[message["index"]] = message["process"]
                    if before is not None:
                        accused = {"index": message["index"], "process": before}
                        control.send({"type": "api_fault", **accused, "detail": "late"})
                if kind == "drain" and start.role == "core" and act != "busy":
                    control.send({"type": "drained"})
                if kind == "end_all":
                    control.send({"type": "drained"})


if __name__ == "__main__":
    sys.exit(main())
