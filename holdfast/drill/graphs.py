"""Drills of graphs: lengths over every boundary, widths, padding, moved buffers, stale row state.

On a CPU a graph is the same work run again (device.capture Rerun): admission, padding, buckets, the
manifest and the counters are the same code as on a GPU, and these drills judge them there as well.
There is one group of layers and it has no window (config.Limits.groups), so no step crosses one:
the boundaries are those of pages, buckets and the captured envelope.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from holdfast.core.metrics import EAGER
from holdfast.drill.client import Stream
from holdfast.drill.drill import WARM_S, Drill
from holdfast.drill.faults import judge
from holdfast.drill.job import Job
from holdfast.drill.server import Needs
from holdfast.drill.stage import WAIT_S, Stage
from holdfast.errors import OperatorError
from holdfast.wire.envelope import bucket_of, buckets

PAGE = 16
CONTEXT = 256
# One row more than the bucket of 32 has.
ROWS = 33
NEEDS = Needs(
    rows=ROWS,
    kv_pages=600,
    graphs=True,
    options=("--page-tokens", str(PAGE), "--max-context-tokens", str(CONTEXT)),
)
# A step with prompts is no decode step, and may be more than the graphs of those have room for; any
# other reason is a fast path that was lost.
ORDINARY = ("prefill", "too_many_tokens", "too_many_prompts", "too_many_gathered")
MOVED = {"reason": "address_moved"}
# Steps of graphs; those with prompts have their own.
DECODE = {"kind": "decode"}
# Rows of one wave beside rows that are as long as the context.
WAVES = (1, 9, 3, 17)
# Of rows that shall be in one step, until their requests have come together.
ROUNDS = 3
_POLL_S = 0.02
# Steps that are replayed before something moves, and after it was put back.
_STEPS = 8


async def window_crossing(stage: Stage) -> None:
    """Alone from one token to the context; then rows whose lengths and ends lie one step apart, so
    that nearly every step some row begins a page and some step each bucket is left."""
    names = stage.jobs(PAGE + 4, stage.report.name)
    alone = _cut(names[0], 1, CONTEXT - 1)
    mixed = [_cut(job, at + 1, 2 * PAGE + at) for at, job in enumerate(names[1:-2])]
    mixed += [
        _cut(job, CONTEXT - 2 * PAGE - at, 2 * PAGE + at) for at, job in enumerate(names[-2:])
    ]
    await stage.prepare([alone, *mixed])
    since_s = time.monotonic()
    ladder = buckets(ROWS)
    wanted = set(ladder[: ladder.index(bucket_of(len(mixed), ladder)) + 1])
    async with _mended(stage):
        await stage.arm("canary", "any")
        if stage.sabotage:
            await stage.arm("narrow-envelope", "any")
        await stage.finish(await stage.open([alone], clean=False))
        for _ in range(ROUNDS):
            await stage.finish(await stage.open(mixed, clean=False))
            seen = _seen(stage, since_s)
            missing = wanted - {bucket_of(each["rows"], ladder) for each in seen}
            if not missing:
                break
    stage.judge()
    _judge_canary(stage, seen)
    stage.expect("wait", not missing, f"no step was of the buckets {sorted(missing)}")
    shown = await _judge_steps(stage, alone.max_tokens - 1 + 2 * PAGE)
    what = f"1 to {CONTEXT} tokens alone, then {len(mixed)} rows a step apart"
    stage.report.broken = f"lengths over every page and bucket to the envelope: {what}; {shown}"
    await stage.judge_home()


async def graph_width(stage: Stage) -> None:
    """Rows as wide as tables are, and batches beside and behind them that come and go. What no row
    has written holds a canary, so that an unused column that is read as live is another answer."""
    names = stage.jobs(3, stage.report.name)
    at_most = [_cut(names[0], CONTEXT - 96, 96), _cut(names[1], CONTEXT - 97, 96)]
    beyond = _cut(names[2], CONTEXT - 95, 96)
    short = [_cut(job, PAGE - 1, PAGE) for job in stage.jobs(max(WAVES), "wave")]
    await stage.prepare([*at_most, *short])
    since_s = time.monotonic()
    async with _mended(stage):
        await stage.arm("canary", "any")
        streams = await stage.open_sabotaged(at_most)
        (refused,) = await stage.open([beyond], clean=False)
        for count in (*WAVES, max(WAVES)):
            wave = await stage.open(short[:count], clean=False)
            await stage.finish(wave)
            streams += wave
        await stage.finish()
        # Now in rows, and places of a bucket, that were the widest.
        again = await stage.open(short[:2], clean=False)
        await stage.finish(again)
    waves = ", ".join(str(count) for count in WAVES)
    stage.report.broken = f"contexts of {CONTEXT} tokens and one more or less, waves of {waves}"
    code = refused.error.get("code")
    text = f"{CONTEXT + 1} tokens were answered {refused.status} {code!r}"
    stage.expect("lost", refused.status == 400 and code == "context_length_exceeded", text)
    counted = stage.moved("http_requests_total", code="400")
    stage.expect("metric", counted == 1, f"{counted:g} requests were answered 400, not one")
    stage.judge([*streams, *again])
    _judge_canary(stage, _seen(stage, since_s))
    await _judge_steps(stage, at_most[0].max_tokens - 1)
    await stage.judge_home(client_errors=True)


async def padding_canary(stage: Stage) -> None:
    """Decode steps of every number of rows, so of every padding that a bucket can have."""
    names = stage.jobs(ROWS, stage.report.name)
    jobs = [_cut(job, PAGE + at % PAGE, 96) for at, job in enumerate(names)]
    await stage.prepare(jobs)
    since_s = time.monotonic()
    async with _mended(stage):
        await stage.arm("canary", "any")
        if stage.sabotage:
            await stage.arm("stray-store", "decode", after=_STEPS)
        streams: list[Stream] = []
        for rows in range(1, ROWS + 1):
            await _run_with(stage, rows, jobs, streams, since_s)
            if stage.sabotage and any(each["stray"] for each in _seen(stage, since_s)):
                break
        await stage.finish()
    stage.report.broken = f"a canary in every free page; decode steps of 1 to {ROWS} rows"
    stage.judge()
    seen = _seen(stage, since_s)
    _judge_canary(stage, seen)
    missing = sorted(set(range(1, ROWS + 1)) - {each["rows"] for each in seen})
    stage.expect("wait", not missing, f"no step was watched that had rows {missing}")
    await _judge_steps(stage, ROWS)
    await stage.judge_home()


async def baked_pointer(stage: Stage) -> None:
    """The buffers of a bucket move behind the graphs' back, which would replay over the old ones;
    put back, they are replayed again."""
    jobs, later = stage.jobs(stage.count), stage.jobs(2, "after")
    await stage.prepare([*jobs, *later])
    since_s = time.monotonic()
    kind = "move-buffer-unseen" if stage.sabotage else "move-buffer"
    async with _mended(stage):
        streams = await stage.open(jobs, clean=False)
        await stage.have(streams)
        await stage.arm(kind, "decode")
        stage.report.broken = "static buffers that captured graphs have baked in lie elsewhere"
        await stage.fired(kind, since_s)
        await stage.finish()
    stage.judge()
    await stage.told()
    # A graph of a GPU stages what it reads into the buffers that it has, and may draw right tokens
    # from them for as long as nobody else is given that memory: whether it was replayed is counted.
    stage.expect_moved("eager_steps_total", _STEPS, **MOVED)
    if stage.sabotage:
        return
    before = stage.moved("graph_steps_total", **DECODE)
    again = await stage.open(later, clean=False)
    await stage.finish(again)
    stage.judge(again)
    await stage.told()
    # Buffers lie as they were captured.
    stage.expect_moved("graph_steps_total", before + _STEPS, **DECODE)
    restarts = stage.moved("process_restarts_total")
    stage.expect("metric", not restarts, f"{restarts:g} processes were restarted for an address")
    await stage.judge_home()


async def stale_plan(stage: Stage) -> None:
    """Row state of one step before: the digest tells it before a token of it is emitted."""
    since_s = time.monotonic()
    kind = "stale-rows-unseen" if stage.sabotage else "stale-rows"
    streams = await stage.open()
    await stage.have(streams)
    await stage.arm(kind, "decode")
    stage.report.broken = "a step over the row table, and the attention plan, of the one before"
    await stage.fired(kind, since_s)
    await stage.finish()
    stage.expect_moved("digest_mismatches_total")
    await judge(stage, WARM_S, "worker_rejected", notice_s=None)


@asynccontextmanager
async def _mended(stage: Stage) -> AsyncIterator[None]:
    """Whatever comes of it, the worker's graphs are as captured from its next step on."""
    try:
        yield
    finally:
        with suppress(OperatorError):
            await stage.arm("mend-graphs", "any")


def _cut(job: Job, prompt: int, tokens: int) -> Job:
    """A job with a prompt of so many tokens and an answer of so many."""
    ids = job.prompt * -(-prompt // len(job.prompt))
    return replace(job, prompt=ids[:prompt], max_tokens=tokens)


def _seen(stage: Stage, since_s: float) -> list[dict[str, Any]]:
    """What the worker's watch over pages said."""
    return [m for m in stage.moments("provoked", since_s) if m["kind"] == "canary-step"]


async def _run_with(
    stage: Stage, rows: int, jobs: Sequence[Job], streams: list[Stream], since_s: float
) -> None:
    """Until a decode step had so many rows: with as many streams, whose answers may end before."""
    deadline_s = time.monotonic() + WAIT_S
    while rows not in {each["rows"] for each in _seen(stage, since_s)}:
        if time.monotonic() > deadline_s:
            stage.fail("wait", f"no decode step had {rows} rows within {WAIT_S:g} s")
            return
        lacking = rows - sum(stream.ended is None for stream in streams)
        if lacking > 0:
            following = [jobs[(len(streams) + at) % len(jobs)] for at in range(lacking)]
            streams += await stage.open(following, clean=False)
        await asyncio.sleep(_POLL_S)


def _judge_canary(stage: Stage, seen: Sequence[dict[str, Any]]) -> None:
    free = min((each["free"] for each in seen), default=0)
    stage.expect("wait", free, "no step was watched, or no page was free to hold a canary")
    for each in seen:
        pages, rows = each["stray"], each["rows"]
        text = f"pages {pages} changed in a step of {rows} rows or before it, and were not its own"
        stage.expect("canary", not each["stray"], text)


def _fallbacks(stage: Stage) -> dict[str, int]:
    """Eager steps by their reason, since the case began."""
    moved = {reason: int(stage.moved("eager_steps_total", reason=reason)) for reason in EAGER}
    return {reason: count for reason, count in moved.items() if count}


async def _judge_steps(stage: Stage, least: int) -> str:
    """That decode steps were replayed and nothing fell back but prompts; what is to be said."""

    def odd() -> bool:
        return any(reason not in ORDINARY for reason in _fallbacks(stage))

    await stage.told()
    replayed = stage.moved("graph_steps_total", **DECODE)
    stage.expect("wait", replayed >= least or odd(), f"{replayed:g} steps replayed, not {least}")
    found = _fallbacks(stage)
    shown = ", ".join(f"{reason} {count}" for reason, count in found.items()) or "none"
    stage.expect("fallback", not odd(), f"steps fell back: {shown}")
    return f"{stage.moved('graph_steps_total'):g} steps replayed; eager: {shown}"


DRILLS = (
    Drill(
        name="window-crossing",
        what="lengths over every boundary of page, bucket and captured envelope",
        play=window_crossing,
        caught="slow path",
        streams=PAGE + 4,
        needs=NEEDS,
        ends=0,
        sabotage="an envelope that is a page too short",
        sabotage_kind="fallback",
    ),
    Drill(
        name="graph-width",
        what="contexts at their maximum; batches that shrink and grow beside and behind them",
        play=graph_width,
        caught="refused before launch",
        streams=sum(WAVES) + max(WAVES) + 4,
        needs=NEEDS,
        ends=0,
    ),
    Drill(
        name="padding-canary",
        what="no padding of any bucket touches a page",
        play=padding_canary,
        streams=ROWS,
        needs=NEEDS,
        ends=0,
        sabotage="one store into a page of nobody",
        sabotage_kind="canary",
    ),
    Drill(
        name="baked-pointer",
        what="buffers of captured graphs move; steps are computed eagerly",
        play=baked_pointer,
        caught="slow path",
        needs=NEEDS,
        ends=0,
        sabotage="the address manifest moves along",
        sabotage_kind="metric",
    ),
    Drill(
        name="stale-plan",
        what="row state that is not of the step ends the epoch, not the text",
        play=stale_plan,
        needs=NEEDS,
        sabotage="the digest is of the state that should have been",
    ),
)
