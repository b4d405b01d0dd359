"""Transcript: from the tokens of one generation to what its client is shown, choice by choice.

Owns each choice's ChoiceOutput and finish reason. A choice ends once, by the core's word or at a
stop string, of which the generation is told; tokens behind a stop string are void. Made by
api.stream and by the simulator; knows no wire format and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from holdfast.api.detokenize import DetokenizerMaker
from holdfast.api.generation import Generation, Token
from holdfast.api.output import ChoiceOutput, TokenLogprob
from holdfast.api.schema import Resolved
from holdfast.wire.messages import End

_STOP = int(End.STOP)
_REASONS = {int(End.STOP): "stop", int(End.LENGTH): "length"}


class Shown(NamedTuple):
    """What a choice's client may see now, and did not before; `reason` once the choice is over."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    reason: str | None


class Transcript:
    """`prompt`: the ids that the choices continue."""

    def __init__(
        self, tokenizer: DetokenizerMaker, prompt: Sequence[int], resolved: Resolved
    ) -> None:
        self.outputs = [ChoiceOutput(tokenizer, prompt, resolved) for _ in range(resolved.choices)]
        self.reasons: list[str | None] = [None] * resolved.choices
        self.left = resolved.choices
        """Choices that are not over."""

    @property
    def tokens(self) -> int:
        """Output tokens that count, of all choices."""
        return sum(output.tokens for output in self.outputs)

    def take(self, generation: Generation, events: Sequence[Token]) -> list[Shown]:
        """Decode the tokens that `generation` delivered; one entry a choice that moved."""
        texts: dict[int, str] = {}
        for event in events:
            at = event.choice
            if self.reasons[at] is not None:
                continue  # Void: after a stop string.
            output, text = self.outputs[at], ""
            if event.token is not None:
                text = output.push(
                    event.token,
                    ends_by_id=event.end == _STOP,
                    logprob=event.logprob,
                    top_ids=event.top_ids,
                    top_logprobs=event.top_logprobs,
                )
            if output.stopped:
                generation.stop(at, output.tokens)
                self._end(at, "stop")
            elif event.end in _REASONS:
                text += output.finish()
                self._end(at, _REASONS[event.end])
            texts[at] = texts.get(at, "") + text
        return [
            Shown(at, text, self.outputs[at].logprobs(), self.reasons[at])
            for at, text in texts.items()
        ]

    def _end(self, choice: int, reason: str) -> None:
        self.reasons[choice] = reason
        self.left -= 1
