"""CompletionRequest and the bodies of /tokenize and /detokenize.

Part of the one place of user validation (api.schema). A prompt is text, ids, or a list of either;
each becomes one admission of its own. Echo shows the prompt before the answer; logprobs of a prompt
are not computed, so echo with logprobs is refused rather than answered in part.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.api.chat import GenerationFields, only
from holdfast.api.schema import Boolean, FieldProblem, Integer, Text, check_id
from holdfast.errors import InvalidField

# Prompts of one body: OpenAI's clients batch at most 20; each costs an admission.
PROMPTS_MAX = 128


class CompletionRequest(GenerationFields):
    prompt: Any = Field(description="Text, token ids, or a list of either.")
    logprobs: Integer | None = Field(None, ge=0, description="Alternatives beside each token.")
    echo: Boolean | None = None
    best_of: Integer | None = Field(None, ge=1, description="Only the value of n.")
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise FieldProblem(f"only the value of n ({self.n or 1}) is supported", ".best_of")
        if self.echo and self.logprobs is not None:
            raise FieldProblem(
                "echo with logprobs is not supported: logprobs of the prompt are not computed",
                ".logprobs",
                code="unsupported_value",
            )
        return self

    def alternatives(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """Each prompt, as text or as checked ids. Raises InvalidField."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise InvalidField("prompt", "must be text, token ids, or a list of either; not empty")
        if all(type(token) is int for token in prompt):
            return [_ids(prompt, vocab_size, "prompt")]
        if len(prompt) > PROMPTS_MAX:
            raise InvalidField("prompt", f"at most {PROMPTS_MAX} prompts, got {len(prompt)}")
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if not all(isinstance(one, list) for one in prompt):
            raise InvalidField("prompt", "a list must hold texts only, ids only, or lists of ids")
        return [_ids(one, vocab_size, f"prompt.{at}") for at, one in enumerate(prompt)]


class TokenizeRequest(BaseModel):
    """Either `prompt`, or `messages` to be put through the chat template."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Any] | None = None
    add_special_tokens: Boolean | None = Field(
        None, description="Default: true for a prompt, false for messages."
    )
    add_generation_prompt: Boolean | None = None
    return_token_strs: Boolean | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise FieldProblem("give either prompt or messages", ".prompt")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise FieldProblem("only together with messages", ".add_generation_prompt")
        return self


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text | None = None
    tokens: list[Integer]
    skip_special_tokens: Boolean | None = Field(None, description="Default false.")

    def checked(self, vocab_size: int) -> list[int]:
        """The ids. Raises InvalidField for one outside the vocabulary."""
        for token in self.tokens:
            check_id(token, vocab_size, "tokens")
        return self.tokens


def _ids(ids: list[Any], vocab_size: int, field: str) -> list[int]:
    if not ids:
        raise InvalidField(field, "the prompt is empty")
    for token in ids:
        if type(token) is not int:
            raise InvalidField(field, f"token ids must be integers, got {token!r}")
        check_id(token, vocab_size, field)
    return ids
