"""Detokenizer: from token ids, one by one, to text that is whole characters at every moment.

Two ways to the same text. `TableDetokenizer` (byte-level BPE, and SentencePiece models with byte
fallback: nearly all) looks each id's bytes up and decodes UTF-8 as they come, O(1) a token.
`WindowDetokenizer` works with any decoder: it decodes a short window with and without the new ids.
Output is taken to continue the prompt, so that the blank before its first word is kept.

Bytes that can never become a character are shown as U+FFFD, as `decode` shows them; bytes that may
still become one are held back, and dropped when the output ends first.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

# Ids that a window may hold back before it is shown as it is. A character has at most four bytes;
# byte-fallback decoders show a whole run of bad bytes as U+FFFD, so a run must end somewhere.
_WINDOW_IDS_HELD = 8
# Prompt ids that a window starts with: enough for decoders whose text depends on a neighbour.
_WINDOW_IDS_BEFORE = 6


class Detokenizer(Protocol):
    """`pending`: bytes are held back that may become a character."""

    @property
    def pending(self) -> bool: ...

    def push(self, token: int) -> str: ...


class DetokenizerMaker(Protocol):
    """What makes them, for ids that continue `before`: api.text.Tokenizer, or a table of a test."""

    def detokenizer(
        self, before: Sequence[int] = (), *, skip_special: bool = True
    ) -> Detokenizer: ...


class TableDetokenizer:
    """`table`: bytes of each id (empty for ids without text); ids beyond it have none.

    `strip_start`: this is the start of a text and its first blank is dropped.
    """

    __slots__ = ("_held", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], *, strip_start: bool = False) -> None:
        self._table = table
        self._held = b""  # the bytes of a character that is not whole
        self._strip = strip_start

    @property
    def pending(self) -> bool:
        return bool(self._held)

    def push(self, token: int) -> str:
        """The characters that are whole now."""
        if not 0 <= token < len(self._table):
            return ""
        # As codecs' incremental decoder does it, without its own call.
        data = self._held + self._table[token]
        text, used = codecs.utf_8_decode(data, "replace")
        self._held = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """`decode`: ids -> text of any tokenizer, special tokens skipped or not as it was told."""

    __slots__ = ("_decode", "_ids", "_read", "_shown")

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-_WINDOW_IDS_BEFORE:])
        self._shown = self._decode(self._ids) if self._ids else ""
        self._read = len(self._ids)

    @property
    def pending(self) -> bool:
        return len(self._ids) > self._read

    def push(self, token: int) -> str:
        """The characters that are whole now."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = len(self._ids) - self._read
        if text.endswith("�") and held < _WINDOW_IDS_HELD:
            return ""
        delta = text[len(self._shown) :]
        # The window moves on: it starts with the ids that were new now.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)
        return delta
