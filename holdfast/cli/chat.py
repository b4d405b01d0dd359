"""`holdfast chat`: a conversation in the terminal, with a model in this process or a server.

Both ends are one protocol here: `Talk.answer(messages)` yields pieces of text. Ctrl-C stops an
answer, Ctrl-D or /exit leaves. Off a terminal, each line of stdin is a turn, so it can be scripted.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from holdfast.cli.generate import SamplingOptions
from holdfast.cli.options import EngineOptions, Model, grouped
from holdfast.cli.show import err, out
from holdfast.errors import EngineFault, OptionError, RequestError

if TYPE_CHECKING:
    from holdfast.api.schema import SamplingParams
    from holdfast.llm import LLM

Messages = list[dict[str, str]]
HELP = "/clear forgets the conversation, /exit leaves (or Ctrl-D); Ctrl-C stops an answer"
CONNECT_TIMEOUT_S = 10.0
# The server sends a keep-alive comment far more often than this on a stream that is silent.
READ_TIMEOUT_S = 120.0


class Talk(Protocol):
    def answer(self, messages: Messages) -> Iterator[str]: ...


@grouped
def chat(
    model: Model = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to this running server instead, e.g. http://127.0.0.1:8000"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for --url.", envvar="HOLDFAST_API_KEY")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Talk to a model in the terminal, streaming."""
    if url is not None:
        _converse(ServerTalk(url, model, api_key, sampling), system)
        return
    from holdfast.cli.engine import open_llm

    params = sampling.params()
    with open_llm(model, engine) as llm:
        _converse(LocalTalk(llm, params), system)


class LocalTalk:
    """Answers by a model in this process."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        if not llm.has_chat_template:
            raise OptionError("MODEL", "has no chat template; use: holdfast generate --raw")
        self._llm = llm
        self._params = params

    def answer(self, messages: Messages) -> Iterator[str]:
        stream = self._llm.stream_chat(messages, self._params)
        with asyncio.Runner() as runner:
            try:
                while True:
                    try:
                        delta = runner.run(anext(stream))
                    except StopAsyncIteration:
                        return
                    yield delta.text
            finally:
                # Also on Ctrl-C and when the reader stops: the request must not go on computing.
                runner.run(stream.aclose())


class ServerTalk:
    """Answers by a server that speaks OpenAI's API, over the standard library's HTTP client."""

    def __init__(
        self, url: str, model: str | None, api_key: str | None, sampling: SamplingOptions
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError("--url", f"is no http address: {url!r}")
        try:
            self._port = parts.port
        except ValueError as error:
            raise OptionError("--url", f"{error}: {url!r}") from error
        self._parts = parts
        self._key = api_key
        self._sampling = sampling
        self._model = model or self._first_model()

    def answer(self, messages: Messages) -> Iterator[str]:
        sampling = self._sampling
        body = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "stop": sampling.stop or None,
        }
        connection, response = self._ask("POST", "/v1/chat/completions", body)
        try:
            for event in _events(response):
                if "error" in event:
                    raise EngineFault(event["error"].get("message", "the server reports an error"))
                for choice in event.get("choices", ()):
                    yield choice["delta"].get("content") or ""
        finally:
            connection.close()

    def _first_model(self) -> str:
        connection, response = self._ask("GET", "/v1/models", None)
        try:
            return json.loads(response.read())["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise OptionError("--url", "that server does not speak OpenAI's API") from error
        finally:
            connection.close()

    def _ask(
        self, method: str, path: str, body: dict | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send one request. OptionError: there is no server; RequestError: it says no."""
        parts = self._parts
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", self._port, timeout=CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        base = parts.path.rstrip("/").removesuffix("/v1")
        try:
            connection.connect()
            connection.sock.settimeout(READ_TIMEOUT_S)
            data = None if body is None else json.dumps(body)
            connection.request(method, base + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise OptionError(
                "--url", f"no server answers at {parts.netloc} ({error}); start it: holdfast serve"
            ) from error
        if response.status != 200:
            message = _error_message(response.read())
            connection.close()
            raise RequestError(f"the server says {response.status}: {message}")
        return connection, response


def _events(response: http.client.HTTPResponse) -> Iterator[dict]:
    """Parsed `data:` lines of a server-sent event stream, up to [DONE]."""
    try:
        for line in response:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    except (OSError, http.client.HTTPException) as error:
        raise EngineFault(f"the stream broke off: {error}") from error
    raise EngineFault("the stream ended without its last event")


def _error_message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]


def _converse(talk: Talk, system: str | None) -> None:
    opening: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    people = sys.stdin.isatty()
    if people:
        err.print(f"[dim]{HELP}[/dim]")
    while (line := _read_turn(people)) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(opening)
            continue
        if line == "/help":
            err.print(HELP)
            continue
        if line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(talk, messages, people)})


def _read_turn(people: bool) -> str | None:
    """The next line, None at the end. Ctrl-C at the prompt leaves, as Ctrl-D does."""
    if not people:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return out.input("[bold]you[/bold]  ").strip()
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None


def _answer(talk: Talk, messages: Messages, people: bool) -> str:
    """Print one answer as it comes and return what was printed of it."""
    pieces: list[str] = []
    if people:
        out.print("[bold cyan]it[/bold cyan]   ", end="")
    stream = talk.answer(messages)
    try:
        for piece in stream:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not people:
            raise
    except RequestError as error:
        # One turn failed (too long a conversation, a busy server): the talk itself goes on.
        if not people:
            raise
        err.print(f"[red]{error}[/red]", markup=True)
    finally:
        stream.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(pieces)
