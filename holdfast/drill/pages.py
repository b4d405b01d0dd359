"""Drills of bytes: a page, the weights, a row that is not finite, pages of another tenant."""

from __future__ import annotations

import time
from dataclasses import replace

from holdfast.drill.drill import COLD_WORKER_S, WARM_S, Drill
from holdfast.drill.faults import BEGUN, judge
from holdfast.drill.server import Needs
from holdfast.drill.stage import Stage

# Prompts of 7 to 9 pages each, for a pool of 120.
CROWD = 20
TENANTS = ("drill-tenant-one", "drill-tenant-two")


async def corrupt_page(stage: Stage) -> None:
    """The bit flips and the worker dies before a token of it leaves: what is verified at promotion
    must be found, and what was computed before it must stay."""
    since_s = time.monotonic()
    streams = await stage.open_sabotaged()
    await stage.have(streams, BEGUN)
    await stage.arm("corrupt-page", "decode", then="address")
    stage.report.broken = "a bit of a sealed page, and then the worker"
    await stage.fired("corrupt-page", since_s)
    await stage.finish()
    await judge(stage, WARM_S, "worker_crash", notice_s=None)
    stage.expect_moved("pages_verified_total")
    stage.expect_moved("pages_failed_total", found="promotion")


async def corrupt_weights(stage: Stage) -> None:
    streams = await stage.open()
    await stage.have(streams, BEGUN)
    await stage.provoke(do="corrupt-weights", kill=not stage.sabotage)
    stage.report.broken = "signs of weights, after the worker was killed"
    stage.report.planted = True
    await stage.finish()
    stage.judge()
    if not stage.sabotage:
        stage.judge_clocks("worker 0", resume_s=COLD_WORKER_S)
        # One that found them wrong, and one that loaded them.
        stage.expect_moved("process_restarts_total", 2, role="worker")
        stage.expect_moved("faults_total", kind="weights")
        await stage.judge_home()


async def nan_row(stage: Stage) -> None:
    since_s = time.monotonic()
    (job,) = stage.jobs(1, "nan")
    streams = await stage.open_sabotaged()
    (victim,) = await stage.open([job])
    await stage.have([*streams, victim], BEGUN)
    await stage.arm("nan", "decode", tokens=job.prompt)
    stage.report.broken = "NaN in the keys and values of one row"
    await stage.fired("nan", since_s)
    await stage.finish()
    stage.judge(streams)
    said = victim.error.get("code")
    stage.expect("lost", said == "not_finite", f"the row's request ended {victim.ended!r}")
    right = stage.judges.reference.tokens([job])[0][: len(victim.tokens)]
    exact = stage.judges.explainer is not None or victim.tokens == right
    stage.expect("tokens", exact, "tokens of the row were sent after it was not finite")
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
    (job,) = stage.jobs(1, "planted fact")
    first, second = replace(job, key=one), replace(job, key=one if stage.sabotage else two)
    stage.report.broken = "a second API key asks what the first has cached, while pages are evicted"
    for _ in range(2):
        (cached,) = await stage.open([first])
        await stage.finish([cached])
    stage.expect("isolation", cached.cached_tokens, "the first tenant's own prefix was not cached")
    # Other prompts of the first tenant crowd the pool; nobody's pages may become the second's.
    crowd = stage.jobs(max(CROWD, stage.count), "crowd", tokens=16)
    load = await stage.open([replace(job, key=one) for job in crowd])
    await stage.have(load[: len(load) // 2], 1)
    (foreign,) = await stage.open([second])
    await stage.finish([foreign])
    stage.report.planted = stage.sabotage
    text = f"the second tenant got {foreign.cached_tokens} tokens of a prefix cached by the first"
    stage.expect("isolation", foreign.cached_tokens == 0, text)
    (own,) = await stage.open([second])
    await stage.finish([own])
    stage.expect("isolation", own.cached_tokens, "the second tenant's own prefix was not cached")
    await stage.finish()
    stage.judge()
    stage.expect_moved("pages_evicted_total")
    await stage.judge_home()


DRILLS = (
    Drill(
        name="corrupt-page",
        what="a bit of a sealed page flips; verification finds it",
        play=corrupt_page,
    ),
    Drill(
        name="corrupt-weights",
        what="weights change; they are loaded anew",
        play=corrupt_weights,
        ends=2,
        sabotage="the worker is left alive, so that nobody looks at the weights",
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
        needs=Needs(kv_pages=120, rows=16, keys=TENANTS),
        ends=0,
        sabotage="both ask with the same key",
        sabotage_kind="isolation",
    ),
)
