"""GraphSteps: what the workers' graphs did, as counters, and a line the first time one did not.

Every step that no graph was admitted for has a reason (wire.envelope.Refusal). Some belong to
serving: a prompt is no decode step, and some have no room in a graph. Any other says that a fast
path is lost, and is told once for the life of the server. Owned by the supervisor; what it is told
comes from proc.worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.core.metrics import Metrics
from holdfast.proc.lifecycle.actions import Notice
from holdfast.wire.envelope import Refusal

_ORDINARY = {
    Refusal.DISABLED,
    Refusal.EMPTY,
    Refusal.PREFILL,
    Refusal.MIXED_QUERY_LENS,
    Refusal.TOO_MANY_TOKENS,
    Refusal.TOO_MANY_PROMPTS,
    Refusal.TOO_MANY_GATHERED,
}


class GraphSteps:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._reasons: set[str] = set()

    def told(self, message: Mapping[str, Any]) -> list[Notice]:
        """Count a worker's `steps` (proc.child); what there is to say of it.

        Raises LookupError, TypeError or ValueError when it makes no sense.
        """
        for kind, told in (("decode", "graph"), ("mixed", "mixed")):
            for sampler, count in dict(message[told]).items():
                self._metrics.add("graph_steps_total", count, (kind, sampler))
        notices = []
        for reason, count in dict(message["eager"]).items():
            self._metrics.add("eager_steps_total", count, (reason,))
            if reason not in self._reasons and reason not in _ORDINARY:
                text = f"a step was not replayed: {reason} (counted in eager_steps_total)"
                notices.append(Notice("warning", "worker", text))
            self._reasons.add(reason)
        return notices
