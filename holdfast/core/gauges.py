"""Gauges: publishes what the parts of a brain have counted, every few steps.

The parts count in plain integers, because a metric costs a lock-free write to shared memory and
there are many events a step.
"""

from __future__ import annotations

from holdfast.core.commit import Commit
from holdfast.core.metrics import Metrics
from holdfast.core.scheduler import Scheduler
from holdfast.kv.tiers import Tiers

_TIER_COUNTERS = {
    "stored": "pages_stored_total",
    "loaded": "pages_loaded_total",
    "spilled": "pages_spilled_total",
    "fetched": "pages_fetched_total",
    "failure": "tier_failures_total",
    "skip": "tier_skips_total",
    "stale": "stale_acks_total",
}


class Gauges:
    def __init__(self, metrics: Metrics, committer: Commit, scheduler: Scheduler) -> None:
        self.metrics = metrics
        self.committer = committer
        self.scheduler = scheduler
        self._told: dict[str, int] = {}

    def publish(self, waiting: int) -> None:
        """Add what was counted since the last time, and set what is. waiting: requests without a
        row."""
        scheduler, ledger, metrics = self.scheduler, self.scheduler.ledger, self.metrics
        now = {
            "tokens_generated_total": self.committer.tokens_generated,
            "pages_evicted_total": ledger.evicted,
            "preemptions_total": scheduler.preempted,
            "pages_kept_total": ledger.kept,
            "pages_dropped_total": ledger.dropped,
            "pages_verified_total": scheduler.checks.verified,
            "pages_scrubbed_total": scheduler.checks.scrubbed,
            "tokens_recomputed_total": scheduler.recomputed,
        }
        if (drafts := scheduler.drafts) is not None:
            now["draft_tokens_total"] = drafts.proposed
            now["draft_tokens_accepted_total"] = drafts.accepted
        for name, value in now.items():
            if value != (told := self._told.get(name, 0)):
                metrics.add(name, value - told)
        self._told = now
        metrics.set("rows_running", scheduler.running.active)
        metrics.set("requests_waiting", waiting)
        metrics.set("pages_free", ledger.pools[0].free)
        metrics.set("pages_cached", ledger.cached)
        metrics.set("pages_held", ledger.held())
        if scheduler.tiers is not None:
            self._publish_tiers(scheduler.tiers)

    def _publish_tiers(self, tiers: Tiers) -> None:
        for (name, reason), count in tiers.counts.items():
            labels = (reason,) if reason else ()
            self.metrics.add(_TIER_COUNTERS[name], count, labels)
        tiers.counts.clear()
        self.metrics.set("host_slots_held", tiers.host.held)
        self.metrics.set("disk_blocks_held", tiers.disk.held)
