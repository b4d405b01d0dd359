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
from holdfast.core.checks import SCRUB_PAGES, VERIFY_PAGES
from holdfast.proc.lifecycle.policy import Policy
from holdfast.proc.lifecycle.states import Standby
from holdfast.sim.vocabulary import VOCAB, draw_stops

MILLISECOND = 1000  # virtual time is integer microseconds
SECOND = 1000 * MILLISECOND
FOREVER = 10**12
ENDLESS = 1_000_000


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
    respawn_fault: float = 0.0  # per start of any process: it dies meanwhile
    abort: float = 0.0  # per request: its client goes away at a random moment
    output_twice: float = 0.0  # per frame: the core says it to api once more
    output_lost: float = 0.0  # per frame of tokens
    stop_string: float = 0.0  # per request: it has stop strings
    slow_reader: float = 0.0  # per request: its client is slow to read
    short_deadline: float = 0.0  # per request
    # Of tiers: per copy or move.
    copy_late: float = 0.0
    copy_failed: float = 0.0
    ack_withheld: float = 0.0  # the acknowledgement of a copy never comes
    disk_late: float = 0.0
    fetch_late: float = 0.0  # where a move from the disk may be: somebody waits for it
    disk_error: float = 0.0
    host_corrupt: float = 0.0  # per step: a cell of a held slot changes
    disk_corrupt: float = 0.0
    waiter_leaves: float = 0.0  # per plan or order that brings pages: a client that waits goes
    # Of processes, each per chance to strike.
    killed: float = 0.0  # per step: SIGKILL of the worker by nobody of ours
    standby_death: float = 0.0  # while it waits
    promote_fault: float = 0.0  # the worker dies about its verification
    weights_bad: float = 0.0  # the slab's bytes have changed when a worker sums them
    spawn_fails: float = 0.0  # no process can be made
    never_ready: float = 0.0  # a process says nothing while it starts
    page_corrupt: float = 0.0  # a worker that ends has changed pages that were not its business
    page_rot: float = 0.0  # per step: a cell of a sealed page changes while everything runs
    memory_lost: float = 0.0  # per promotion: the pool is new memory
    keeper_death: float = 0.0  # per tick of the core
    freeze: float = 0.0  # per tick of the core: it, the keeper or a standby answers nothing more
    keeper_lost: float = 0.0  # per order of moves: the keeper dies or freezes while it runs them
    weights_rot: float = 0.0  # per pass of a scrub: the slab's bytes change
    poison: float = 0.0  # per request: the worker dies whenever it computes a certain token of it


COPY_RATES = (
    "copy_late",
    "copy_failed",
    "ack_withheld",
    "disk_late",
    "disk_error",
    "host_corrupt",
    "disk_corrupt",
)
TIER_RATES = (*COPY_RATES, "fetch_late", "waiter_leaves")
PROCESS_RATES = (
    "killed",
    "standby_death",
    "promote_fault",
    "weights_bad",
    "spawn_fails",
    "never_ready",
    "page_corrupt",
)
PAGE_RATES = ("page_rot", "memory_lost")
KEEPER_RATES = ("keeper_death", "freeze", "keeper_lost", "weights_rot")


@dataclass(frozen=True, slots=True)
class Job:
    """One client request. Times in virtual microseconds from the start."""

    number: int
    at: int
    api: int
    prompt: tuple[int, ...]
    choices: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    tenant: str
    priority: int
    timeout: int
    client: Client
    sampled: bool = False  # each choice draws with a seed of its own; else all say the same
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    logprobs: int = -1  # alternatives a token; -1 = no logprobs
    poison_at: int | None = None  # position whose computation kills the worker, every time

    @property
    def seeds(self) -> tuple[int, ...]:
        """One a choice."""
        return tuple(range(self.number, self.number + self.choices))


@dataclass(frozen=True, slots=True)
class Client:
    """How the client of a job behaves. It leaves at the first of the moments that come."""

    leaves_after: int | None = None  # after its request
    leaves_at_token: int | None = None  # as this many tokens of choice 0 have arrived
    leaves_with_core: bool = False  # while there is no core
    read_time: int = 0  # for one write; 0 = reads at once
    retries: int = 0  # after a refusal
    retry_after: int = 0


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
    policy: Policy
    second: int  # of the supervisor's clock
    faults_until: int  # virtual time at which the liveness phase begins
    buffer_tokens: int = 1024  # unread tokens of a choice
    write_timeout: int = 30 * SECOND
    resume_timeout: int = 60 * SECOND
    copy_time: int = 1  # bounds of each half of a copy and of a move
    disk_time: int = 1
    scrub_pages_s: float = 0.0
    verify_pages: int = VERIFY_PAGES
    scrub_steps: int = 0  # steps that one pass over the weights takes; 0 = nobody reads them

    @property
    def immortal(self) -> bool:
        """Whether the server never has cause to give up."""
        return self.policy.restarts_per_minute == ENDLESS


PROFILES = {
    # name: (requests at most, fault kinds on with this chance, shortage of pages)
    "short": (5, 0.35, 0.5),
    "faults": (24, 0.7, 0.3),
    "pressure": (40, 0.15, 1.0),
    "calm": (30, 0.0, 0.4),
    "tiers": (24, 0.3, 1.0),
}


def draw(seed: int, profile: str = "short") -> World:
    """The world of a seed. Independent of the process's hash seed and of everything else."""
    rng = Random(seed * 0x9E37_79B9 + 1)
    requests_max, fault_chance, shortage = PROFILES[profile]
    limits = _draw_mixed(seed, _draw_limits(rng, shortage))
    rates = _draw_rates(rng, fault_chance)
    step_time = rng.choice([200, 2 * MILLISECOND, 20 * MILLISECOND])
    span = rng.choice([5, 50, 400]) * step_time
    jobs = _draw_jobs(rng, limits, rates, rng.randint(1, requests_max), span, step_time)
    rates, deadly = _draw_deaths(Random(seed * 0x27D4_EB2F + 9), rates)
    rates = _draw_spoilt(Random(seed * 0x1656_67B1 + 7), rates)
    rates, jobs = _draw_poison(Random(seed * 0xC2B2_AE35 + 3), rates, jobs, fault_chance)
    limits, rates, copy_time, disk_time = _draw_tiers(seed, profile, limits, rates, step_time)
    if profile == "tiers":
        jobs = _long_prompts(seed, limits, jobs)
    channel_time = rng.choice([10, 100, step_time])
    fence_time = rng.choice([1, 30]) * step_time
    respawn_time = rng.choice([1, 10, 50]) * step_time
    rates, policy, second = _draw_processes(seed, limits, rates, step_time, respawn_time)
    rates, scrub_pages_s, verify_pages = _draw_checks(seed, rates, fault_chance, step_time)
    rates, scrub_steps = _draw_keeper(seed, limits, rates, fault_chance)
    return World(
        seed=seed,
        limits=limits,
        rates=rates,
        jobs=jobs,
        step_time=step_time,
        channel_time=channel_time,
        fence_time=fence_time,
        respawn_time=respawn_time,
        faults_until=span * 3 + 200 * step_time,
        # What a dead core owed is more than a small buffer holds.
        buffer_tokens=min(rng.choice([2, 8, 1024]), 2 if deadly else 1024),
        write_timeout=rng.choice([30 * SECOND, 40 * step_time]),
        resume_timeout=rng.choice([60 * SECOND, 60 * SECOND, 60 * step_time]),
        policy=policy,
        second=second,
        copy_time=copy_time,
        disk_time=disk_time,
        scrub_pages_s=scrub_pages_s,
        verify_pages=verify_pages,
        scrub_steps=scrub_steps,
    )


def _draw_checks(
    seed: int, rates: Rates, fault_chance: float, step_time: int
) -> tuple[Rates, float, int]:
    """How fast sealed pages are read again, how many at once after a worker's end, and how often
    one has changed, from a Random of their own. Where they change there often is a scrub, and where
    there is none they change all the same."""
    rng = Random(seed * 0x94D0_49BB + 15)
    rotten, exponent = rng.random() < fault_chance, rng.uniform(-1.7, -0.5)
    lost = 10.0 ** rng.uniform(-1.0, 0.0) if rng.random() < fault_chance / 3 else 0.0
    every_steps = rng.choice([2, 8, 60])
    on = rng.random() < (0.8 if rotten else 0.3)
    rates = replace(rates, page_rot=10.0**exponent if rotten else 0.0, memory_lost=lost)
    scrub_pages_s = SCRUB_PAGES / (every_steps * step_time * 1e-6) if on else 0.0
    return rates, scrub_pages_s, rng.choice([1, 4, VERIFY_PAGES])


def _draw_keeper(seed: int, limits: Limits, rates: Rates, fault_chance: float) -> tuple[Rates, int]:
    """Ends of the keeper, processes that freeze, and weights that change while a worker serves,
    from a Random of their own. Moves are few, so there the keeper's end looks for them."""
    rng = Random(seed * 0x2545_F491 + 21)
    drawn = {}
    for name, low, high in (
        ("keeper_death", -2.3, -1.2),
        ("freeze", -2.3, -1.5),
        ("weights_rot", -1.5, -0.5),
    ):
        on, exponent = rng.random() < fault_chance / 2, rng.uniform(low, high)
        drawn[name] = 10.0**exponent if on else 0.0
    steps = rng.choice([1, 3, 10])
    scrub_steps = steps if drawn["weights_rot"] or rng.random() < 0.2 else 0
    lost, exponent = rng.random() < fault_chance, rng.uniform(-1.3, -0.5)
    drawn["keeper_lost"] = 10.0**exponent if lost and limits.disk_pages else 0.0
    return replace(rates, **drawn), scrub_steps


def _draw_mixed(seed: int, limits: Limits) -> Limits:
    """How much of a prompt goes beside decode, from a Random of its own: all, or less."""
    rng = Random(seed * 0x8538_ECB5 + 11)
    mixed = rng.choice([0, 0, 1, 3, 8])
    return replace(limits, mixed_tokens=min(mixed, limits.prefill_tokens))


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
            windows=(0,),  # the tiers hold pages of group 0 alone
            window_pages=0,
            queue_requests=64,
            live_tokens=100 * limits.context_tokens,
            host_pages=host_pages,
            disk_pages=disk_pages,
            copies_max=rng.choice([2, 3, 64]),
            copy_timeout_s=rng.choice([10, 40]) * slowest * 1e-6,
        )
    drawn = {}
    chance = 0.5 if profile == "tiers" else PROFILES[profile][1]
    for name in COPY_RATES:
        struck, exponent = rng.random() < chance, rng.uniform(-2.5, -0.7)
        drawn[name] = 10.0**exponent if struck and on else 0.0
    for costly in ("copy_late", "ack_withheld"):  # an epoch each
        drawn[costly] /= 3
    if drawn["disk_late"]:
        # Moves are few, and those of an older core fewer.
        drawn["disk_late"] = max(drawn["disk_late"], 0.2)
        drawn["core_death"] = max(rates.core_death, rng.choice([0.0, 0.01, 0.03]))
    drawn["fetch_late"] = 0.6 if drawn["disk_late"] else 0.0
    # Few wait, and not for long. Whoever waits for a late move must go on, so there they stay.
    leaves = rng.random() < chance and on and not drawn["disk_late"]
    drawn["waiter_leaves"] = rng.uniform(0.2, 0.8) if leaves else 0.0
    return limits, replace(rates, **drawn), copy_time, disk_time


def _draw_processes(
    seed: int, limits: Limits, rates: Rates, step_time: int, respawn_time: int
) -> tuple[Rates, Policy, int]:
    """Faults of recovery and what the operator chose, from a Random of their own. A second of the
    supervisor is some steps, so that its waits and pauses meet everything else."""
    rng = Random(seed * 0xA24B_AED5 + 9)
    faulty = rates.crash or rates.crash_after or rates.hang or rates.core_death or rates.poison
    drawn = {}
    for name in PROCESS_RATES:
        on, exponent = rng.random() < 0.4, rng.uniform(-1.3, -0.2)
        drawn[name] = 10.0**exponent if on and faulty else 0.0
    drawn["killed"] /= 20
    if rates.nan_row and rng.random() < 0.3:
        # Else a core seldom meets what an older one's rows left in a page.
        drawn |= {"nan_row": max(rates.nan_row, 0.3), "core_death": max(rates.core_death, 0.1)}
    second = rng.choice([2, 10, 50]) * step_time
    policy = Policy(
        apis=limits.api_processes,
        standby=rng.choice(list(Standby)),
        restarts_per_minute=rng.choice([0, 1, 3]) if rng.random() < 0.1 else ENDLESS,
        start_timeout_s=(3 * respawn_time + 10 * step_time) / second,
        heartbeat_timeout_s=3.0,
    )
    return replace(rates, **drawn), policy, second


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
        least = min(job.min_tokens, output)
        long = replace(job, prompt=tuple(stem[:cut]), max_tokens=output, min_tokens=least)
        changed.append(job if kept else long)
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
    depth = rng.choice([0, 0, 1, 4])
    windows = rng.choice([(0,), (0,), (0, 1), (0, 5), (0, 16, 3)])
    # What one row needs at least: the pages that a window and its drafts can lie across.
    least = max((-(-(window + depth) // page_tokens) + 1 for window in windows[1:]), default=0)
    return Limits(
        vocab_size=VOCAB,
        context_tokens=context,
        page_tokens=page_tokens,
        pages=pages,
        draft_depth=depth,
        windows=windows,
        window_pages=rng.choice([0, least + 1, least + 1 + rng.randint(0, columns)])
        if least
        else 0,
        rows_max=rows,
        prefill_tokens=rng.choice([1, 3, 8, 16, 64]),
        steps_ahead=rng.choice([1, 2, 2, 2]),
        queue_requests=rng.choice([2, 5, 64]),
        live_tokens=rng.choice([context, 4 * context, 100 * context]),
        bias_entries=2,
        stop_ids=16,
        api_processes=rng.choice([1, 1, 2]),
    )


def _draw_rates(rng: Random, fault_chance: float) -> Rates:
    drawn = {}
    # Each of these with a Random of its own.
    drawn_later = (*TIER_RATES, *PROCESS_RATES, *PAGE_RATES, *KEEPER_RATES, "poison")
    for rate in (rate for rate in fields(Rates) if rate.name not in drawn_later):
        # Every rate is drawn, used or not, so that one coin does not shift all the others.
        on, exponent = rng.random() < fault_chance, rng.uniform(-2.5, -0.7)
        drawn[rate.name] = 10.0**exponent if on else 0.0
    for per_request in ("abort", "stop_string", "slow_reader", "short_deadline"):
        if rng.random() < 0.5:
            drawn[per_request] = max(drawn[per_request], rng.uniform(0.0, 0.5))
    for rare in ("core_death", "api_death"):
        drawn[rare] /= 4
    return Rates(**drawn)


def _draw_jobs(
    rng: Random, limits: Limits, rates: Rates, count: int, span: int, step_time: int
) -> tuple[Job, ...]:
    # Few different prompts, cut at random lengths: prefixes are shared, and forked.
    stems = [[rng.randrange(VOCAB) for _ in range(limits.context_tokens)] for _ in range(3)]
    jobs = []
    for number in range(1, count + 1):
        stem = list(rng.choice(stems))
        if rng.random() < 0.2:
            # A page that follows itself: told from its twin by its parent alone.
            stem = stem[: rng.choice([1, 2, 7])] * limits.context_tokens
            stem = stem[: limits.context_tokens]
        if rng.random() < 0.3:
            stem[rng.randrange(len(stem))] = rng.randrange(VOCAB)
        length = rng.randint(1, limits.context_tokens - 1)
        max_tokens = rng.randint(1, limits.context_tokens - length)
        job = Job(
            number=number,
            at=rng.randint(0, span),
            api=rng.randrange(limits.api_processes),
            prompt=tuple(stem[:length]),
            choices=rng.choice([1, 1, 1, 1, 3]),
            max_tokens=max_tokens,
            stop_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 16]))),
            tenant=rng.choice(["a", "a", "b"]),
            priority=rng.choice([0, 0, 0, 1]),
            timeout=rng.randint(1, span) if rng.random() < rates.short_deadline else FOREVER,
            client=_draw_client(rng, rates, span, step_time),
            sampled=rng.random() < 0.5,
            logprobs=rng.choice([-1, -1, 0, 2]),
        )
        if rng.random() < rates.stop_string:
            job = replace(
                job,
                stop=draw_stops(rng),
                include_stop=rng.random() < 0.3,
                min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
            )
        jobs.append(job)
    return tuple(sorted(jobs, key=lambda job: (job.at, job.number)))


def _draw_client(rng: Random, rates: Rates, span: int, step_time: int) -> Client:
    leaves = rng.choice(["time", "token", "core"]) if rng.random() < rates.abort else ""
    slow = rng.random() < rates.slow_reader
    return Client(
        leaves_after=rng.randint(0, span) if leaves == "time" else None,
        leaves_at_token=rng.randint(1, 12) if leaves == "token" else None,
        leaves_with_core=leaves == "core",
        read_time=rng.choice([1, 5, 60]) * step_time if slow else 0,
        retries=rng.choice([0, 2]),
        retry_after=rng.choice([1, 10]) * step_time,
    )


def _draw_deaths(rng: Random, rates: Rates) -> tuple[Rates, bool]:
    """In some worlds with core deaths there are many, among rows that are not finite: what a dead
    core knew of its pages nobody knows any more. With a Random of its own."""
    if not rates.core_death or rng.random() >= 0.3:
        return rates, False
    return replace(rates, core_death=0.03, nan_row=0.15), True


def _draw_spoilt(rng: Random, rates: Rates) -> Rates:
    """In some worlds whose clients leave, many rows are not finite: those of which nobody is told.
    With a Random of its own."""
    if rates.nan_row and rates.abort > 0.2 and rng.random() < 0.5:
        return replace(rates, nan_row=0.4)
    return rates


def _draw_poison(
    rng: Random, rates: Rates, jobs: tuple[Job, ...], fault_chance: float
) -> tuple[Rates, tuple[Job, ...]]:
    """With a Random of its own: worlds without poison are what they were before there was any."""
    if rng.random() >= fault_chance / 2:
        return rates, jobs
    rate = rng.uniform(0.02, 0.3)
    poisoned = []
    for job in jobs:
        at = rng.randrange(len(job.prompt) + job.max_tokens)
        poisoned.append(replace(job, poison_at=at) if rng.random() < rate else job)
    return replace(rates, poison=rate), tuple(poisoned)


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
