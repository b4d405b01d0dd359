"""ChoiceOutput: from the tokens of one choice to the text and logprobs that its client may see.

Owns, per choice: detokenisation, stop strings, and which token's logprobs may be shown when. A
logprob is shown with or after the last character of its token's text, so a stop string leaks
through neither. Used by api.transcript and by `LLM`. Knows no wire format, no HTTP and no core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from holdfast.api.detokenize import DetokenizerMaker
from holdfast.api.schema import Resolved
from holdfast.api.stop import StopStrings


class TokenLogprob(NamedTuple):
    """A drawn token's logprob and the likeliest alternatives, most likely first.

    offset: where the token's text begins, in characters of the answer. logprob is None when the
    engine recomputed the token's place after a fault and no longer has it.
    """

    token: int
    offset: int
    logprob: float | None
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


class ChoiceOutput:
    """`push` each token in order; when `stopped` is set, a stop string was found at that token."""

    __slots__ = (
        "_detokenizer",
        "_entries",
        "_include_stop",
        "_min_tokens",
        "_stops",
        "_want_logprobs",
        "_written",
        "shown",
        "stopped",
        "tokens",
    )

    def __init__(
        self, tokenizer: DetokenizerMaker, prompt: Sequence[int], resolved: Resolved
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt, skip_special=resolved.skip_special)
        self._stops = StopStrings(resolved.stop) if resolved.stop else None
        self._include_stop = resolved.include_stop
        self._min_tokens = resolved.sampling.min_tokens
        self._want_logprobs = resolved.sampling.top_logprobs >= 0
        # (characters of the answer that must be shown first, entry)
        self._entries: deque[tuple[int, TokenLogprob]] = deque()
        self._written = 0
        self.shown = 0
        """Characters handed out."""
        self.tokens = 0
        self.stopped = False

    def push(
        self,
        token: int,
        *,
        ends_by_id: bool = False,
        logprob: float | None = None,
        top_ids: Sequence[int] = (),
        top_logprobs: Sequence[float] = (),
    ) -> str:
        """The text that may be shown now. `ends_by_id`: a stop id, whose own text is not shown."""
        assert not self.stopped, "a token after a stop string"
        self.tokens += 1
        offset = self._written
        quiet = ends_by_id and not self._include_stop
        text = "" if quiet else self._detokenizer.push(token)
        self._written += len(text)
        if self._want_logprobs:
            entry = TokenLogprob(token, offset, logprob, top_ids, top_logprobs)
            # Bytes of an unfinished character belong to the character that they will become.
            due = self._written + (1 if not quiet and self._detokenizer.pending else 0)
            self._entries.append((due, entry))
        if self._stops is not None and self.tokens >= self._min_tokens:
            text = self._stops.feed(text)
            if self._stops.matched is not None:
                self.stopped = True
                self._cut(self.shown + len(text))
                if self._include_stop:
                    text += self._stops.matched
        self.shown += len(text)
        return text

    def finish(self) -> str:
        """The output ended without a stop string: the text that was held back."""
        text = "" if self._stops is None or self.stopped else self._stops.flush()
        self.shown += len(text)
        # Bytes that never became a character are dropped; their logprobs are not.
        self._written = self.shown
        self._entries = deque((self.shown, entry) for _, entry in self._entries)
        return text

    def logprobs(self) -> list[TokenLogprob]:
        """Entries that may be shown now, each once."""
        ready = []
        while self._entries and self._entries[0][0] <= self.shown:
            ready.append(self._entries.popleft()[1])
        return ready

    def _cut(self, end: int) -> None:
        """A stop string begins at character `end`: forget tokens that lie inside it altogether."""
        if self._include_stop:
            self._entries = deque((0, entry) for _, entry in self._entries)
            return
        self._entries = deque(
            (0, entry) for due, entry in self._entries if entry.offset < end or due <= end
        )
