"""ChatRequest: the body of /v1/chat/completions, every field of OpenAI's schema accounted for.

A field is honoured, or accepted because its value asks for nothing, or refused naming it: the
class says which. Part of the one place of user validation (api.schema). Knows the chat template
only by what it reads; renders nothing itself.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, model_validator

from holdfast.api.schema import Boolean, FieldProblem, Integer, SamplingFields, Text
from holdfast.api.template import ChatTemplate
from holdfast.api.text import check_unicode
from holdfast.errors import InvalidField

ROLES = ("system", "developer", "user", "assistant")
# Variables that belong to the engine and not to chat_template_kwargs.
_RESERVED = ("messages", "add_generation_prompt")


def only(*allowed: Any) -> AfterValidator:
    """Accept null and the values that ask for nothing; refuse the rest as not supported."""

    def check(value: Any) -> Any:
        if value is None or any(value == a and type(value) is type(a) for a in allowed):
            return value
        shown = ", ".join(map(repr, allowed))
        raise FieldProblem(
            f"not supported by this server{f' (accepted: null, {shown})' if shown else ''}",
            code="unsupported_value",
        )

    return AfterValidator(check)


def _text_format(value: Any) -> Any:
    if value is not None and value != {"type": "text"}:
        raise FieldProblem('only null and {"type": "text"} are supported', code="unsupported_value")
    return value


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value is not None and len(value) > 16:
        raise FieldProblem(f"at most 16 entries, got {len(value)}")
    return value


class StreamOptions(BaseModel):
    """OpenAI's stream_options. include_obfuscation pads chunks at OpenAI; here only false."""

    model_config = SamplingFields.model_config

    include_usage: Boolean | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class GenerationFields(SamplingFields):
    """What chat and plain completions share besides sampling."""

    model: Text
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Accepted; has no effect.")
    return_tokens_as_token_ids: Boolean | None = Field(
        None, description="Logprobs name tokens as token_id:<id>."
    )

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise FieldProblem("only allowed when stream is true", ".stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationFields):
    messages: list[Any] = Field(
        description="Roles system, developer, user and assistant; content is text or text parts."
    )
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: Boolean | None = None
    top_logprobs: Integer | None = Field(None, ge=0)
    add_generation_prompt: Boolean | None = Field(None, description="Default true.")
    chat_template_kwargs: dict[Text, Any] | None = Field(
        None, description="Variables of the model's chat template, e.g. enable_thinking."
    )

    # Accepted when they ask for nothing.
    metadata: Annotated[dict[Text, Text] | None, AfterValidator(_metadata)] = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    modalities: Annotated[Any, only(["text"])] = None
    response_format: Annotated[Any, AfterValidator(_text_format)] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Boolean | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = Field(None, description="Accepted: caching needs no key.")
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    prompt_cache_options: Annotated[Any, only({}, {"mode": "implicit"})] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise FieldProblem(
                f"max_completion_tokens is {both[1]} but max_tokens is {both[0]}; give one",
                ".max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldProblem("needs logprobs to be true", ".top_logprobs")
        return self

    def alternatives(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    def output_allowance(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def prompt_text(self, template: ChatTemplate | None) -> str:
        """The rendered conversation. Raises InvalidField, also when the model has no template."""
        return render(
            template,
            self.messages,
            add_generation_prompt=self.add_generation_prompt is not False,
            variables=self.chat_template_kwargs,
        )


def render(
    template: ChatTemplate | None,
    messages: list[Any],
    *,
    add_generation_prompt: bool = True,
    variables: dict[str, Any] | None = None,
) -> str:
    """Check messages and template variables, and render them (HTTP and `LLM` alike)."""
    if template is None:
        raise InvalidField(
            "messages", "this model has no chat template; use /v1/completions", code="no_template"
        )
    if not messages:
        raise InvalidField("messages", "at least one message is needed")
    for name in variables or {}:
        if name in _RESERVED or name not in template.variables:
            raise InvalidField(
                f"chat_template_kwargs.{name}", "the model's chat template does not read it"
            )
    checked = [_message(at, message, template) for at, message in enumerate(messages)]
    return template.render(
        checked, add_generation_prompt=add_generation_prompt, variables=variables
    )


# Message fields that OpenAI has and this server does not serve, with the values that ask for
# nothing.
_EMPTY: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "tool_call_id": (None,),
}


def _message(at: int, message: Any, template: ChatTemplate) -> dict[str, str]:
    where = f"messages.{at}"
    if not isinstance(message, dict):
        raise InvalidField(where, "a message must be an object with role and content")
    role = message.get("role")
    if role in ("tool", "function"):
        raise InvalidField(
            f"{where}.role", "tools are not supported by this server", code="unsupported_value"
        )
    if role not in ROLES:
        raise InvalidField(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    checked = {"role": role, "content": _content(f"{where}.content", message.get("content"), role)}
    for name, value in message.items():
        if name in checked:
            continue
        if name in _EMPTY:
            if value not in _EMPTY[name]:
                raise InvalidField(
                    f"{where}.{name}", "not supported by this server", code="unsupported_value"
                )
        elif name == "name":
            if value is None:
                continue
            if not isinstance(value, str):
                raise InvalidField(f"{where}.name", "must be text")
            if "name" not in template.attributes:
                raise InvalidField(
                    f"{where}.name",
                    "this model's chat template has no place for names",
                    code="unsupported_value",
                )
            checked["name"] = value
        else:
            raise InvalidField(
                f"{where}.{name}", f"unknown field {name!r} in a message", code="unknown_field"
            )
    return checked


def _content(where: str, content: Any, role: str) -> str:
    """Text of a message; parts are joined by a line break each."""
    if isinstance(content, str):
        check_unicode(content, where)
        return content
    if content is None:
        raise InvalidField(where, f"a message of role {role} needs content", code="missing_field")
    if not isinstance(content, list):
        raise InvalidField(where, "must be text or a list of text parts")
    if not content:
        raise InvalidField(where, "the list of parts is empty")
    return "\n".join(_part(f"{where}.{at}", part) for at, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise InvalidField(where, "a content part must be an object with type and text")
    if part.get("type") != "text":
        raise InvalidField(
            f"{where}.type",
            f"content parts of type {part.get('type')!r} are not supported; only text is",
            code="unsupported_value",
        )
    if not isinstance(part.get("text"), str):
        raise InvalidField(f"{where}.text", "must be text")
    for name, value in part.items():
        if name == "prompt_cache_breakpoint":
            if value is not None:
                raise InvalidField(
                    f"{where}.{name}", "not supported by this server", code="unsupported_value"
                )
        elif name not in ("type", "text"):
            raise InvalidField(
                f"{where}.{name}", f"unknown field {name!r} in a part", code="unknown_field"
            )
    check_unicode(part["text"], f"{where}.text")
    return part["text"]
