"""Replies: what the core has to say to its api processes, in order, until somebody takes it.

core.commit puts the tokens of steps here by itself (its array code knows no requests); core.brain
everything else. Messages, not bytes: in one process nobody needs them encoded. Knows no link.
"""

from __future__ import annotations

import numpy as np

from holdfast.wire.link import Kind
from holdfast.wire.messages import End, ToApi, TokenBatch, encode

# (api, message)
Output = tuple[int, ToApi | TokenBatch]

# Plain integers: reading a member of an IntEnum costs a microsecond in Python 3.11.
_MESSAGE, _TOKENS = int(Kind.MESSAGE), int(Kind.TOKENS)


def framed(message: ToApi | TokenBatch) -> tuple[int, bytes]:
    """(link.Kind, payload) of a message, for whoever sends it over a link."""
    if isinstance(message, TokenBatch):
        return _TOKENS, message.encode()
    return _MESSAGE, encode(message)


class Replies:
    def __init__(self) -> None:
        self.queue: list[Output] = []

    def take(self) -> list[Output]:
        """All of it, in order; whoever takes it sends it, or reads it at once."""
        output = self.queue.copy()
        self.queue.clear()
        return output

    def say(self, api: int, message: ToApi) -> None:
        self.queue.append((api, message))

    def say_tokens(
        self,
        api: int,
        request_id: int,
        first: int,
        tokens: np.ndarray,
        cached_tokens: int,
        end: int = 0,
    ) -> None:
        """Tokens int32[k] of a request from index `first` on, those before it being known.

        end: how the request ended. STOP and LENGTH are said with the last token, as they are when
        nothing went wrong: the text of a stop id is not the client's.
        """
        tokens = tokens[first:]
        count = tokens.size
        if count == 0:
            return
        batch = TokenBatch(
            step=0,
            requests=np.full(count, request_id, np.uint64),
            indexes=np.arange(first, first + count, dtype=np.int32),
            tokens=tokens.copy(),  # of the row table, which goes on
            ends=np.zeros(count, np.uint8),
            cached=np.full(count, cached_tokens, np.int32),
        )
        if end in (End.STOP, End.LENGTH):
            batch.ends[-1] = end
        self.queue.append((api, batch))
