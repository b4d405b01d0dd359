"""Re-running journalled requests in this process, to see whether they say the same again.

A journal holds what a request needs to run once more: its prompt, its seed and its sampling, and
the tokens that its client was sent. On the CPU the same request says the same tokens, in whatever
company, so a first difference is a fault's trace. On a GPU in bfloat16 near-ties may flip: whether
tokens are *explained* is the drills' to say (docs/equality.md).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from holdfast.core.journal import JournalledRequest
from holdfast.errors import OperatorError
from holdfast.local import Drawn
from holdfast.wire.messages import End, Refused, Submit

if TYPE_CHECKING:
    from holdfast.llm import LLM

_STEP_WAIT_S = 1.0
_NO_DEADLINE_S = 365 * 86400.0


@dataclass(slots=True)
class Rerun:
    """One request and what it says now. tokens: in the order drawn. refused: why it did not run,
    or "". failed: how a run ended that is neither stop nor length, or ""."""

    request: JournalledRequest
    tokens: list[int] = field(default_factory=list)
    end: End = End.NONE
    refused: str = ""
    failed: str = ""

    @property
    def compared(self) -> int:
        """Tokens that both have said."""
        return min(len(self.request.tokens), len(self.tokens))

    @property
    def differs_at(self) -> int | None:
        """The first index at which the two differ, an early end of the re-run among it."""
        before = self.request.tokens
        for index, (old, new) in enumerate(zip(before, self.tokens, strict=False)):
            if old != new:
                return index
        return len(self.tokens) if len(self.tokens) < len(before) else None

    @property
    def same(self) -> bool:
        return not self.refused and not self.failed and self.differs_at is None


class _Sink:
    """local.Sink: collects what one re-run says."""

    def __init__(self, rerun: Rerun) -> None:
        self.rerun = rerun
        self.open = True
        self.again = False

    def push(self, drawn: Drawn) -> int | None:
        self.rerun.tokens.append(drawn.token)
        if drawn.end is not End.NONE:
            self.rerun.end = drawn.end
            self.open = False
        return None

    def finish(self, end: End, message: str) -> None:
        self.rerun.end = end
        self.rerun.failed = message or end.name.lower()
        self.open = False

    def refuse(self, refusal: Refused) -> None:
        # 429: there is room once others have ended.
        self.again = refusal.status == 429
        self.rerun.refused = refusal.message
        self.open = False


def rerun(
    llm: LLM,
    requests: Sequence[JournalledRequest],
    *,
    done: Callable[[int, int], None] = lambda ended, total: None,
) -> list[Rerun]:
    """Run these requests again, several at a time; the results in their order.

    One that was live runs to its end, one that had ended as far as its journal goes. `done` is told
    how many are over. Raises OperatorError when a request cannot be of this model.
    """
    for request in requests:
        _check_ids(request, llm.limits.vocab_size)
    made = [Rerun(request) for request in requests]
    # What ended without a token has nothing to say again.
    waiting = deque(one for one in made if one.request.tokens or not one.request.end)
    live: list[_Sink] = []
    over = len(made) - len(waiting)
    while waiting or live:
        while waiting and len(live) < llm.limits.rows_max:
            sink = _Sink(waiting.popleft())
            sink.rerun.refused = ""
            llm.engine.submit(_submit(llm, sink.rerun.request), (sink,))
            live.append(sink)
        llm.engine.advance(_STEP_WAIT_S)
        ended = [sink for sink in live if not sink.open]
        live = [sink for sink in live if sink.open]
        for sink in ended:
            if sink.again and live:
                waiting.append(sink.rerun)
            else:
                over += 1
        done(over, len(made))
    return made


def _submit(llm: LLM, request: JournalledRequest) -> Submit:
    admission = request.admission
    return Submit(
        ids=llm.engine.new_ids(1),
        prompt=admission.prompt,
        seeds=(admission.seed,),
        max_tokens=len(request.tokens) if request.end else admission.max_tokens,
        sampling=admission.sampling,
        deadline_s=time.monotonic() + _NO_DEADLINE_S,
        tenant=admission.tenant,
        priority=admission.priority,
    )


def _check_ids(request: JournalledRequest, vocab_size: int) -> None:
    prompt = np.frombuffer(request.admission.prompt, np.int32)
    highest = max(int(prompt.max(initial=0)), max(request.tokens, default=0))
    if highest >= vocab_size:
        raise OperatorError(
            f"request {request.admission.id:#018x} has token {highest}, and this model has "
            f"{vocab_size}: the journal is of another model; name that one with --model"
        )
