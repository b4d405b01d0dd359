"""Which plans are mixed steps: rows that decode beside rows whose prompts are computed.

A step's reason in `eager_steps` does not tell: one with a prompt in it is `prefill`, be there rows
that decode beside it or not (`mixed_query_lens` is for drafts of different depths).
"""

from __future__ import annotations

from holdfast.wire.plan import StepPlan


class MixedSteps:
    """Sees every plan of a runner, in order. A row decodes once it has drawn a token."""

    def __init__(self) -> None:
        self.count = 0
        self._drawn: set[int] = set()

    def see(self, plan: StepPlan) -> None:
        self._drawn -= {*plan.admits["row"].tolist(), *plan.clears.tolist()}
        decode = self._drawn.intersection(plan.rows.tolist())
        self.count += 0 < len(decode) < plan.rows.size
        self._drawn.update(plan.rows[plan.samples != 0].tolist())
