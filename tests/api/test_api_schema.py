"""Validation: every field is honoured, empty, or refused by its name; nothing else gets through."""

from __future__ import annotations

import json
import math
from typing import Any, get_type_hints

import pytest
from apikit import VOCAB, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat

from holdfast.api.chat import ChatRequest
from holdfast.api.completions import CompletionRequest
from holdfast.api.schema import SamplingParams, choice_seed, parse
from holdfast.config import Limits
from holdfast.errors import InvalidField

LIMITS = Limits(vocab_size=VOCAB, context_tokens=256, choices=8, bias_entries=5, stop_ids=4)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}
TEMPLATE = tokenizer_of().template


def chat(**fields: Any) -> Any:
    """Everything that happens to a chat body before the core sees it."""
    body = parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())
    body.prompt_text(TEMPLATE)
    return body.resolve(LIMITS, prompt_tokens=10, end_ids=(2, 0))


def completion(**fields: Any) -> Any:
    body = parse(CompletionRequest, json.dumps({**TEXT, **fields}).encode())
    body.prompts(VOCAB)
    return body.resolve(LIMITS, prompt_tokens=10, end_ids=(2, 0))


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (ChatRequest, openai_chat.CompletionCreateParamsStreaming),
        (CompletionRequest, openai_completion.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_of_the_installed_openai_schema_is_known(model: Any, params: Any) -> None:
    assert set(get_type_hints(params)) <= set(model.model_fields)


@pytest.mark.parametrize("call", [chat, completion])
def test_null_is_accepted_for_every_optional_field(call: Any) -> None:
    model, base = (ChatRequest, CHAT) if call is chat else (CompletionRequest, TEXT)
    call(**{name: None for name in model.model_fields if name not in base})


ASKS_FOR_NOTHING = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "in_memory",
    "prompt_cache_options": {"mode": "implicit"},
    "reasoning_effort": "none",
    "verbosity": "medium",
    "n": 1,
    "logit_bias": {},
    "stop": [],
}


@pytest.mark.parametrize("name", sorted(ASKS_FOR_NOTHING))
def test_a_field_that_asks_for_nothing_is_accepted(name: str) -> None:
    chat(**{name: ASKS_FOR_NOTHING[name]})


USER = {"role": "user", "content": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CHAT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"banana": 1}, "banana"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"moderation": {}}, "moderation"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1 << 40}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e9}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 10**9}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"logit_bias": {"600": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(6)}}, "logit_bias"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": [600]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10, 11, 12]}, "stop_token_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 247}, "max_tokens"),
    ({"max_completion_tokens": 247}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 601}, "timeout"),
    ({"priority": 101}, "priority"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": ["x"]}, "messages.0"),
    ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages.1.role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
        "messages.0.content.0.x",
    ),
    ({"messages": [{**USER, "name": "Ann"}]}, "messages.0.name"),
    ({"messages": [{**USER, "colour": "red"}]}, "messages.0.colour"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages.0.tool_calls",
    ),
    ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
]


@pytest.mark.parametrize(("fields", "name"), CHAT_REFUSED, ids=lambda v: str(v)[:50])
def test_a_chat_field_that_cannot_be_honoured_is_refused_by_its_name(
    fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        chat(**fields)
    assert caught.value.field == name
    assert caught.value.status == 400


COMPLETION_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "top_logprobs"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [600]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], [600]]}, "prompt.1"),
    ({"prompt": ["a"] * 129}, "prompt"),
]


@pytest.mark.parametrize(("fields", "name"), COMPLETION_REFUSED, ids=lambda v: str(v)[:50])
def test_a_completion_field_that_cannot_be_honoured_is_refused_by_its_name(
    fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        completion(**fields)
    assert caught.value.field == name


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 5000],
)
def test_bad_json_and_bad_utf8_are_refused_as_the_body(body: bytes) -> None:
    with pytest.raises(InvalidField) as caught:
        parse(ChatRequest, body)
    assert caught.value.field == "body"
    assert caught.value.code == "invalid_json"


def test_all_sampling_fields_reach_the_core() -> None:
    resolved = chat(
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"5": -100, "6": 0},
        seed=-1,
        stop="end",
        stop_token_ids=[2, 9],
        min_tokens=3,
        max_completion_tokens=20,
        logprobs=True,
        top_logprobs=4,
        timeout=2.5,
        priority=-3,
    )
    sampling = resolved.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.3)
    assert sampling.bias == ((5, -100.0),)
    assert sampling.stop_ids == (2, 0, 9)
    assert (sampling.min_tokens, resolved.max_tokens, sampling.top_logprobs) == (3, 20, 4)
    assert resolved.seeds == ((1 << 64) - 1, choice_seed((1 << 64) - 1, 1))
    assert (resolved.stop, resolved.timeout_s, resolved.priority) == (("end",), 2.5, -3)


def test_defaults_ask_for_plain_sampling_of_all_that_the_context_leaves() -> None:
    resolved = chat()
    assert resolved.max_tokens == 256 - 10
    assert resolved.timeout_s == LIMITS.timeout_s
    assert resolved.sampling.temperature == 1.0
    assert resolved.sampling.top_logprobs == -1
    assert chat().seeds != resolved.seeds, "no seed given: a fresh one is drawn"


def test_ignore_eos_keeps_only_the_ids_that_the_user_named() -> None:
    assert chat(ignore_eos=True, stop_token_ids=[9]).sampling.stop_ids == (9,)


def test_a_mass_of_zero_is_greedy() -> None:
    sampling = chat(top_p=0, temperature=1.5).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers() -> None:
    params = SamplingParams()
    with pytest.raises(InvalidField, match=r"256 tokens.*context of 256") as caught:
        params.resolve(LIMITS, prompt_tokens=256, end_ids=())
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(InvalidField, match="the prompt is empty"):
        params.resolve(LIMITS, prompt_tokens=0, end_ids=())
    assert params.resolve(LIMITS, prompt_tokens=255, end_ids=()).max_tokens == 1


def test_sampling_params_take_python_values_and_raise_the_same_errors() -> None:
    params = SamplingParams(stop=("a", "b"), logit_bias={3: 1}, logprobs=2, max_tokens=5)
    resolved = params.resolve(LIMITS, prompt_tokens=3, end_ids=(2,))
    assert resolved.stop == ("a", "b")
    assert resolved.sampling.top_logprobs == 2
    assert params.replace(n=3).n == 3
    for bad in ({"temperature": math.nan}, {"top_p": math.inf}, {"nonsense": 1}, {"n": True}):
        with pytest.raises(InvalidField) as caught:
            SamplingParams(**bad)
        assert caught.value.field == next(iter(bad))
    with pytest.raises(InvalidField, match="surrogate"):
        SamplingParams(stop="\ud800").resolve(LIMITS, prompt_tokens=3, end_ids=())


def test_seeds_of_choices_differ_and_choice_zero_has_the_seed_itself() -> None:
    seeds = [choice_seed(5, choice) for choice in range(32)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 32
    assert not set(seeds[1:]) & {choice_seed(6, choice) for choice in range(1, 32)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(sorted({*ChatRequest.model_fields, "zebra"})), json_values, max_size=4
    )
)
def test_any_json_is_either_refused_as_a_400_or_resolves_within_the_limits(
    fields: dict[str, Any],
) -> None:
    try:
        resolved = chat(**fields)
    except InvalidField as error:
        assert error.status == 400
        assert error.field
        return
    sampling = resolved.sampling
    assert 1 <= resolved.max_tokens <= 246
    assert 1 <= resolved.choices <= LIMITS.choices
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k < VOCAB
    assert all(0 <= seed < 1 << 64 for seed in resolved.seeds)
    assert all(0 <= token < VOCAB for token in sampling.stop_ids)
    assert 0 < resolved.timeout_s <= LIMITS.timeout_s
