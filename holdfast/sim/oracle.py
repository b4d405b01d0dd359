"""The client's oracle: what each choice must be answered, computed naively and all at once.

The whole token sequence by `expected_token`, its bytes decoded in one go, cut at the first complete
stop string; nothing of api.output, api.stop or api.detokenize is used. ClientView compares what
arrives with it, piece by piece as a prefix and at the end exactly, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.api.generation import Token
from holdfast.api.output import TokenLogprob
from holdfast.config import Limits
from holdfast.sim.fake_worker import expected_alternatives, expected_logprob, expected_token
from holdfast.sim.violation import Violation
from holdfast.sim.vocabulary import TABLE
from holdfast.sim.world import Job
from holdfast.wire.messages import End


def text_of(data: bytes) -> tuple[str, bool]:
    """(the whole characters of `data`, whether bytes of an unfinished one follow them)."""
    for cut in range(1, 4):
        try:
            data[-cut:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[:-cut].decode("utf-8", "replace"), True
    return data.decode("utf-8", "replace"), False


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: as the engine draws them, up to its own end. text and reason: what a client gets.

    starts[k], dues[k]: characters before token k's text, and those that must be out before its
    logprob may be; logprobs: the tokens whose logprobs are shown at all.
    """

    tokens: tuple[int, ...]
    end: End
    text: str
    reason: str
    starts: tuple[int, ...]
    dues: tuple[int, ...]
    logprobs: tuple[int, ...]


def answer_to(
    job: Job, choice: int, limits: Limits, excused: Mapping[int, int] | None = None
) -> Answer:
    """The one right answer to a choice of a job. excused: tokens by index that were drawn from a
    page that had changed, and are facts: what follows them is right again."""
    excused = excused or {}
    seed = job.seeds[choice] if job.sampled else 0
    history, tokens, end = list(job.prompt), [], End.LENGTH
    while len(tokens) < job.max_tokens:
        seen = np.array(history, np.int32)
        drawn = excused.get(len(tokens))
        if drawn is None:
            drawn = expected_token(seen, limits.vocab_size, seed, limits.windows)
        tokens.append(drawn)
        history.append(tokens[-1])
        if tokens[-1] in job.stop_ids:
            end = End.STOP
            break
    pieces = [TABLE[token] for token in tokens]
    if end is End.STOP and not job.include_stop:
        pieces[-1] = b""  # Not shown; nor does it become part of an unfinished character.
    lengths, pending = [0], []
    for count in range(1, len(tokens) + 1):
        text, unfinished = text_of(b"".join(pieces[:count]))
        lengths.append(len(text))
        pending.append(unfinished)
    quiet = end is End.STOP and not job.include_stop
    dues = [length + unfinished for length, unfinished in zip(lengths[1:], pending, strict=True)]
    if quiet:
        dues[-1] = lengths[-1]
    text, _ = text_of(b"".join(pieces))
    begin = lengths[min(len(tokens), max(0, job.min_tokens - 1))]
    found = _first_stop(text, job.stop, begin)
    shown = range(len(tokens))
    if found is not None:
        start, stop = found
        last = next(k for k, length in enumerate(lengths) if length >= stop)
        shown = range(last)
        if not job.include_stop:
            shown = [k for k in range(last) if lengths[k] < start or dues[k] <= start]
        text = text[: stop if job.include_stop else start]
    return Answer(
        tokens=tuple(tokens),
        end=end,
        text=text,
        reason="stop" if found is not None or end is End.STOP else "length",
        starts=tuple(lengths[:-1]),
        dues=tuple(dues),
        logprobs=tuple(shown),
    )


def _first_stop(text: str, stops: Sequence[str], begin: int) -> tuple[int, int] | None:
    """(start, end) of the stop string that is complete first in text[begin:]; the longest of those
    complete at one character."""
    for end in range(begin + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if end - len(stop) >= begin and text[:end].endswith(stop):
                return end - len(stop), end
    return None


class ClientView:
    """What the client of one choice has seen, against its answer. `name` is for people."""

    def __init__(
        self,
        job: Job,
        name: str,
        request: int,
        answer: Answer,
        again: Callable[[Mapping[int, int]], Answer],
    ) -> None:
        """again: the answer with some tokens excused (answer_to)."""
        self.job = job
        self._again = again
        self.excused: dict[int, int] = {}
        self.name = name
        self.request = request
        self.answer = answer
        self.tokens = 0
        self.text = ""
        self.logprobs = 0
        self.how: str | None = None
        """How it ended; None while the client waits."""
        self.ended_at: int | None = None
        self.orphaned = False  # its api process died, which nobody told the core of itself

    def wrong(self, what: str) -> Violation:
        return Violation(f"{self.name} ({self.request:#x}): {what}")

    def excuse(self, index: int, token: int) -> None:
        """This token was drawn from a page that had changed, and the core says it."""
        if self.excused.get(index, self.answer.tokens[index]) != token:
            self.excused[index] = token
            self.answer = self._again(self.excused)

    def token(self, event: Token) -> None:
        """The api process delivered this token, before anything is made of it."""
        tokens, at = self.answer.tokens, self.tokens
        if self.how is not None:
            raise self.wrong(f"token {at} after its end, {self.how}")
        if event.token is not None:
            if at >= len(tokens):
                raise self.wrong(f"token {event.token} after its last one")
            if event.token != tokens[at]:
                raise self.wrong(f"token {at} is {event.token}, its own history gives {tokens[at]}")
            self.tokens += 1
        last = self.tokens == len(tokens)
        if event.end and (not last or event.end != self.answer.end):
            raise self.wrong(f"{End(event.end)!r} after {self.tokens} of {len(tokens)} tokens")

    def show(self, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> None:
        """The client got this piece, and with the last one the finish reason."""
        if self.how is not None:
            raise self.wrong(f"a piece after its end, {self.how}")
        self.text += text
        want = self.answer
        if not want.text.startswith(self.text):
            raise self.wrong(f"its text {self.text!r} is not the beginning of {want.text!r}")
        for entry in logprobs:
            self._logprob(entry, over=reason is not None)
        if reason is None:
            return
        if reason != want.reason:
            raise self.wrong(f"finish reason {reason}, not {want.reason}")
        if self.text != want.text:
            raise self.wrong(f"its text ends as {self.text!r}, not {want.text!r}")
        if self.job.logprobs >= 0 and self.logprobs != len(want.logprobs):
            raise self.wrong(f"{self.logprobs} logprobs, not {len(want.logprobs)}")

    def _logprob(self, entry: TokenLogprob, *, over: bool) -> None:
        want = self.answer
        if self.job.logprobs < 0 or self.logprobs >= len(want.logprobs):
            raise self.wrong(f"a logprob of token {entry.token} that is not shown")
        at = want.logprobs[self.logprobs]
        self.logprobs += 1
        token = want.tokens[at]
        if (entry.token, entry.offset) != (token, want.starts[at]):
            raise self.wrong(f"logprob {at} is of {entry[:2]}, not {(token, want.starts[at])}")
        if not over and want.dues[at] > len(self.text):
            raise self.wrong(f"the logprob of token {at} came before its text")
        if entry.logprob is None:
            return  # Whether it may be is the world's to say.
        if entry.logprob != expected_logprob(token):
            raise self.wrong(f"the logprob of token {at} is {entry.logprob}")
        alternatives = list(zip(entry.top_ids, entry.top_logprobs, strict=True))
        if alternatives != expected_alternatives(token, self.job.logprobs, len(TABLE)):
            raise self.wrong(f"the alternatives of token {at} are {alternatives}")

    def finish(self, how: str, now: int) -> None:
        """The choice is over for its client, by an answer or an error."""
        if self.how is not None:
            raise self.wrong(f"ended twice: {self.how}, {how}")
        self.how, self.ended_at = how, now
