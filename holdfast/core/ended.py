"""Ended requests that somebody may still ask for: a client that missed its end when the core died.

Oldest first, bounded in number and tokens by a multiple (`shares`) of what can be live, without
prompts and parameters. core.brain owns two: the last ones that ended under it, and those that an
api process has not asked for since the core was replaced.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec
import numpy as np

from holdfast.config import Limits
from holdfast.core.journal import Admission
from holdfast.wire.messages import Sampling

Entry = tuple[Admission, np.ndarray, int]


class EndedRequests:
    """An entry is (admission, output tokens int32[k], end)."""

    def __init__(self, limits: Limits, *, shares: int) -> None:
        self._requests_max = shares * limits.live_requests
        self._tokens_max = shares * limits.live_tokens
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._tokens = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._entries

    def add(self, record: Admission, output: np.ndarray, end: int) -> None:
        """Keep one more, at the cost of the oldest when a bound is reached."""
        self.take(record.id)
        bare = msgspec.structs.replace(record, prompt=b"", sampling=Sampling())
        self._entries[record.id] = (bare, output, end)
        self._tokens += output.size
        while len(self._entries) > self._requests_max or self._tokens > self._tokens_max:
            self.take(next(iter(self._entries)))

    def take(self, request_id: int) -> Entry | None:
        """Remove and return an entry; None when it is not here."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._tokens -= entry[1].size
        return entry

    def forget(self, api: int, before: int) -> None:
        """Nobody will ask for requests of the api process of this index with ids below `before`."""
        for request_id, (record, _, _) in list(self._entries.items()):
            if record.api == api and request_id < before:
                self.take(request_id)
