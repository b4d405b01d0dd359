"""ChatTemplate: the model's own jinja template, from messages to prompt text, in a sandbox.

Owns what Hugging Face templates expect of their environment (raise_exception, strftime_now, tojson
without HTML escapes, loop controls, the `generation` tag). The template comes with the model, so it
runs sandboxed and immutable; whatever it raises is the user's 400 on `messages`, because a template
raises for conversations that it does not support. Knows no tokens.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from holdfast.errors import InvalidField, ModelError

# A rendered prompt longer than this cannot be meant: 64 MiB is four times the default body limit.
RENDERED_CHARS_MAX = 64 << 20


class ChatTemplate:
    """`special`: the special tokens that templates may name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error
        self._special = special
        self.attributes = frozenset(
            [node.attr for node in tree.find_all(nodes.Getattr)]
            + [
                node.arg.value
                for node in tree.find_all(nodes.Getitem)
                if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
            ]
        )
        """Names that the template looks up in anything: a message field not here has no effect."""
        self.variables = frozenset(meta.find_undeclared_variables(tree)) - {"messages"} - {*special}
        """Names that a caller may set; one that is not here has no effect."""
        self.knows_developer = "developer" in source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt text. Raises InvalidField on `messages` for what the template refuses."""
        if not self.knows_developer:
            # The role that newer OpenAI models call `developer` is what templates call `system`.
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        try:
            text = self._template.render(
                {
                    **self._special,
                    "tools": None,
                    "documents": None,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except SecurityError as error:
            raise InvalidField("messages", f"the chat template did what it may not: {error}") from (
                error
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            raise InvalidField(
                "messages", f"the model's chat template refuses these messages: {error}"
            ) from error
        if len(text) > RENDERED_CHARS_MAX:
            raise InvalidField("messages", "the chat template rendered too long a prompt")
        return text


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[_GenerationTag, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only shows its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja's own escapes <, > and & for HTML, which models never saw in training.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
