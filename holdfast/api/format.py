"""The JSON of both endpoints: whole answers, stream chunks, usage, logprobs, errors.

Owns OpenAI's shapes and nothing else. What does not change from chunk to chunk is serialised once a
stream; a chunk then costs one small orjson.dumps. Knows no asyncio, no HTTP and no core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from holdfast import __version__
from holdfast.api.output import TokenLogprob
from holdfast.api.text import Tokenizer
from holdfast.errors import RequestError

FINGERPRINT = f"holdfast-{__version__}"
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
# What OpenAI's schema says for a token that is not among those counted: after a fault, tokens that
# the journal gave back have no logprob any more.
LOGPROB_UNKNOWN = -9999.0


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Answer:
    """One finished choice of a whole answer; logprobs None when nobody asked."""

    index: int
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None


class Format(Protocol):
    """Chat or plain completions. Chunks are complete SSE events, as bytes."""

    def opening(self, index: int) -> bytes: ...
    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes: ...
    def closing(self, index: int, reason: str) -> bytes: ...
    def usage(self, usage: Usage) -> bytes: ...
    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one response says of it."""

    id: str
    model: str
    created: int
    include_usage: bool = False
    want_logprobs: bool = False
    names_as_ids: bool = False

    def json(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def head(self, kind: str) -> bytes:
        return b"data: " + orjson.dumps(self.json(kind))[:-1]

    @property
    def tail(self) -> bytes:
        return b'}],"usage":null}\n\n' if self.include_usage else b"}]}\n\n"


class ChatFormat:
    def __init__(self, envelope: Envelope, tokenizer: Tokenizer) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._bare = envelope.head("chat.completion.chunk")
        self._head = self._bare + b',"choices":[{"index":'
        self._tail = envelope.tail
        self._plain_end = b'},"logprobs":null,"finish_reason":null' + self._tail

    def opening(self, index: int) -> bytes:
        """The first chunk of a choice, which names the role."""
        delta = b',"delta":{"role":"assistant","content":""'
        return self._head + b"%d" % index + delta + self._plain_end

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        body = self._head + b"%d" % index + b',"delta":{"content":' + orjson.dumps(text)
        if not logprobs:
            return body + self._plain_end
        values = orjson.dumps(self._logprobs(logprobs))
        return body + b'},"logprobs":' + values + b',"finish_reason":null' + self._tail

    def closing(self, index: int, reason: str) -> bytes:
        end = b',"delta":{},"logprobs":null,"finish_reason":"%s"' % reason.encode()
        return self._head + b"%d" % index + end + self._tail

    def usage(self, usage: Usage) -> bytes:
        return self._bare + b',"choices":[],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ]
        head = self._envelope.json("chat.completion")
        return orjson.dumps({**head, "choices": choices, "usage": usage.json()})

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for entry in entries:
            shown = self._one(entry.token, entry.logprob)
            pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
            shown["top_logprobs"] = [self._one(token, value) for token, value in pairs]
            content.append(shown)
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self._tokenizer.show(token)
        name = f"token_id:{token}" if self._envelope.names_as_ids else text
        return {"token": name, "logprob": _value(logprob), "bytes": list(data)}


class CompletionFormat:
    """`echoes`: index -> text of the prompt to be shown before the answer."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, echoes: dict[int, str]) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._bare = envelope.head("text_completion")
        self._head = self._bare + b',"choices":[{"index":'
        self._tail = envelope.tail
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._tail

    def opening(self, index: int) -> bytes:
        echo = self._echoes.get(index)
        return self.chunk(index, echo, ()) if echo else b""

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        body = self._head + b"%d" % index + b',"text":' + orjson.dumps(text)
        if not logprobs:
            return body + self._plain_end
        values = orjson.dumps(self._logprobs(logprobs))
        return body + b',"logprobs":' + values + b',"finish_reason":null' + self._tail

    def closing(self, index: int, reason: str) -> bytes:
        end = b',"text":"","logprobs":null,"finish_reason":"%s"' % reason.encode()
        return self._head + b"%d" % index + end + self._tail

    def usage(self, usage: Usage) -> bytes:
        return self._bare + b',"choices":[],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = [
            {
                "index": answer.index,
                "text": self._echoes.get(answer.index, "") + answer.text,
                "logprobs": None if answer.logprobs is None else self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ]
        head = self._envelope.json("text_completion")
        return orjson.dumps({**head, "choices": choices, "usage": usage.json()})

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        tops = []
        for entry in entries:
            top: dict[str, float] = {}
            for token, value in zip(entry.top_ids, entry.top_logprobs, strict=True):
                top.setdefault(self._name(token), _value(value))
            # OpenAI: the drawn token is always among them, so there may be one more than asked.
            top.setdefault(self._name(entry.token), _value(entry.logprob))
            tops.append(top)
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [_value(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": [entry.offset for entry in entries],
        }

    def _name(self, token: int) -> str:
        """Distinct for distinct bytes, since names are keys: half characters are spelt out."""
        if self._envelope.names_as_ids:
            return f"token_id:{token}"
        text, data = self._tokenizer.show(token)
        if text.encode() == data:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def error_json(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object. The message names the field too: people read it alone."""
    named = error.field is None or error.field in error.message
    inner = {
        "message": error.message if named else f"{error.field}: {error.message}",
        "type": error.kind,
        "param": error.field,
        "code": error.code,
    }
    return {"error": inner}


def error_event(error: RequestError) -> bytes:
    """An error in the middle of a stream, as an SSE event."""
    return b"data: " + orjson.dumps(error_json(error)) + b"\n\n"


def _value(logprob: float | None) -> float:
    """JSON has no infinity; what is less likely than the sentinel is shown as the sentinel."""
    return LOGPROB_UNKNOWN if logprob is None else max(logprob, LOGPROB_UNKNOWN)
