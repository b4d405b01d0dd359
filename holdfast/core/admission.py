"""Admission: who may enter, and who goes next.

The queue is bounded in requests and in tokens; what is over a bound is refused at once with a
reason, what is taken is never lost. Order: higher priority first; within a priority round-robin
over tenants (API keys), so that one key's burst does not starve the others; within a tenant by
arrival. A preempted request goes back to the front of its tenant's line. Knows no rows, pages or
steps.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from holdfast.config import Limits
from holdfast.core.request import Phase, Request
from holdfast.errors import EngineFault, InvalidField, NotReady, QueueFull, RequestError
from holdfast.wire.messages import Submit


class WaitingQueue:
    """Admitted requests without a row. Ended ones are skipped when they come up."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._levels: dict[int, OrderedDict[str, deque[Request]]] = {}

    @property
    def empty(self) -> bool:
        """Whether nobody waits."""
        return not self._levels or self.peek() is None

    def push(self, request: Request) -> None:
        self._line(request).append(request)

    def push_front(self, request: Request) -> None:
        """A request that had a row before: it is next of its tenant, and its tenant is next."""
        self._line(request).appendleft(request)
        level = self._levels[request.admission.priority]
        level.move_to_end(request.admission.tenant, last=False)

    def peek(self) -> Request | None:
        """Who goes next, without taking it."""
        for priority in sorted(self._levels, reverse=True):
            level = self._levels[priority]
            while level:
                tenant, line = next(iter(level.items()))
                while line and line[0].phase is not Phase.WAITING:
                    line.popleft()
                if line:
                    return line[0]
                del level[tenant]
            del self._levels[priority]
        return None

    def pop(self, request: Request) -> None:
        """Take a request that waits, mostly the one that `peek` showed; its tenant goes to the end
        of the round."""
        level = self._levels[request.admission.priority]
        level[request.admission.tenant].remove(request)
        level.move_to_end(request.admission.tenant)

    def _line(self, request: Request) -> deque[Request]:
        level = self._levels.setdefault(request.admission.priority, OrderedDict())
        return level.setdefault(request.admission.tenant, deque())


class Admission:
    """The decision on a Submit: None to take it, or the error that refuses it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self.live_requests = 0
        self.live_tokens = 0

    def judge(self, submit: Submit, queued: int, step_seconds: float) -> RequestError | None:
        """Whether all choices of `submit` can be taken, with `queued` requests waiting already."""
        limits = self.limits
        prompt_len = len(submit.prompt) // 4
        limit = prompt_len + submit.max_tokens
        choices = len(submit.ids)
        if self.draining:
            return NotReady("the server is shutting down")
        if not 0 < limit <= limits.context_tokens or prompt_len == 0 or submit.max_tokens < 1:
            return InvalidField(
                "max_tokens",
                f"{prompt_len} prompt tokens and {submit.max_tokens} output tokens do not fit the "
                f"context of {limits.context_tokens} tokens",
            )
        pages = limits.pages_for_tokens(limit)
        if pages > limits.pages_usable:
            return InvalidField(
                "max_tokens",
                f"{limit} tokens need {pages} KV pages of {limits.page_tokens} tokens; this server "
                f"has {limits.pages_usable} in all",
                code="never_fits",
            )
        full = queued + choices > limits.queue_requests
        tokens = self.live_tokens + choices * limit > limits.live_tokens
        if full or tokens:
            if choices > limits.queue_requests or choices * limit > limits.live_tokens:
                return EngineFault("one request is larger than the whole queue", code="never_fits")
            what = (
                f"{queued} of {limits.queue_requests} requests wait"
                if full
                else f"{self.live_tokens} of {limits.live_tokens} tokens are promised"
            )
            # A rough but honest guess: a queue's worth of rows leaves every few hundred steps.
            wait_s = min(60.0, max(1.0, 64 * step_seconds * (1 + queued / limits.rows_max)))
            return QueueFull(f"the queue is full: {what}", retry_after_s=round(wait_s))
        return None

    def took(self, request: Request) -> None:
        self.live_requests += 1
        self.live_tokens += request.limit

    def ended(self, request: Request) -> None:
        self.live_requests -= 1
        self.live_tokens -= request.limit
