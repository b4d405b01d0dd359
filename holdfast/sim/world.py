"""The world of one seed: limits, workload and fault rates, all drawn before anything runs.

Swarm testing: each kind of fault is on or off by a coin, and when on its *rate* is drawn, so that
seeds differ in what they stress instead of all being an average of everything. Limits are drawn as
well, small and odd ones first of all, since page size 1 or a queue of 2 hides and shows other bugs
than the defaults. Pure: a seed and a profile give a World, nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from random import Random

import numpy as np

from holdfast.config import Limits

MILLISECOND = 1000  # virtual time is integer microseconds
SECOND = 1000 * MILLISECOND
VOCAB = 251


@dataclass(frozen=True, slots=True)
class Rates:
    """Chances, per step unless said otherwise; 0 = this fault is off in this world."""

    crash: float = 0.0  # the worker dies before it runs a plan
    crash_after: float = 0.0  # ... after it ran it, before the result is out
    hang: float = 0.0  # the worker never answers; killed at its deadline, late writes till then
    slow: float = 0.0  # a step takes a hundred times as long
    result_late: float = 0.0  # the result waits in its channel
    result_lost: float = 0.0
    result_twice: float = 0.0
    result_old_epoch: float = 0.0  # a result of an ended epoch arrives once more
    nan_row: float = 0.0
    delta_lost: float = 0.0  # the device misses a plan's page writes
    delta_twice: float = 0.0  # the device appends a plan's query tokens twice over
    core_death: float = 0.0
    api_death: float = 0.0
    respawn_fault: float = 0.0  # per replacement: the new worker dies as well
    abort: float = 0.0  # per request: its client goes away at a random moment
    stop_string: float = 0.0  # per request: api ends it after some token
    short_deadline: float = 0.0  # per request
    # Of tiers: per copy or move.
    copy_late: float = 0.0
    copy_failed: float = 0.0
    ack_withheld: float = 0.0  # the acknowledgement of a copy never comes
    disk_late: float = 0.0
    disk_error: float = 0.0
    host_corrupt: float = 0.0  # per step: a cell of a held slot changes
    disk_corrupt: float = 0.0


TIER_RATES = (
    "copy_late",
    "copy_failed",
    "ack_withheld",
    "disk_late",
    "disk_error",
    "host_corrupt",
    "disk_corrupt",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One client request. Times in virtual microseconds from the start."""

    ids: tuple[int, ...]
    at: int
    api: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: tuple[int, ...]
    tenant: str
    priority: int
    timeout: int
    abort_after: int | None  # after `at`
    finish_after: int | None  # tokens after which a stop string is found


@dataclass(frozen=True, slots=True)
class World:
    seed: int
    limits: Limits
    rates: Rates
    jobs: tuple[Job, ...]
    step_time: int
    channel_time: int
    fence_time: int  # from the kill to the proof that the old worker is gone
    respawn_time: int
    faults_until: int  # virtual time at which the liveness phase begins
    copy_time: int = 1  # bounds of each half of a copy and of a move
    disk_time: int = 1


PROFILES = {
    # name: (requests at most, fault kinds on with this chance, shortage of pages)
    "short": (10, 0.35, 0.5),
    "faults": (24, 0.7, 0.3),
    "pressure": (40, 0.15, 1.0),
    "calm": (30, 0.0, 0.4),
    "tiers": (24, 0.3, 1.0),
}


def draw(seed: int, profile: str = "short") -> World:
    """The world of a seed. Independent of the process's hash seed and of everything else."""
    rng = Random(seed * 0x9E37_79B9 + 1)
    requests_max, fault_chance, shortage = PROFILES[profile]
    limits = _draw_limits(rng, shortage)
    rates = _draw_rates(rng, fault_chance)
    step_time = rng.choice([200, 2 * MILLISECOND, 20 * MILLISECOND])
    span = rng.choice([5, 50, 400]) * step_time
    jobs = _draw_jobs(rng, limits, rates, rng.randint(1, requests_max), span)
    limits, rates, copy_time, disk_time = _draw_tiers(seed, profile, limits, rates, step_time)
    if profile == "tiers":
        jobs = _long_prompts(seed, limits, jobs)
    return World(
        seed=seed,
        limits=limits,
        rates=rates,
        jobs=jobs,
        step_time=step_time,
        channel_time=rng.choice([10, 100, step_time]),
        fence_time=rng.choice([1, 30]) * step_time,
        respawn_time=rng.choice([1, 10, 50]) * step_time,
        faults_until=span * 3 + 200 * step_time,
        copy_time=copy_time,
        disk_time=disk_time,
    )


def _draw_tiers(
    seed: int, profile: str, limits: Limits, rates: Rates, step_time: int
) -> tuple[Limits, Rates, int, int]:
    """Tiers, their faults and their times, from a Random of their own: worlds without tiers are
    what they would be if there were none."""
    rng = Random(seed * 0xB529_7A4D + 5)
    on = profile == "tiers" or rng.random() < 0.2
    host_pages = rng.choice([1, 2, 5, 16, 100])
    disk_pages = rng.choice([0, 0, 1, 20, 200, 200])
    if disk_pages > 1:
        host_pages = rng.choice([1, 4, 8, 12])  # or nothing would ever be spilled
    copy_time = rng.choice([1, step_time // 4, 3 * step_time])
    disk_time = copy_time * rng.choice([1, 5])
    slowest = max(step_time, disk_time)
    if on:
        limits = replace(
            limits,
            queue_requests=64,
            live_tokens=100 * limits.context_tokens,
            host_pages=host_pages,
            disk_pages=disk_pages,
            copies_max=rng.choice([2, 3, 64]),
            copy_timeout_s=rng.choice([10, 40]) * slowest * 1e-6,
        )
    drawn = {}
    chance = 0.5 if profile == "tiers" else PROFILES[profile][1]
    for name in TIER_RATES:
        struck, exponent = rng.random() < chance, rng.uniform(-2.5, -0.7)
        drawn[name] = 10.0**exponent if struck and on else 0.0
    for costly in ("copy_late", "ack_withheld"):  # an epoch each
        drawn[costly] /= 3
    if drawn["disk_late"]:
        # Moves are few, and those of an older core fewer.
        drawn["disk_late"] = max(drawn["disk_late"], 0.2)
        drawn["core_death"] = max(rates.core_death, rng.choice([0.0, 0.01, 0.03]))
    return limits, replace(rates, **drawn), copy_time, disk_time


def _long_prompts(seed: int, limits: Limits, jobs: tuple[Job, ...]) -> tuple[Job, ...]:
    """The jobs with long beginnings in common and short outputs: what was evicted comes again."""
    rng = Random(seed * 0xD6E8_FEB8 + 3)
    context = limits.context_tokens
    stems = [[rng.randrange(VOCAB) for _ in range(context)] for _ in range(rng.randint(1, 6))]
    changed = []
    for job in jobs:
        stem, kept = list(rng.choice(stems)), rng.random() < 0.2
        cut, output = rng.randint(context // 2, context - 8), rng.randint(1, 8)
        if rng.random() < 0.3:
            stem[rng.randrange(cut)] = rng.randrange(VOCAB)
        changed.append(job if kept else replace(job, prompt=tuple(stem[:cut]), max_tokens=output))
    return tuple(changed)


def _draw_limits(rng: Random, shortage: float) -> Limits:
    page_tokens = rng.choice([1, 2, 3, 4, 7, 16])
    context = rng.choice([24, 40, 64, 96])
    rows = rng.choice([1, 2, 3, 5, 8])
    columns = -(-context // page_tokens)
    if rng.random() < shortage:
        pages = columns + 1 + rng.randint(0, columns)
    else:
        pages = columns * (rows + rng.randint(1, 3)) + 1
    return Limits(
        vocab_size=VOCAB,
        context_tokens=context,
        page_tokens=page_tokens,
        pages=pages,
        rows_max=rows,
        prefill_tokens=rng.choice([1, 3, 8, 16, 64]),
        steps_ahead=rng.choice([1, 2, 2, 2]),
        queue_requests=rng.choice([2, 5, 64]),
        live_tokens=rng.choice([context, 4 * context, 100 * context]),
        bias_entries=2,
        stop_ids=4,
        api_processes=rng.choice([1, 1, 2]),
    )


def _draw_rates(rng: Random, fault_chance: float) -> Rates:
    drawn = {}
    for rate in (rate for rate in fields(Rates) if rate.name not in TIER_RATES):
        # Every rate is drawn, used or not, so that one coin does not shift all the others.
        on, exponent = rng.random() < fault_chance, rng.uniform(-2.5, -0.7)
        drawn[rate.name] = 10.0**exponent if on else 0.0
    for per_request in ("abort", "stop_string", "short_deadline"):
        if rng.random() < 0.5:
            drawn[per_request] = max(drawn[per_request], rng.uniform(0.0, 0.5))
    for rare in ("core_death", "api_death"):
        drawn[rare] /= 4
    return Rates(**drawn)


def _draw_jobs(rng: Random, limits: Limits, rates: Rates, count: int, span: int) -> tuple[Job, ...]:
    # Few different prompts, cut at random lengths: prefixes are shared, and forked.
    stems = [[rng.randrange(VOCAB) for _ in range(limits.context_tokens)] for _ in range(3)]
    jobs, next_id = [], 1
    for _ in range(count):
        stem = list(rng.choice(stems))
        if rng.random() < 0.2:
            # A page that follows itself: told from its twin by its parent alone.
            stem = stem[: rng.choice([1, 2, 7])] * limits.context_tokens
            stem = stem[: limits.context_tokens]
        if rng.random() < 0.3:
            stem[rng.randrange(len(stem))] = rng.randrange(VOCAB)
        length = rng.randint(1, limits.context_tokens - 1)
        choices = rng.choice([1, 1, 1, 1, 3])
        stop_ids = tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 4])))
        api = rng.randrange(limits.api_processes)
        jobs.append(
            Job(
                ids=tuple((api << 48) | (next_id + at) for at in range(choices)),
                at=rng.randint(0, span),
                api=api,
                prompt=tuple(stem[:length]),
                max_tokens=rng.randint(1, limits.context_tokens - length),
                stop_ids=stop_ids,
                tenant=rng.choice(["a", "a", "b"]),
                priority=rng.choice([0, 0, 0, 1]),
                timeout=rng.randint(1, span) if rng.random() < rates.short_deadline else 10**12,
                abort_after=rng.randint(0, span) if rng.random() < rates.abort else None,
                finish_after=rng.randint(1, 12) if rng.random() < rates.stop_string else None,
            )
        )
        next_id += choices
    return tuple(sorted(jobs, key=lambda job: (job.at, job.ids)))


def without(world: World, jobs: tuple[Job, ...] | None = None, **rates: float) -> World:
    """The same world with fewer jobs or other rates: what shrinking tries."""
    return replace(
        world,
        jobs=world.jobs if jobs is None else jobs,
        rates=replace(world.rates, **rates),
    )


def prompt_array(job: Job) -> np.ndarray:
    """int32[k] prompt ids of a job."""
    return np.array(job.prompt, np.int32)
