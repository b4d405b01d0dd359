"""Drills of bytes: a page, the weights, a row that is not finite, pages of another tenant."""

from __future__ import annotations

import time
from dataclasses import replace

from holdfast.drill.drill import COLD_WORKER_S, WARM_S, Drill
from holdfast.drill.faults import broke_itself, judge
from holdfast.drill.job import Job
from holdfast.drill.server import Needs
from holdfast.drill.stage import Stage

# Weights and pages of the bundled model once in two seconds or so.
SCRUBBED = Needs(options=("--scrub", "0.1"))
# Prompts of 7 to 9 pages each, for a pool of 120.
CROWD = 20
TENANTS = ("drill-tenant-one", "drill-tenant-two")
# Whose fault-free runs of the same prompts are cached where neither of them finds anything.
NOBODY = "drill-tenant-none"


async def corrupt_page(stage: Stage) -> None:
    if stage.case == "scrub":
        await _scrubbed_page(stage)
        return
    # The bit flips and the worker dies before a token of it leaves: what is verified at promotion
    # must be found, and what was computed before it must stay.
    since_s = time.monotonic()
    await stage.begin()
    await stage.arm("corrupt-page", "decode", then="address")
    stage.report.broken = "a bit of a sealed page, and then the worker"
    await stage.fired("corrupt-page", since_s)
    await stage.finish()
    await judge(stage, WARM_S, *broke_itself(stage), notice_s=None)
    stage.expect_moved("pages_verified_total")
    stage.expect_moved("pages_failed_total", found="promotion")


async def _scrubbed_page(stage: Stage) -> None:
    """While its worker lives: what the victim draws from it until the scrub comes by is not
    promised, whoever asks afterwards is."""
    since_s = time.monotonic()
    (job,) = stage.jobs(1, f"scrubbed {stage.sabotage}")
    streams = await stage.open()
    await stage.have(streams)
    kind, phase = ("plant-page", "prefill") if stage.sabotage else ("corrupt-page", "decode")
    await stage.arm(kind, phase, tokens=job.prompt)
    (victim,) = await stage.open([job], clean=False)
    stage.report.broken = "a bit of a sealed page, beside streams that go on"
    await stage.fired(kind, since_s)
    await stage.finish([*streams, victim])
    if not stage.sabotage:
        what = "the scrub finds the page"
        await stage.until(what, lambda: stage.moved("pages_failed_total", found="scrub"))
    stage.expect("lost", victim.whole, f"the page's own request ended {victim.ended!r}")
    again = await stage.open([job], clean=False)
    await stage.finish(again)
    stage.judge([*streams, *again])
    restarts = stage.moved("process_restarts_total")
    stage.expect("metric", not restarts, f"{restarts:g} processes were restarted for one page")
    await stage.judge_home()


async def corrupt_weights(stage: Stage) -> None:
    if stage.sabotage:
        await _unseen_weights(stage)
        return
    scrub = stage.case == "scrub"
    streams = await stage.open()
    await stage.have(streams)
    await stage.provoke(do="corrupt-weights", kill=not scrub)
    stage.report.broken = f"signs of weights, {'beside' if scrub else 'after the end of'} a worker"
    if scrub:
        # What was emitted from them is gone; what is asked afterwards is promised.
        await stage.finish()
        what = "the scrub finds the weights"
        await stage.until(what, lambda: stage.moved("resumes_total"), COLD_WORKER_S)
        streams = await stage.open()
    await stage.finish()
    stage.judge(streams)
    if not scrub:
        stage.judge_clocks("worker 0", resume_s=COLD_WORKER_S)
    stage.expect_moved("process_restarts_total", 1 if scrub else 2, role="worker")
    stage.expect_moved("faults_total", kind="weights")
    await stage.judge_home()


async def _unseen_weights(stage: Stage) -> None:
    """The worker lives on and no scrub reads: what comes of wrong weights reaches the clients.

    Asked when the order is done, since on a GPU that takes a second, which streams do not.
    """
    jobs = stage.jobs(stage.count)
    await stage.prepare(jobs)
    await stage.provoke(do="corrupt-weights", kill=False)
    stage.report.broken = "signs of weights, and nobody looks"
    stage.report.planted = True
    await stage.finish(await stage.open(jobs, clean=False))
    stage.judge()


async def nan_row(stage: Stage) -> None:
    since_s = time.monotonic()
    (job,) = stage.jobs(1, "nan")
    streams = await stage.open_sabotaged()
    (victim,) = await stage.open([job])
    await stage.have([*streams, victim])
    await stage.arm("nan", "decode", tokens=job.prompt)
    stage.report.broken = "NaN in the keys and values of one row"
    await stage.fired("nan", since_s)
    await stage.finish()
    stage.judge(streams)
    said = victim.error.get("code")
    stage.expect("lost", said == "not_finite", f"the row's request ended {victim.ended!r}")
    if stage.judges.explainer is None:
        right = stage.judges.reference.tokens([job])[0][: len(victim.tokens)]
        text = "tokens of the row were sent after it was not finite"
        stage.expect("tokens", victim.tokens == right, text)
    stage.expect_moved("requests_ended_total", reason="not_finite")
    # Its pages have other owners now.
    again = await stage.open([job, *stage.jobs(4, "after-nan")])
    await stage.finish(again)
    stage.judge(again)
    restarts = stage.moved("process_restarts_total")
    stage.expect("metric", not restarts, f"{restarts:g} processes were restarted for one row")
    await stage.judge_home()


async def tenant_isolation(stage: Stage) -> None:
    one, two = TENANTS
    other = one if stage.sabotage else two
    stage.report.planted = stage.sabotage
    stage.report.broken = "a second API key asks what the first has cached, before and in a crowd"
    planted = stage.jobs(2, "planted fact")
    crowd = stage.jobs(max(CROWD, stage.count), "crowd", tokens=16)
    await stage.prepare([replace(each, key=NOBODY) for each in (*planted, *crowd)])
    for at, job in enumerate(planted):
        load = []
        if at:
            # Prompts of the first tenant crowd the pool; nobody's pages may become the second's.
            load = await stage.open([replace(each, key=one) for each in crowd], clean=False)
            await stage.have(load[: len(load) // 2], 1)
        cached = await _asked_twice(stage, replace(job, key=one))
        stage.expect("isolation", cached[1], "the first tenant's own prefix was not cached")
        cached = await _asked_twice(stage, replace(job, key=other))
        text = f"the second tenant got {cached[0]} tokens of a prefix that the first had cached"
        stage.expect("isolation", cached[0] == 0, text)
        stage.expect("isolation", cached[1], "the second tenant's own prefix was not cached")
        await stage.finish(load)
    stage.judge()
    stage.expect_moved("pages_evicted_total")
    await stage.judge_home()


async def _asked_twice(stage: Stage, job: Job) -> list[int | None]:
    """How many tokens of the prompt came from the cache, each time."""
    cached = []
    for _ in range(2):
        (stream,) = await stage.open([job], clean=False)
        await stage.finish([stream])
        cached.append(stream.cached_tokens)
    return cached


DRILLS = (
    Drill(
        name="corrupt-page",
        what="a bit of a sealed page flips; verification at promotion or the scrub finds it",
        play=corrupt_page,
        cases=("promotion", "scrub"),
        needs=SCRUBBED,
    ),
    Drill(
        name="corrupt-weights",
        what="weights change; they are loaded anew",
        play=corrupt_weights,
        cases=("promotion", "scrub"),
        needs=SCRUBBED,
        ends=2,
        sabotage="nobody looks at the weights, and what comes of them is judged",
        needs_sabotaged=Needs(),
        spoils=True,
    ),
    Drill(
        name="nan-row",
        what="one row is not finite; it fails alone, and its pages are clean",
        play=nan_row,
        ends=0,
    ),
    Drill(
        name="tenant-isolation",
        what="two API keys ask the same; no page crosses over",
        play=tenant_isolation,
        caught="refused before launch",
        streams=16,
        needs=Needs(kv_pages=120, rows=16, keys=(*TENANTS, NOBODY)),
        ends=0,
        sabotage="both ask with the same key",
        sabotage_kind="isolation",
    ),
)
