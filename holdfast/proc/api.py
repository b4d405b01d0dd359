"""The api process: HTTP in front, one link to the core behind, the control channel beside.

Owns nothing but the wiring: uvicorn on the listening socket that the supervisor made, CoreClient on
the core's link, Metrics in its slot of the shared buffer. Obeys `core`, `core_lost`, `drain` and
`stop` (the table is in proc.child). Exit code 0 after stop, 70 after a fault of ours, 2 when the
model folder is no good. No torch, no device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.api.app import ApiConfig, create_app
from holdfast.api.client import CoreClient
from holdfast.api.ids import load_tokenizer
from holdfast.api.stream import ABORT_EXTENSION
from holdfast.core.metrics import API_SLOT, Metrics, MetricsBoard
from holdfast.errors import LinkClosed, LinkError, OperatorError
from holdfast.proc.child import EXIT_FAULT, EXIT_OPERATOR, Boot, boot
from holdfast.proc.control import Control
from holdfast.wire.link import Link

log = logging.getLogger("holdfast.api")

# Idle connections are kept so long: clients keep pools of them.
KEEP_ALIVE_S = 75
# Of one request, its first line included; a chat's headers are some hundred bytes.
HEADER_BYTES_MAX = 64 << 10
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)
# One whose head is too large may read that for so long.
REFUSED_S = 1.0
# A connection that sends no whole request head in so long is closed.
HEADER_TIMEOUT_S = 30.0


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on a request's head and a way to drop a stuck connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # Read and forgotten: an answer is lost when a connection is closed unread.
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._arm()
        super().data_received(data)
        if self._in_head and self._head_bytes > HEADER_BYTES_MAX:
            self._refused = True
            self.transport.write(_TOO_LARGE)
            self._disarm()
            self._head_timer = self.loop.call_later(REFUSED_S, self.drop)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._disarm()
        self.scope["extensions"] = {ABORT_EXTENSION: self.drop}
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        # A client that never took its last answer would keep a closing connection for ever.
        if self.transport.get_write_buffer_size():
            self.drop()
        super().timeout_keep_alive_handler()

    def drop(self) -> None:
        """Reset the connection: neither we nor the kernel keep what the client did not read."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.drop)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor's control channel ends us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiProcess:
    """Everything between `boot` and the exit code."""

    def __init__(self, started: Boot, control: Control) -> None:
        self._boot = started
        self._control = control
        self._writing = False
        self._server: _Server | None = None
        self._client: CoreClient | None = None

    async def run(self) -> int:
        """Serve until the supervisor says stop (0) or is gone."""
        config, limits = self._boot.config, self._boot.limits
        buffer = memoryview(mmap.mmap(self._boot.fds["metrics"], 0))
        slots = API_SLOT + limits.api_processes
        metrics = Metrics(buffer, API_SLOT + self._boot.index)
        tokenizer = load_tokenizer(
            Path(config["model"]), vocab_size=limits.vocab_size, ids_will_do=config["ids_will_do"]
        )
        client = CoreClient(
            limits,
            metrics,
            first_id=config["first_id"],
            write_timeout_s=config["write_timeout_s"],
            keepalive_s=config["keepalive_s"],
        )
        self._client = client
        client.set_link(Link(self._boot.socket("core")))
        app = create_app(
            ApiConfig(
                limits=limits,
                served_name=config["served_name"],
                api_keys=tuple(config["api_keys"]),
                cors_origins=tuple(config["cors_origins"]),
                body_bytes_max=config["body_bytes_max"],
            ),
            client,
            tokenizer,
            metrics,
            MetricsBoard(buffer, slots),
        )
        self._server = _Server(server_config(app, config))
        listen = self._boot.socket("listen")
        listen.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control.fileno(), self._obey)
        serving = asyncio.create_task(self._server.serve(sockets=[listen]))
        try:
            await self._announce(serving, listen)
            await serving
        finally:
            loop.remove_reader(self._control.fileno())
            client.close()
        return 0

    async def _announce(self, serving: asyncio.Task[None], listen: socket.socket) -> None:
        """Say ready once connections are accepted."""
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.005)  # uvicorn has no event for it; bounded by its own start.
        if not serving.done():
            self._control.ready(port=_port(listen))
            self._flush()

    def _obey(self) -> None:
        try:
            for message, fds in self._control.receive():
                self._command(message, fds)
        except LinkClosed:
            # The supervisor is gone, and PR_SET_PDEATHSIG is on its way.
            os._exit(EXIT_FAULT)

    def _command(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message.get("type")
        if kind == "core" and len(fds) == 1:
            self._client.set_link(Link(socket.socket(fileno=fds[0])))
        elif kind == "core_lost":
            self._client.lose_link(message["detail"])
        elif kind == "drain":
            self._client.drain()
        elif kind == "ping":
            self._control.send({"type": "pong"})
            self._flush()
        elif kind == "stop":
            self._client.drain()
            self._server.should_exit = True
        else:
            for fd in fds:
                os.close(fd)
            raise LinkError(f"control message {kind!r} with {len(fds)} descriptors")

    def _flush(self) -> None:
        """Control messages are few and small; what the supervisor does not read at once waits."""
        loop = asyncio.get_running_loop()
        done = self._control.flush()
        if done and self._writing:
            loop.remove_writer(self._control.fileno())
        elif not done and not self._writing:
            loop.add_writer(self._control.fileno(), self._flush)
        self._writing = not done


def server_config(app: Any, config: dict[str, Any]) -> uvicorn.Config:
    """uvicorn's settings for an api process; also for a bench that serves in its own process."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        loop="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config["drain_timeout_s"])),
        backlog=4096,
    )


def _port(listen: socket.socket) -> int | None:
    name = listen.getsockname()
    return name[1] if isinstance(name, tuple) else None


def main() -> int:
    started = boot()
    control = started.control()
    level = str(started.config["log_level"]).upper()
    logging.basicConfig(
        level=level, format=f"%(asctime)s %(levelname)s api {started.index}: %(message)s"
    )
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    process = ApiProcess(started, control)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(process.run())
    except (OperatorError, OSError, LinkError) as error:
        log.error("%s", error)
        with contextlib.suppress(LinkError):
            control.fault(error)
        return EXIT_OPERATOR if isinstance(error, OperatorError) else EXIT_FAULT


if __name__ == "__main__":
    sys.exit(main())
