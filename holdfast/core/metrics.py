"""Counters, gauges and histograms in one shared buffer: a slot a process, one writer a slot.

Owns the table of every metric of the engine (names, help, labels, buckets) and its layout as
float64 cells. The buffer is a memfd of the supervisor, so numbers outlive the process that wrote
them: a restarted writer of the slot continues where its predecessor ended. Writers take no lock:
an aligned 8-byte store is whole, and only the slot's owner writes it. Counts are exact below 2**53.

    slot 0 core | slot 1 supervisor | slot 2 + i api process i
    slot: stamp of the layout | cells of METRICS in order
    counter, gauge: one cell a label combination; histogram: one cell a bucket, +Inf, sum

Label values are a fixed list too; a value outside it is counted as `other`, so that nobody outside
can make the table grow. Knows nothing of requests or HTTP; prometheus_client is imported to render.
"""

from __future__ import annotations

import itertools
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.errors import InvariantError, require

if TYPE_CHECKING:
    from prometheus_client.core import Metric

NAMESPACE = "holdfast"
OTHER = "other"
CORE_SLOT = 0
SUPERVISOR_SLOT = 1
API_SLOT = 2
_CELL_BYTES = 8

# 100 us (a brain step) to 5 s (a CPU step of a large model).
_STEP_BUCKETS = tuple(m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5))
# 1 ms (between two tokens) to 500 s (a long answer).
_WAIT_BUCKETS = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2.5, 5))
# 1 ms (an end of file) to 100 s (a large model's weights are loaded anew).
_FAULT_BUCKETS = (*(m * 10.0**e for e in range(-3, 2) for m in (1, 2, 5)), 100.0)

ENDS = ("stop", "length", "cancelled", "deadline", "engine_fault", "not_finite", "shutdown")
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
)
CODES = ("200", "400", "401", "404", "405", "408", "413", "429", "499", "500", "503", "504")
REFUSALS = ("refused", "queue_full", "never_fits")
CANCELS = ("disconnect", "slow_reader", "deadline", "core_lost", "fault", "refused", "shutdown")
FOUND_BY = ("promotion", "scrub", "store")
TIER_FAILURES = ("failed", "bad_sum", "late")
TIER_SKIPS = ("busy", "full", "disk_busy")
ROLES = ("api", "core", "worker", "standby", "keeper")
# What was replayed: a step of decode, or one with prompts; and what drew behind it: the kernel of
# plain draws, or the general sampler.
STEPS = ("decode", "mixed")
SAMPLERS = ("fast", "general")
# wire.envelope.Refusal, which needs numpy and is not imported here; a test holds them together.
EAGER = (
    "disabled",
    "empty",
    "prefill",
    "mixed_query_lens",
    "bytes_moved",
    "not_captured",
    "too_many_rows",
    "too_many_tokens",
    "too_many_prompts",
    "too_many_gathered",
    "pool_epoch",
    "weights_epoch",
    "address_moved",
    "context_too_long",
    "window_phase",
)
# What is lost, and of a worker how: ended by a signal or an exit code of its own, by SIGKILL from
# outside, no result in time, its own word, a result or frame that the core refused, silence where
# it should have spoken to the supervisor; weights: they were not the bytes that were loaded; page:
# one was not what was sealed; unstarted: no process could be made.
FAULTS = (
    "worker_crash",
    "worker_killed",
    "worker_hang",
    "worker_fault",
    "worker_rejected",
    "worker_stuck",
    "weights",
    "page",
    "core",
    "api",
    "keeper",
    "standby",
    "unstarted",
)


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric. `labels`: name -> allowed values. `buckets`: upper bounds of a histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.labels)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        return list(itertools.product(*[(*values, OTHER) for _, values in self.labels]))

    @property
    def cells(self) -> int:
        return len(self.buckets) + 2 if self.kind == "histogram" else len(self.combinations)


def _counter(name: str, help: str, **labels: tuple[str, ...]) -> Declared:
    return Declared(name, "counter", help, tuple(labels.items()))


def _gauge(name: str, help: str, **labels: tuple[str, ...]) -> Declared:
    return Declared(name, "gauge", help, tuple(labels.items()))


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Declared:
    return Declared(name, "histogram", help, buckets=buckets)


METRICS: tuple[Declared, ...] = (
    _counter("tokens_generated_total", "Output tokens committed by the core"),
    _counter("tokens_prefilled_total", "Tokens computed without drawing one: prompts, recomputes"),
    _counter("prefix_hit_tokens_total", "Prompt tokens served from the prefix cache"),
    _counter("prefix_query_tokens_total", "Prompt tokens looked up in the prefix cache"),
    _counter("draft_tokens_total", "Draft tokens tried (speculation)"),
    _counter("draft_tokens_accepted_total", "Draft tokens that were right"),
    _counter("preemptions_total", "Requests sent back to the queue because pages ran short"),
    _counter("requests_admitted_total", "Choices admitted"),
    _counter("requests_refused_total", "Requests refused by the core", reason=REFUSALS),
    _counter("requests_ended_total", "Choices ended, by reason", reason=ENDS),
    _counter("steps_total", "Plans launched"),
    _counter("stale_results_total", "Results of an older epoch or step, dropped"),
    _counter("digest_mismatches_total", "Results that contradicted the plan; each ends an epoch"),
    _counter("pages_evicted_total", "Cached pages given up for new ones"),
    _counter("pages_kept_total", "Sealed KV pages that outlived their worker"),
    _counter("pages_dropped_total", "Sealed KV pages given up: a worker's end, a wrong sum"),
    _counter("pages_verified_total", "Kept KV pages found unchanged before they were used again"),
    _counter("pages_scrubbed_total", "KV pages that the scrub found unchanged"),
    _counter("pages_failed_total", "Sealed KV pages that had changed", found=FOUND_BY),
    _counter("tokens_recomputed_total", "Tokens computed again after a fault"),
    _counter("tokens_doubtful_total", "Tokens emitted before wrong weights were found"),
    _counter("pages_stored_total", "KV pages copied to the host tier"),
    _counter("pages_loaded_total", "KV pages copied back from the host tier"),
    _counter("pages_spilled_total", "KV pages moved from host to disk"),
    _counter("pages_fetched_total", "KV pages moved back from disk"),
    _counter("tier_failures_total", "Copies whose page was not used", reason=TIER_FAILURES),
    _counter("tier_skips_total", "Copies that were not ordered: bounds", reason=TIER_SKIPS),
    _counter("stale_acks_total", "Acknowledgements of copies that nobody waits for"),
    _gauge("host_slots_held", "Pages in the host tier"),
    _gauge("disk_blocks_held", "Pages on disk"),
    _gauge("rows_running", "Requests in a row"),
    _gauge("requests_waiting", "Requests without a row"),
    _gauge("pages_free", "KV pages nobody holds"),
    _gauge("pages_cached", "KV pages held by the prefix cache alone"),
    _gauge("pages_held", "KV pages held by requests"),
    _histogram("step_seconds", "Device time of a step", _STEP_BUCKETS),
    _histogram("brain_seconds", "Time of the brain for a step", _STEP_BUCKETS),
    _counter("process_restarts_total", "Processes replaced after their end, by role", role=ROLES),
    _counter("compiles_after_ready_total", "Kernels compiled in a step; each one stalled it"),
    _counter("graph_steps_total", "Steps replayed from graphs", kind=STEPS, sampler=SAMPLERS),
    _counter("eager_steps_total", "Steps that no graph was admitted for, by reason", reason=EAGER),
    _gauge("processes_ready", "Processes that are up, by role; a standby: prepared", role=ROLES),
    _gauge("worker_epoch", "Number of the present worker, from 1"),
    _counter("faults_total", "Processes lost by a fault, and damage found, by kind", kind=FAULTS),
    _counter("resumes_total", "Recoveries that ended: a worker computes again"),
    _counter("streams_resumed_total", "Live requests that went on after a recovery"),
    _histogram(
        "noticed_seconds",
        "From a lost worker's word, or of a hang from the start of its step, to the notice. A death"
        " without a word is seen by the end of its socket and not counted here",
        _FAULT_BUCKETS,
    ),
    _histogram(
        "fenced_seconds",
        "From the notice that a process is lost to its pidfd: nothing of it runs any more",
        _FAULT_BUCKETS,
    ),
    _histogram(
        "resumed_seconds",
        "From the notice to the first new token, or to the next worker when no stream waited",
        _FAULT_BUCKETS,
    ),
    _counter("http_requests_total", "HTTP requests answered", route=ROUTES, code=CODES),
    _gauge("streams_open", "Generations a client is waiting for"),
    _counter("stream_cancelled_total", "Generations given up before their end", reason=CANCELS),
    _counter("token_gaps_total", "Token indexes that came out of order; each fails a request"),
    _histogram("ttft_seconds", "From the request to its first token", _WAIT_BUCKETS),
    _histogram("itl_seconds", "Between two tokens of one choice", _WAIT_BUCKETS),
    _histogram("e2e_seconds", "From the request to its last token", _WAIT_BUCKETS),
    _counter("prompt_tokens_total", "Prompt tokens of finished requests"),
    _counter("completion_tokens_total", "Output tokens delivered to clients' choices"),
)


class _Layout:
    """Where each metric's cells start, in cells from the start of a slot."""

    def __init__(self, declared: Sequence[Declared]) -> None:
        self.declared = {metric.name: metric for metric in declared}
        self.start: dict[str, int] = {}
        # Of counters and gauges: (name, label values) -> cell.
        self.cell: dict[tuple[str, tuple[str, ...]], int] = {}
        at = 1
        for metric in declared:
            self.start[metric.name] = at
            if metric.kind != "histogram":
                for offset, values in enumerate(metric.combinations):
                    self.cell[metric.name, values] = at + offset
            at += metric.cells
        self.cells = at
        self.stamp = float(zlib.crc32(repr(declared).encode()) or 1)


class Metrics:
    """The writer of one slot. `buffer` is writable, zero at first, and outlives the process."""

    def __init__(self, buffer: memoryview | bytearray, slot: int) -> None:
        layout = _Layout(METRICS)
        cells = memoryview(buffer).cast("B")[: self.size(slot + 1)].cast("d")
        require(len(cells) == (slot + 1) * layout.cells, f"metrics buffer lacks slot {slot}")
        self._cells = cells[slot * layout.cells :]
        self._layout = layout
        self._cell = layout.cell
        if self._cells[0] not in (0.0, layout.stamp):
            raise InvariantError(f"metrics slot {slot} was written with another table")
        self._cells[0] = layout.stamp

    @staticmethod
    def size(slots: int) -> int:
        """Bytes of a buffer of `slots` slots."""
        return slots * _Layout(METRICS).cells * _CELL_BYTES

    @classmethod
    def private(cls) -> Metrics:
        """A slot in memory of its own, for one process alone."""
        return cls(bytearray(cls.size(1)), 0)

    def add(self, name: str, amount: float = 1, labels: tuple[str, ...] = ()) -> None:
        """Count up; unknown label values count as `other`."""
        at = self._cell.get((name, labels))
        self._cells[self._other(name, labels) if at is None else at] += amount

    def set(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Set a gauge."""
        at = self._cell.get((name, labels))
        self._cells[self._other(name, labels) if at is None else at] = value

    def observe(self, name: str, value: float) -> None:
        """Count `value` in the histogram `name`."""
        buckets = self._layout.declared[name].buckets
        at = self._layout.start[name]
        self._cells[at + bisect_left(buckets, value)] += 1
        self._cells[at + len(buckets) + 1] += value

    def get(self, name: str, labels: tuple[str, ...] = ()) -> float:
        """This slot's value of a counter or gauge."""
        return self._cells[self._cell[name, labels]]

    def _other(self, name: str, labels: tuple[str, ...]) -> int:
        declared = self._layout.declared[name]
        require(len(labels) == len(declared.labels), f"{name} has labels {declared.label_names}")
        known = (
            value if value in allowed else OTHER
            for value, (_, allowed) in zip(labels, declared.labels, strict=True)
        )
        return self._cell[name, tuple(known)]


class MetricsBoard:
    """The reader: all slots of a buffer, summed, as Prometheus text."""

    def __init__(self, buffer: memoryview | bytearray, slots: int) -> None:
        self._layout = _Layout(METRICS)
        size = Metrics.size(slots)
        require(len(memoryview(buffer).cast("B")) >= size, f"metrics buffer lacks {slots} slots")
        self._cells = memoryview(buffer).cast("B")[:size].cast("d")
        self._slots = slots

    def render(self) -> bytes:
        """The exposition text, of content type `prometheus_client.CONTENT_TYPE_LATEST`."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def total(self, name: str, labels: tuple[str, ...] = ()) -> float:
        """A counter or gauge, summed over the slots."""
        return self._sum(self._layout.cell[name, labels])

    def describe(self) -> Iterable[Metric]:
        """For the registry: names are not checked against a global one."""
        return []

    def collect(self) -> Iterable[Metric]:
        """prometheus_client's collector protocol."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for metric in METRICS:
            name = f"{NAMESPACE}_{metric.name}"
            if metric.kind == "histogram":
                family = HistogramMetricFamily(name, metric.help)
                family.add_metric([], *self._histogram(metric))
                yield family
                continue
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            plain = make(name, metric.help, labels=metric.label_names)
            for values in metric.combinations:
                total = self.total(metric.name, values)
                # Of a labelled metric only what has happened: the combinations are many.
                if total or not metric.labels:
                    plain.add_metric(values, total)
            yield plain

    def _histogram(self, metric: Declared) -> tuple[list[tuple[str, float]], float]:
        at = self._layout.start[metric.name]
        counts = [self._sum(at + offset) for offset in range(len(metric.buckets) + 1)]
        bounds = [*(f"{bound:.6g}" for bound in metric.buckets), "+Inf"]
        cumulated = list(itertools.accumulate(counts))
        return list(zip(bounds, cumulated, strict=True)), self._sum(at + len(counts))

    def _sum(self, cell: int) -> float:
        width = self._layout.cells
        return sum(self._cells[slot * width + cell] for slot in range(self._slots))
