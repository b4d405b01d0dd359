"""Drills of the worker: it is killed, faults, hangs, goes on writing, or its successor dies too."""

from __future__ import annotations

import time

from holdfast.drill.drill import COLD_WORKER_S, WARM_S, Drill
from holdfast.drill.stage import NOTICE_S, Stage
from holdfast.drill.stage import WARM_S as STANDBY_S

KINDS = ("address", "instruction", "assert", "misaligned", "dma")
PHASES = ("prefill", "decode", "capture")
# Before a hang: 47 steps of decode each, of which the clock wants to see 30 of a size.
ROUNDS = 2
# From the last sign of life to the first new token.
HANG_S = 3.0


async def worker_kill(stage: Stage) -> None:
    await stage.begin()
    await stage.kill("worker 0")
    stage.report.broken = "SIGKILL of the worker"
    await stage.finish()
    await judge(stage, WARM_S, "worker_killed")


async def judge(
    stage: Stage, resume_s: float, *kinds: str, notice_s: float | None = NOTICE_S
) -> None:
    """What every loss of a worker promises; kinds: as one of which /metrics must count it."""
    stage.judge()
    stage.judge_clocks("worker 0", resume_s=resume_s, notice_s=notice_s)
    stage.expect_moved("process_restarts_total", role="worker")
    counted = sum(stage.moved("faults_total", kind=kind) for kind in kinds)
    stage.expect("metric", counted >= 1, f"no fault was counted as {' or '.join(kinds)}")
    stage.expect_moved("resumes_total")
    await stage.judge_home()


async def gpu_fault(stage: Stage) -> None:
    kind, _, phase = stage.case.partition("/")
    if phase == "capture":
        await _fault_of_the_standby(stage, kind)
        return
    late = stage.jobs(2, stage.report.name) if phase == "prefill" else []
    await stage.prepare(late)
    since_s = time.monotonic()
    await stage.begin()
    await stage.arm(kind, phase, after=2 if phase == "decode" else 0)
    await stage.open(late, clean=False)
    stage.report.broken = f"{kind} in a step of {phase}"
    await stage.fired(kind, since_s)
    await stage.finish()
    await judge(stage, WARM_S, *broke_itself(stage), notice_s=None)


def broke_itself(stage: Stage) -> tuple[str, ...]:
    """A signal ends a process without a word. A GPU's fault is an error that the worker tells; of
    one that its driver keeps to itself the step deadline tells (docs/gpu-faults.md)."""
    return ("worker_crash",) if stage.device == "cpu" else ("worker_fault", "worker_hang")


async def _fault_of_the_standby(stage: Stage, kind: str) -> None:
    """The next worker faults while it warms up and captures, beside streams that are served."""
    since_s = time.monotonic()
    streams = await stage.open_sabotaged()
    await stage.arm(kind, "capture", to="next")
    await stage.have(streams)
    await stage.kill("standby 0")
    stage.report.broken = f"{kind} while a standby captures"

    def fired() -> bool:
        return bool([m for m in stage.moments("provoked", since_s) if m["kind"] == kind])

    deadline_s = time.monotonic() + STANDBY_S
    while not fired() and time.monotonic() < deadline_s:
        await stage.finish(await stage.open(stage.jobs(2)))
    await stage.fired(kind, since_s)
    await stage.finish()
    stage.judge()
    await stage.until("the standby's end", lambda: stage.moments("exited", stage.broken_s or 0.0))
    stage.expect_moved("faults_total", kind="standby")
    exited = stage.moments("exited", stage.broken_s or 0.0)
    titles = [m["title"] for m in exited]
    stage.expect("lost", titles == ["holdfast standby 0"], f"these ended: {titles}")
    pause_s = stage.report.pause_s = max(stage.gaps(), default=0.0)
    stage.expect("clock", pause_s < WARM_S, f"a stream paused for {pause_s:.2f} s")
    await stage.judge_home()


async def hang(stage: Stage) -> None:
    # How long a step may take is learnt from steps of its size (core/clocks): a server that has
    # seen three of them gives one two seconds more than it needs.
    for _ in range(ROUNDS):
        await stage.finish(await stage.open())
    since_s = time.monotonic()
    await stage.begin()
    if stage.case == "stop":
        await stage.kill("worker 0", name="SIGSTOP")
        stage.report.broken = "SIGSTOP of the worker"
    else:
        await stage.arm("spin", "decode")
        stage.report.broken = "a step that never ends"
        await stage.fired("spin", since_s)
    await stage.finish()
    await judge(stage, HANG_S, "worker_hang", notice_s=HANG_S)


async def zombie_writer(stage: Stage) -> None:
    since_s = time.monotonic()
    # On a GPU no process writes that is not fenced: there a wrong page is planted, as elsewhere.
    unfenced = stage.sabotage and stage.device == "cpu"
    kind = "unfenced-writer" if unfenced else "zombie"
    streams = await (stage.open() if unfenced else stage.open_sabotaged())
    await stage.have(streams)
    await stage.arm(kind, "decode")
    stage.report.broken = "the worker goes on writing pages while it is being ended"
    await stage.fired(kind, since_s)
    await stage.finish()
    await judge(stage, WARM_S, "worker_killed", notice_s=None)
    # It hung up without a word and was then killed; what it wrote since is found before it is used.
    stage.expect_moved("pages_failed_total", found="promotion")


async def double_fault(stage: Stage) -> None:
    await stage.begin()
    await stage.arm("instruction", "verify", to="standby")
    await stage.kill("worker 0")
    stage.report.broken = "SIGKILL of the worker; its successor faults while it verifies"
    await stage.finish()
    await judge(stage, COLD_WORKER_S, "worker_killed")
    # It waits for no step, so nobody but itself can tell.
    stage.expect_moved("faults_total", kind=broke_itself(stage)[0])
    stage.expect_moved("process_restarts_total", 2, role="worker")


async def poison_request(stage: Stage) -> None:
    poison = stage.jobs(1, "poison")[0]
    await stage.arm("address", "any", tokens=poison.prompt, standing=True, lasting=True)
    streams = await stage.begin()
    since_s = time.monotonic()
    (poisoned,) = await stage.open([poison], clean=False)
    stage.report.broken = "a request that kills the worker each time it is computed"
    await stage.fired("address", since_s)
    await stage.finish()
    stage.judge(streams)
    said = poisoned.error.get("code")
    text = f"the poisoned request ended {poisoned.ended!r} with code {said!r}"
    stage.expect("lost", said == "engine_fault" and not poisoned.tokens, text)
    stage.judge_clocks("worker 0", resume_s=COLD_WORKER_S, notice_s=None)
    stage.expect_moved("requests_ended_total", reason="engine_fault")
    deaths = stage.moved("process_restarts_total", role="worker")
    stage.expect("metric", 2 <= deaths <= 3, f"it cost {deaths:g} workers, not 2 or 3")
    await stage.judge_home()


DRILLS = (
    Drill(name="worker-kill", what="the worker is killed", play=worker_kill, streams=32),
    Drill(
        name="gpu-fault",
        what="a fault of each kind, in prefill, in decode and while a standby captures",
        play=gpu_fault,
        cases=tuple(f"{kind}/{phase}" for kind in KINDS for phase in PHASES),
    ),
    Drill(
        name="hang",
        what="a step that never ends; a worker that is stopped",
        play=hang,
        cases=("spin", "stop"),
    ),
    Drill(
        name="zombie-writer",
        what="the old worker writes pages until the fence",
        play=zombie_writer,
        sabotage="a writer that no fence covers",
        spoils=True,
    ),
    Drill(
        name="double-fault",
        what="the second worker dies while it verifies",
        play=double_fault,
        ends=2,
    ),
    Drill(
        name="poison-request",
        what="one request kills every worker; it ends alone",
        play=poison_request,
        ends=3,
    ),
)
