"""Validation of everything a user may say about sampling, for HTTP and for `LLM` alike.

Owns `SamplingParams` (public), the fields it shares with the request bodies (api.chat,
api.completions) and `resolve`, the one road from a user's wishes to wire.messages.Sampling. After
`resolve` nothing is checked again: the core receives ids and numbers in range. Fields refuse NaN,
strings for numbers and unknown names; errors are InvalidField with the name as the user wrote it.

Ranges are OpenAI's where OpenAI has the field, and otherwise the widest that make sense.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from holdfast.api.text import check_unicode
from holdfast.config import Limits
from holdfast.errors import InvalidField
from holdfast.wire.messages import Sampling

STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 256
PRIORITY_MAX = 100
_SEED_MIN, _SEED_END = -(1 << 63), 1 << 64
_M64 = (1 << 64) - 1

Model = TypeVar("Model", bound=BaseModel)


def _listed(value: Any) -> Any:
    """A tuple or one item where a list is meant, from Python callers and from OpenAI's `stop`."""
    if isinstance(value, tuple):
        return list(value)
    return [value] if isinstance(value, str) else value


def _by_id(value: Any) -> Any:
    """JSON has only string keys: {"123": 5} means {123: 5}."""
    if not isinstance(value, Mapping):
        return value
    return {
        int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key: bias
        for key, bias in value.items()
    }


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True)]
Boolean = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Stops = Annotated[list[Text], BeforeValidator(_listed)]
Bias = Annotated[dict[Integer, Number], BeforeValidator(_by_id)]


class SamplingFields(BaseModel):
    """Fields of every kind of request. None means: as if it were not there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: Integer | None = Field(None, ge=1, description="Answers to each prompt.")
    temperature: Number | None = Field(None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: Number | None = Field(None, ge=0, le=1, description="Keep the likeliest of this mass.")
    top_k: Integer | None = Field(None, ge=0, lt=1 << 31, description="Keep so many; 0 keeps all.")
    min_p: Number | None = Field(
        None, ge=0, le=1, description="Keep tokens at least this likely, relative to the likeliest."
    )
    repetition_penalty: Number | None = Field(None, ge=0.1, le=10, description="1 is none.")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Bias | None = Field(None, description="Token id to a bias of -100 to 100.")
    seed: Integer | None = Field(
        None,
        ge=_SEED_MIN,
        lt=_SEED_END,
        description="Same seed and request, same answer. Choice 0 draws with the seed itself.",
    )
    stop: Stops | None = Field(None, description="Strings that end the answer.")
    stop_token_ids: list[Integer] | None = Field(None, description="Ids that end the answer.")
    include_stop_str_in_output: Boolean | None = None
    max_tokens: Integer | None = Field(
        None, ge=1, description="Longest answer; default: what the context leaves."
    )
    min_tokens: Integer | None = Field(None, ge=0, description="No end before so many tokens.")
    ignore_eos: Boolean | None = Field(None, description="The model's end tokens do not end it.")
    skip_special_tokens: Boolean | None = Field(None, description="Default true.")
    timeout: Number | None = Field(None, gt=0, description="Deadline of the request, in seconds.")
    priority: Integer | None = Field(
        None, ge=-PRIORITY_MAX, le=PRIORITY_MAX, description="Higher goes first; default 0."
    )

    def alternatives(self) -> int:
        """Logprobs asked for: -1 none, else alternatives a token."""
        return -1

    def output_allowance(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens

    def resolve(
        self,
        limits: Limits,
        *,
        prompt_tokens: int,
        end_ids: Sequence[int],
        prompt_field: str = "prompt",
    ) -> Resolved:
        """Check against the model and its limits, fill in defaults, draw a seed if none is given.

        Raises InvalidField naming the field and the numbers.
        """
        check_prompt(limits, prompt_tokens, prompt_field)
        max_tokens = _max_tokens(limits, prompt_tokens, *self.output_allowance())
        choices = 1 if self.n is None else self.n
        if choices > limits.choices:
            raise InvalidField("n", f"at most {limits.choices} choices, got {choices}")
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidField(
                "min_tokens", f"{min_tokens} is more than the {max_tokens} tokens of the answer"
            )
        alternatives = self.alternatives()
        if alternatives > limits.top_logprobs:
            raise InvalidField(
                "top_logprobs", f"at most {limits.top_logprobs} alternatives, got {alternatives}"
            )
        timeout_s = limits.timeout_s if self.timeout is None else self.timeout
        if timeout_s > limits.timeout_s:
            raise InvalidField("timeout", f"at most {limits.timeout_s:g} s, got {timeout_s:g}")
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = self.top_k or 0
        sampling = Sampling(
            # A mass of zero keeps the likeliest token alone, which is what greedy is.
            temperature=0.0 if self.top_p == 0 else temperature,
            top_p=self.top_p or 1.0,
            top_k=top_k if top_k < limits.vocab_size else 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            min_tokens=min_tokens,
            top_logprobs=alternatives,
            stop_ids=_stop_ids(limits, self.stop_token_ids, () if self.ignore_eos else end_ids),
            bias=_bias(limits, self.logit_bias),
        )
        seed = secrets.randbits(64) if self.seed is None else self.seed & _M64
        return Resolved(
            sampling=sampling,
            max_tokens=max_tokens,
            seeds=tuple(choice_seed(seed, choice) for choice in range(choices)),
            stop=_stop_strings(self.stop),
            include_stop=bool(self.include_stop_str_in_output),
            skip_special=self.skip_special_tokens is not False,
            timeout_s=timeout_s,
            priority=self.priority or 0,
        )


class SamplingParams(SamplingFields):
    """How to sample: plain keyword arguments with the names of the HTTP fields.

    logprobs: None for none, else how many alternatives to return beside each drawn token.
    Raises InvalidField for a value that is out of range or of the wrong type.
    """

    logprobs: Integer | None = Field(None, ge=0)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise field_error(error) from None

    def alternatives(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    def replace(self, **values: Any) -> Self:
        """A copy with some fields changed, checked as at first."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **values})


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request means: nothing in it needs checking any more. One seed a choice."""

    sampling: Sampling
    max_tokens: int
    seeds: tuple[int, ...]
    stop: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    timeout_s: float
    priority: int

    @property
    def choices(self) -> int:
        return len(self.seeds)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of choice `choice` of a request: choice 0 draws with the seed itself.

    The others take splitmix64 of seed + choice * golden ratio, so that neighbouring seeds of
    neighbouring requests do not meet in their choices.
    """
    if choice == 0:
        return seed
    x = (seed + choice * 0x9E37_79B9_7F4A_7C15) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & _M64
    return x ^ (x >> 31)


def parse(model: type[Model], body: bytes) -> Model:
    """A request body as `model`. Raises InvalidField for bad JSON, bad UTF-8 and bad fields."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidField("body", f"not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidField("body", "the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise field_error(error) from None


def field_error(error: ValidationError) -> InvalidField:
    """pydantic's first finding as ours. Unknown fields come first: they explain the others."""
    found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = found[0]
    name = ".".join(str(part) for part in first["loc"] if part != "[key]") or "body"
    if first["type"] == "extra_forbidden":
        return InvalidField(name, f"unknown field {name!r}", code="unknown_field")
    if first["type"] == "missing":
        return InvalidField(name, f"field {name!r} is required", code="missing_field")
    if first["type"] == "value_error" and isinstance(first["ctx"]["error"], FieldProblem):
        problem = first["ctx"]["error"]
        full = f"{name}{problem.path}" if name != "body" else problem.path.lstrip(".")
        return InvalidField(full, problem.message, code=problem.code)
    value = first.get("input")
    shown = f", got {value!r}" if isinstance(value, int | float | bool | None) else ""
    return InvalidField(name, f"{first['msg']}{shown}")


class FieldProblem(ValueError):
    """Raised inside validators: `path` is appended to the field's name, e.g. `.0.content`."""

    def __init__(self, message: str, path: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.code = code


def check_prompt(limits: Limits, prompt_tokens: int, field: str, *, at_least: str = "") -> None:
    """Raises InvalidField unless a prompt of so many tokens leaves room for an answer."""
    if prompt_tokens == 0:
        raise InvalidField(field, "the prompt is empty")
    if prompt_tokens >= limits.context_tokens:
        raise InvalidField(
            field,
            f"the prompt has {at_least}{prompt_tokens} tokens; with at least one token of output "
            f"it does not fit the context of {limits.context_tokens} tokens",
            code="context_length_exceeded",
        )


def _max_tokens(limits: Limits, prompt_tokens: int, field: str, asked: int | None) -> int:
    context = limits.context_tokens
    if asked is None:
        return context - prompt_tokens
    if prompt_tokens + asked > context:
        raise InvalidField(
            field,
            f"{prompt_tokens} prompt tokens and {asked} output tokens are more than the context "
            f"of {context} tokens; at most {context - prompt_tokens} output tokens fit",
            code="context_length_exceeded",
        )
    return asked


def _stop_ids(limits: Limits, asked: list[int] | None, ends: Sequence[int]) -> tuple[int, ...]:
    for token in asked or ():
        check_id(token, limits.vocab_size, "stop_token_ids")
    ids = tuple(dict.fromkeys([*ends, *(asked or ())]))
    if len(ids) > limits.stop_ids:
        raise InvalidField(
            "stop_token_ids",
            f"at most {limits.stop_ids} ids, those of the model included, got {len(ids)}",
        )
    return ids


def _bias(limits: Limits, bias: dict[int, float] | None) -> tuple[tuple[int, float], ...]:
    bias = bias or {}
    if len(bias) > limits.bias_entries:
        raise InvalidField("logit_bias", f"at most {limits.bias_entries} entries, got {len(bias)}")
    for token, value in bias.items():
        check_id(token, limits.vocab_size, "logit_bias")
        if not -100 <= value <= 100:
            raise InvalidField("logit_bias", f"bias of token {token} is {value}, not -100 to 100")
    return tuple((token, value) for token, value in bias.items() if value)


def _stop_strings(stop: list[str] | None) -> tuple[str, ...]:
    stop = stop or []
    if len(stop) > STOP_STRINGS_MAX:
        raise InvalidField("stop", f"at most {STOP_STRINGS_MAX} stop strings, got {len(stop)}")
    for text in stop:
        if not text:
            raise InvalidField("stop", "an empty stop string would end every answer at once")
        if len(text) > STOP_CHARS_MAX:
            raise InvalidField(
                "stop", f"at most {STOP_CHARS_MAX} characters a stop string, got {len(text)}"
            )
        check_unicode(text, "stop")
    return tuple(dict.fromkeys(stop))


def check_id(token: int, vocab_size: int, field: str) -> None:
    """Raises InvalidField unless the model can score `token`."""
    if not 0 <= token < vocab_size:
        raise InvalidField(field, f"token id {token} is outside the vocabulary of {vocab_size} ids")
