"""What api and core say to each other. Ids, not text: the core never sees a character.

    api -> core    Submit, Cancel, Finish, Resume
    core -> api    Accepted, Refused, Ended, TokenBatch (one a step and api process), State

A request id names one choice of one client request; api draws them, `id >> 48` is the index of the
api process that owns it, and they are never reused, so that a resent message is harmless.
Token `index` counts from 0 in each request and reaches the api once, in order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec
import numpy as np

from holdfast.wire.arrays import ArrayLayout


class End(enum.IntEnum):
    """Why a request ended; NONE while it runs. Every admitted request ends exactly once."""

    NONE = 0
    STOP = 1  # an end token, a stop id, or a stop string found by api
    LENGTH = 2  # max_tokens or the context is full
    CANCELLED = 3  # by its client
    DEADLINE = 4
    ENGINE_FAULT = 5  # it alone cannot be finished (quarantine, too few pages)
    NOT_FINITE = 6  # its logits were NaN or infinite
    SHUTDOWN = 7  # the server drained past its own deadline


class Memory(enum.StrEnum):
    """What became of the device's memory between two workers: whose word the brain takes for it."""

    KEPT = "kept"  # weights verified after the fence: the bytes that were loaded; pages outlived it
    RELOADED = "reloaded"  # weights failed their check and were loaded anew: what they computed
    # since they were last found good is void
    LOST = "lost"  # the pool is new memory: every page is void


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Resolved sampling parameters of a request: validated, with ids only (see plan.ADMIT).

    stop_ids: ids that end the request, the model's end tokens included unless ignored.
    bias: (id, value) pairs with distinct ids. top_logprobs: -1 = none asked.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    top_logprobs: int = -1
    stop_ids: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Admit all of `ids` (the n choices of one request) or none of them.

    prompt: int32 little-endian ids as bytes, at least one. seeds: one uint64 an id.
    max_tokens: output allowance, >= 1; prompt + max_tokens <= context_tokens.
    timeout_s: from now until the deadline. tenant: the API key's stable name, "" without keys.
    priority: higher is served first.
    """

    ids: tuple[int, ...]
    prompt: bytes
    seeds: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    timeout_s: float
    tenant: str = ""
    priority: int = 0


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The client is gone. Unknown and ended ids are ignored. No token follows; no Ended either."""

    ids: tuple[int, ...]


class Finish(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A stop string ends the request after its first `tokens` tokens; later ones are void."""

    id: int
    tokens: int


class Resume(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """After the core came back: send tokens of these requests from `next_index` on.

    pairs: (id, next_index). Ids the core does not know are answered with Refused status 0, and api
    submits them anew with the tokens it has seen as part of the request's own output.
    """

    pairs: tuple[tuple[int, int], ...]


class Accepted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    ids: tuple[int, ...]


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """None of `ids` was admitted. `status` is the HTTP status; the rest fills the error object."""

    ids: tuple[int, ...]
    status: int
    message: str
    field: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


class Ended(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The request ended without a further token; `tokens` is how many it has in all."""

    id: int
    end: int
    message: str
    tokens: int
    cached_tokens: int


class State(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Whether the engine can step: /ready. `detail` is one line for people."""

    ready: bool
    detail: str


ToCore = Submit | Cancel | Finish | Resume
ToApi = Accepted | Refused | Ended | State

_encoder = msgspec.msgpack.Encoder()
_to_core = msgspec.msgpack.Decoder(ToCore)
_to_api = msgspec.msgpack.Decoder(ToApi)


def encode(message: ToCore | ToApi) -> bytes:
    return _encoder.encode(message)


def decode_to_core(frame: bytes | memoryview) -> ToCore:
    """Raises msgspec.ValidationError on a frame that is no such message."""
    return _to_core.decode(frame)


def decode_to_api(frame: bytes | memoryview) -> ToApi:
    """Raises msgspec.ValidationError on a frame that is no such message."""
    return _to_api.decode(frame)


_TOKENS = ArrayLayout(
    magic=0x4854_0001,
    scalars=("step", "top_k"),
    arrays=(
        ("requests", np.dtype(np.uint64)),
        ("indexes", np.dtype(np.int32)),
        ("tokens", np.dtype(np.int32)),
        ("ends", np.dtype(np.uint8)),
        ("cached", np.dtype(np.int32)),
        ("logprobs", np.dtype(np.float32)),
        ("top_ids", np.dtype(np.int32)),
        ("top_logprobs", np.dtype(np.float32)),
    ),
)
_TOKENS_NAMES = [name for name, _ in _TOKENS.arrays]


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """The tokens that one step gave to the requests of one api process, k of them.

    step: 0 for tokens of earlier steps, in answer to a Resume.
    requests uint64[k]; indexes int32[k]; tokens int32[k]; ends uint8[k] (End; the request ended
    with this token); cached int32[k] (prompt tokens served from the prefix cache).
    logprobs float32[k], or empty when nobody asked; top_k = K; top_ids int32[k * K] and
    top_logprobs float32[k * K], most likely first.
    """

    step: int
    requests: np.ndarray
    indexes: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray
    cached: np.ndarray
    top_k: int = 0
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    top_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    top_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def of(self, chosen: np.ndarray) -> TokenBatch:
        """The batch of the entries where bool[k] `chosen`."""
        part = TokenBatch(
            step=self.step,
            requests=self.requests[chosen],
            indexes=self.indexes[chosen],
            tokens=self.tokens[chosen],
            ends=self.ends[chosen],
            cached=self.cached[chosen],
            top_k=self.top_k,
        )
        if self.logprobs.size:
            part.logprobs = self.logprobs[chosen]
        if self.top_k:
            part.top_ids = self.top_ids.reshape(-1, self.top_k)[chosen].reshape(-1)
            part.top_logprobs = self.top_logprobs.reshape(-1, self.top_k)[chosen].reshape(-1)
        return part

    def encode(self) -> bytes:
        arrays = [getattr(self, name) for name in _TOKENS_NAMES]
        return _TOKENS.encode((self.step, self.top_k), arrays)

    @classmethod
    def decode(cls, frame: bytes | memoryview) -> TokenBatch:
        """Raises LinkError on a frame that is no token batch."""
        (step, top_k), arrays = _TOKENS.decode(frame)
        return cls(step=step, top_k=top_k, **dict(zip(_TOKENS_NAMES, arrays, strict=True)))
