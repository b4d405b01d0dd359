"""Drills of the other processes: core, api and keeper are killed."""

from __future__ import annotations

from holdfast.drill.drill import COLD_CORE_S, COLD_WORKER_S, Drill
from holdfast.drill.server import Needs
from holdfast.drill.stage import Stage


async def core_kill(stage: Stage) -> None:
    await stage.begin()
    await stage.kill("core")
    stage.report.broken = "SIGKILL of the core"
    await stage.finish()
    stage.judge()
    stage.judge_clocks("core", resume_s=COLD_CORE_S)
    stage.expect_moved("process_restarts_total", role="core")
    stage.expect_moved("faults_total", kind="core")
    await stage.judge_home()


async def keeper_kill(stage: Stage) -> None:
    await stage.begin()
    await stage.kill("keeper 0")
    stage.report.broken = "SIGKILL of the keeper, and the memory with it"
    await stage.finish()
    stage.judge()
    if not stage.server.alive:
        stage.fail("lost", "the server ended")
        return
    stage.judge_clocks("keeper 0", resume_s=COLD_WORKER_S)
    stage.expect_moved("process_restarts_total", role="keeper")
    stage.expect_moved("faults_total", kind="keeper")
    await stage.judge_home()


async def api_kill(stage: Stage) -> None:
    streams = await stage.begin()
    await stage.kill("api 0")
    stage.report.broken = "SIGKILL of one of two api processes"
    await stage.finish()
    # Its own clients see their connection break: nobody else can hold it. The others see nothing.
    own = [s for s in streams if s.ended == "reset"]
    others = [s for s in streams if s.ended != "reset"]
    text = f"{len(own)} of {len(streams)} streams broke with it"
    stage.expect("lost", own and others, f"{text}: it proved nothing")
    stage.judge(others)
    stage.report.noticed_s = _noticed_s(stage)
    pause_s = stage.report.pause_s = max(stage.gaps(others), default=0.0)
    stage.expect("clock", pause_s < 1.0, f"a stream of the other paused for {pause_s:.2f} s")
    stage.expect_moved("process_restarts_total", role="api")
    stage.expect_moved("faults_total", kind="api")
    stage.expect_moved("requests_ended_total", len(own), reason="cancelled")
    # Whoever asks again is answered, also by the process that took its place.
    # They were prepared already; the one whose page is wrong must not count as fault-free now.
    again = await stage.open([s.job for s in own], clean=False)
    await stage.finish(again)
    stage.judge(again)
    await stage.judge_home()


def _noticed_s(stage: Stage) -> float | None:
    since_s = stage.broken_s or 0.0
    seen = [m for m in stage.server.status()["drills"] if m["at_s"] >= since_s]
    return seen[0]["at_s"] - since_s if seen else None


DRILLS = (
    Drill(name="core-kill", what="the core is killed; it reads the journal", play=core_kill),
    Drill(
        name="api-kill",
        what="one of two api processes is killed; its requests are released",
        play=api_kill,
        streams=12,
        needs=Needs(api_processes=2),
        ends=0,
    ),
    Drill(
        name="keeper-kill",
        what="the keeper is killed, and all memory with it",
        play=keeper_kill,
        ends=2,
    ),
)
