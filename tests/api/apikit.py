"""What the api tests share: tokenizers made on the spot, and a core at the other end of a link."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from holdfast.api.app import ApiConfig, create_app
from holdfast.api.client import CoreClient
from holdfast.api.template import ChatTemplate
from holdfast.api.text import Tokenizer
from holdfast.config import Limits
from holdfast.core.metrics import API_SLOT, Metrics, MetricsBoard
from holdfast.errors import LinkClosed
from holdfast.wire.link import Kind, Link
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Finish,
    Refused,
    Resume,
    State,
    Submit,
    TokenBatch,
    decode_to_core,
    encode,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello there! stop now STOP",
    "naïve café — Straße, 日本語のテキスト, 🙂 emoji 👩‍👩‍👧 family, Привет мир, ελληνικά",
    "def f(x):\n    return x + 1  # 0123456789",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VOCAB = 600
END_ID = 2


@cache
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE as Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


@cache
def byte_fallback() -> tokenizers.Tokenizer:
    """A BPE over characters with byte tokens for the rest, as Llama 2 and Mistral have it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in CORPUS[:1] for c in text.replace(" ", "▁")} | set("éabcxyz"))
    vocab = {word: at for at, word in enumerate([*words, *letters])}
    merges = []
    for pair in (("h", "e"), ("l", "l"), ("▁", "t"), ("▁t", "he"), ("he", "ll"), ("hell", "o")):
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def tokenizer_of(
    inner: tokenizers.Tokenizer | None = None, *, template: str | None = CHATML
) -> Tokenizer:
    special = {"eos_token": "<|im_end|>"}
    return Tokenizer(
        inner or byte_level(),
        vocab_size=VOCAB,
        end_ids=(END_ID, 0),
        template=None if template is None else ChatTemplate(template, special),
    )


@dataclass
class Row:
    """A choice as the fake core runs it. `script`: tokens and the end that comes with the last."""

    submit: Submit
    index: int
    id: int
    script: list[int]
    end: int
    sent: int = 0


@dataclass
class FakeCore:
    """The core's end of a link, on the test's event loop.

    `answer(submit, choice)` gives the tokens and the end; `held` keeps rows from being stepped.
    """

    link: Link
    answer: Callable[[Submit, int], tuple[list[int], int]]
    held: bool = False
    accepting: bool = True
    refuse: Refused | None = None
    cached: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    submits: list[Submit] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    finishes: list[tuple[int, int]] = field(default_factory=list)
    resumes: list[tuple[int, int]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self, *, ready: bool = True) -> FakeCore:
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.link.fileno(), self._read)
        self.send(State(ready, "ready" if ready else "the worker is starting"))
        return self

    def close(self) -> None:
        if self.link.fileno() >= 0:
            self.loop.remove_reader(self.link.fileno())
        self.link.close()
        self.rows.clear()

    def send(self, message: Any) -> None:
        self.link.send(Kind.MESSAGE, encode(message))

    def _read(self) -> None:
        try:
            frames = self.link.drain()
        except LinkClosed:
            self.close()
            return
        for kind, payload in frames:
            assert kind == Kind.MESSAGE
            self._take(decode_to_core(payload))
        self.changed.set()
        self._schedule()

    def _take(self, message: Any) -> None:
        if isinstance(message, Submit):
            self.submits.append(message)
            if self.refuse is not None:
                refused = self.refuse
                self.send(
                    Refused(
                        message.ids,
                        refused.status,
                        refused.message,
                        refused.field,
                        refused.code,
                        refused.retry_after_s,
                    )
                )
                return
            for index, request_id in enumerate(message.ids):
                script, end = self.answer(message, index)
                self.rows.setdefault(request_id, Row(message, index, request_id, script, end))
            if self.accepting:
                self.send(Accepted(message.ids))
        elif isinstance(message, Cancel):
            self.cancels += message.ids
            for request_id in message.ids:
                self.rows.pop(request_id, None)
        elif isinstance(message, Finish):
            self.finishes.append((message.id, message.tokens))
            self.rows.pop(message.id, None)
        elif isinstance(message, Resume):
            self.resumes += message.pairs

    def _schedule(self) -> None:
        if self.rows and not self.held and self.accepting:
            self.loop.call_soon(self.step)

    def step(self) -> None:
        """One token to every row, as one batch."""
        if self.link.fileno() < 0:
            return
        if not self.link.flush():
            self.loop.call_later(0.001, self.step)  # The api process has to read first.
            return
        rows = [row for row in self.rows.values() if row.sent < len(row.script)]
        if rows:
            self.batch([(r.id, r.sent, r.script[r.sent], self._end(r)) for r in rows])
        for row in rows:
            row.sent += 1
            if row.sent == len(row.script) and row.end:
                del self.rows[row.id]
        if rows and not self.held:
            self.loop.call_soon(self.step)

    @staticmethod
    def _end(row: Row) -> int:
        return row.end if row.sent == len(row.script) - 1 else 0

    def batch(self, rows: list[tuple[int, int, int, int]], *, top_k: int = 20) -> None:
        """Send (request, index, token, end) rows, with made-up logprobs."""
        k = len(rows)
        tokens = np.array([row[2] for row in rows], np.int32)
        top = (tokens[:, None] + np.arange(top_k, dtype=np.int32)) % 300
        values = -0.5 - np.arange(top_k, dtype=np.float32)
        batch = TokenBatch(
            step=1,
            requests=np.array([row[0] for row in rows], np.uint64),
            indexes=np.array([row[1] for row in rows], np.int32),
            tokens=tokens,
            ends=np.array([row[3] for row in rows], np.uint8),
            cached=np.full(k, self.cached, np.int32),
            top_k=top_k,
            logprobs=np.full(k, -0.5, np.float32),
            top_ids=top.astype(np.int32).reshape(-1),
            top_logprobs=np.tile(values, k).astype(np.float32),
        )
        self.link.send(Kind.TOKENS, batch.encode())


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Poll until `condition`, failing at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about"
        await asyncio.sleep(0.002)


@dataclass
class Kit:
    core: FakeCore
    client: CoreClient
    tokenizer: Tokenizer
    app: Any
    http: httpx.AsyncClient
    board: MetricsBoard
    limits: Limits

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        message = {"role": "user", "content": text}
        return await self.post(
            "/v1/chat/completions", {"model": "tiny", "messages": [message], **fields}
        )

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": "tiny", "prompt": prompt, **fields})

    def says(self, text: str, end: int = End.LENGTH) -> None:
        """Every choice answers with the tokens of `text`."""
        ids = self.tokenizer.encode(text)
        self.core.answer = lambda submit, choice: (ids, int(end))

    def new_core(self) -> FakeCore:
        """Another core in the place of the first."""
        ours, theirs = Link.pair()
        self.core = FakeCore(theirs, self.core.answer).open()
        self.client.set_link(ours)
        return self.core


@asynccontextmanager
async def kit(
    *,
    inner: tokenizers.Tokenizer | None = None,
    template: str | None = CHATML,
    limits: Limits | None = None,
    client_options: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Kit]:
    limits = limits or Limits(vocab_size=VOCAB, context_tokens=256)
    buffer = bytearray(Metrics.size(API_SLOT + 1))
    metrics, board = Metrics(buffer, API_SLOT), MetricsBoard(buffer, API_SLOT + 1)
    tokenizer = tokenizer_of(inner, template=template)
    client = CoreClient(limits, metrics, first_id=1, **(client_options or {}))
    ours, theirs = Link.pair()
    core = FakeCore(theirs, lambda submit, choice: ([10, 11, 12], int(End.LENGTH))).open()
    client.set_link(ours)
    settings = ApiConfig(limits=limits, served_name="tiny", **config)
    app = create_app(settings, client, tokenizer, metrics, board)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        await until(lambda: client.ready)
        try:
            yield Kit(core, client, tokenizer, app, http, board, limits)
        finally:
            client.close()
            core.close()


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, on a loop of its own and with a deadline."""

    def wrapper(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    wrapper.__name__ = test.__name__
    wrapper.__doc__ = test.__doc__
    wrapper.__signature__ = __import__("inspect").signature(test)  # pytest's parametrize reads it
    return wrapper


def events_of(text: str) -> list[Any]:
    """The SSE events of a body: parsed JSON, the string [DONE], or a comment."""
    found: list[Any] = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            found.append(block)
    return found


def bundled() -> Path:
    import holdfast

    return Path(holdfast.__file__).parent / "assets" / "holdfast-tiny"
