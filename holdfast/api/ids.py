"""IdTokenizer: stands in where a model folder has no tokenizer and only its speed is wanted.

A folder with a config.json and nothing else can be run with drawn weights (`--load dummy`); its
requests are token ids. An answer's text is its ids as decimal numbers, each with a blank before it,
so that every token shows and stop strings mean something; texts are refused. Which of the two
tokenizers a folder gets is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from holdfast.api.text import Tokenizer, end_ids
from holdfast.errors import InvalidField


class IdTokenizer(Tokenizer):
    """A Tokenizer that knows ids only. `vocab_size`: ids the model can score."""

    def __init__(self, *, vocab_size: int, end_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        self.template = None
        self.special_ids = frozenset()
        # Every text is refused for a better reason than its length.
        self.chars_a_token_max = 1 << 30

    def encode(self, text: str, *, special: bool = True, field: str = "prompt") -> NoReturn:
        """Raises InvalidField on `field`."""
        raise InvalidField(
            field,
            "this model has no tokenizer: its prompts are token ids, not text",
            code="no_tokenizer",
        )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(f" {token}" for token in ids)

    def detokenizer(
        self, before: Sequence[int] = (), *, skip_special: bool = True
    ) -> IdDetokenizer:
        return IdDetokenizer()

    def show(self, token: int) -> tuple[str, bytes]:
        return f" {token}", b" %d" % token


class IdDetokenizer:
    """holdfast.api.detokenize.Detokenizer, by decimal numbers."""

    __slots__ = ()
    pending = False

    def push(self, token: int) -> str:
        return f" {token}"


def load_tokenizer(folder: Path, *, vocab_size: int, ids_will_do: bool) -> Tokenizer:
    """The tokenizer of a model folder.

    ids_will_do: a folder without tokenizer.json gets an IdTokenizer; else it is a ModelError.
    """
    if ids_will_do and not (folder / "tokenizer.json").is_file():
        return IdTokenizer(vocab_size=vocab_size, end_ids=end_ids(folder))
    return Tokenizer.load(folder, vocab_size=vocab_size)
