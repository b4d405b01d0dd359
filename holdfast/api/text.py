"""Tokenizer: a model folder's way from text to ids and back, its chat template and its end tokens.

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json and
generation_config.json of a Hugging Face folder, once; immutable after that: threads may share it.
The only module besides `template` and `detokenize` that knows what a token's text is. It must not
know requests, HTTP or the core. Raises ModelError for a folder that is unreadable, InvalidField for
what a user sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from holdfast.api.detokenize import Detokenizer, TableDetokenizer, WindowDetokenizer
from holdfast.api.template import ChatTemplate
from holdfast.errors import InvalidField, ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Ids and texts that one process keeps for logprobs; a vocabulary has a few hundred thousand.
_SHOWN_MAX = 1 << 19


class Tokenizer:
    """`vocab_size`: ids the model can score; the tokenizer may know fewer, or name more."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        end_ids: Sequence[int] = (),
        template: ChatTemplate | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        self.template = template
        spec = orjson.loads(inner.to_str())
        self.special_ids = frozenset(
            added["id"] for added in spec["added_tokens"] if added["special"]
        )
        self._strip_start, to_bytes = _byte_rule(spec.get("decoder"))
        self._all: list[bytes] | None = None
        self._plain: list[bytes] | None = None
        if to_bytes is not None:
            size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            names = [inner.id_to_token(token) for token in range(size)]
            self._all = [b"" if name is None else to_bytes(name) for name in names]
            self._plain = [
                b"" if token in self.special_ids else data for token, data in enumerate(self._all)
            ]
        longest = max(map(len, inner.get_vocab(with_added_tokens=True)), default=1)
        # A text of more characters cannot be one context, even if a normaliser shrinks it fourfold.
        self.chars_a_token_max = 4 * longest
        self._shown: dict[int, tuple[str, bytes]] = {}

    @classmethod
    def load(cls, folder: Path, *, vocab_size: int) -> Tokenizer:
        """Read a model folder. Raises ModelError naming the file."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; a fast tokenizer is needed")
        try:
            # from_file and from_str raise bare Exception; from_buffer raises ValueError.
            inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **settings})
        source = _template_source(folder, settings)
        return cls(
            inner,
            vocab_size=vocab_size,
            end_ids=end_ids(folder),
            template=None if source is None else ChatTemplate(source, special),
        )

    def encode(self, text: str, *, special: bool = True, field: str = "prompt") -> list[int]:
        """Ids of `text`; `special`: with what the model puts around a text (BOS).

        Raises InvalidField on `field` for text that is not valid Unicode, or that yields ids the
        model cannot score.
        """
        check_unicode(text, field)
        ids = self.inner.encode(text, add_special_tokens=special).ids
        if ids and max(ids) >= self.vocab_size:
            raise InvalidField(
                field, f"token {max(ids)} is outside the model's vocabulary of {self.vocab_size}"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence. Bytes that are no character become U+FFFD."""
        table = self._plain if skip_special else self._all
        if table is None:
            return self.inner.decode(list(ids), skip_special_tokens=skip_special)
        data = b"".join(table[token] for token in ids if token < len(table))
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strip_start else text

    def detokenizer(self, before: Sequence[int] = (), *, skip_special: bool = True) -> Detokenizer:
        """For ids that continue `before`; with none before, they start a text."""
        table = self._plain if skip_special else self._all
        if table is not None:
            return TableDetokenizer(table, strip_start=self._strip_start and not before)

        def decode(ids: list[int]) -> str:
            return self.inner.decode(ids, skip_special_tokens=skip_special)

        return WindowDetokenizer(decode, before)

    def show(self, token: int) -> tuple[str, bytes]:
        """One token by itself, for people: its text (U+FFFD for half characters) and its bytes."""
        found = self._shown.get(token)
        if found is None:
            if self._all is not None:
                data = self._all[token] if token < len(self._all) else b""
            else:
                data = self.inner.decode([token], skip_special_tokens=False).encode()
            found = (data.decode("utf-8", "replace"), data)
            if len(self._shown) < _SHOWN_MAX:
                self._shown[token] = found
        return found


def check_unicode(text: str, field: str) -> None:
    """Raises InvalidField for lone surrogates, which no UTF-8 can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidField(
            field, f"not valid Unicode: a lone surrogate at character {error.start}"
        ) from error


def _byte_rule(decoder: dict[str, Any] | None) -> tuple[bool, Callable[[str], bytes] | None]:
    """(drop the first blank, token string -> bytes) of a decoder; None when bytes do not add up."""
    if decoder is None:
        return False, None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps = [step for step in steps if step["type"] != "Fuse"]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return False, _byte_level_bytes
    replaced: list[tuple[str, str]] = []
    fallback = strip = False
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteFallback":
            fallback = True
        elif step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (
            " ",
            1,
            0,
        ):
            strip = True
        else:
            return False, None

    def to_bytes(name: str) -> bytes:
        for old, new in replaced:
            name = name.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(name) if fallback else None
        return bytes([int(match[1], 16)]) if match else name.encode()

    return strip, to_bytes


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + at): byte for at, byte in enumerate(rest)})
    return table


_BYTE_OF = _byte_characters()


def _byte_level_bytes(name: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:
        # An added token is plain text; one with a blank or a letter beyond the table shows it.
        return name.encode()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is no JSON object")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    source = settings.get("chat_template")
    if isinstance(source, list):
        # Several named templates: the one for plain chat is called `default`.
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return source


def end_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: eos_token_id of config.json and of generation_config.json."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in found:
                found.append(token)
    return tuple(found)
