"""Drills of load: more than the queue takes, and clients that leave at random moments."""

from __future__ import annotations

import asyncio
import random

from holdfast.drill.client import Stream
from holdfast.drill.drill import Drill
from holdfast.drill.server import Needs
from holdfast.drill.stage import Stage
from holdfast.proc.listen import raise_file_limit

# Distinct prompts of a storm: as many as there are would cost the reference longer than the drill.
STORM_JOBS = 16
STAYS = 0.1
# Cancellations fall into this time from the first request, more for more streams.
STORM_S_MIN, STORM_S_A_STREAM = 0.5, 0.004


async def api_overload(stage: Stage) -> None:
    first = await stage.open_sabotaged(stage.jobs(1))
    await stage.have(first, 1)
    streams = await stage.open(stage.jobs(stage.count, "overload", tokens=24))
    stage.report.broken = f"{len(streams)} requests at once, for 4 rows and a queue of 8"
    await stage.finish()
    refused = [s for s in streams if s.status == 429]
    for stream in refused:
        code, after = stream.error.get("code"), stream.headers.get("retry-after")
        stage.expect("lost", code == "queue_full" and after, f"a refusal says {stream.error}")
    stage.expect("lost", refused, "nothing was refused: it proved nothing")
    # Whatever was admitted is answered in full.
    stage.judge([*first, *(s for s in streams if s not in refused)])
    # By the api process, or by the core whose queue it is.
    counted = stage.moved("http_requests_total", code="429")
    text = f"{counted:g} refusals counted, {len(refused)} seen"
    stage.expect("metric", counted == len(refused), text)
    await stage.judge_home()


async def abort_storm(stage: Stage) -> None:
    raise_file_limit()
    victims = await stage.begin(stage.jobs(2, "storm"))
    kinds = stage.jobs(STORM_JOBS, "storm")
    streams = await stage.open([kinds[at % STORM_JOBS] for at in range(stage.count)])
    draw = random.Random(stage.count)
    leaving = streams[: round(len(streams) * (1 - STAYS))]
    draw.shuffle(leaving)
    spread_s = max(STORM_S_MIN, STORM_S_A_STREAM * len(streams))
    stage.report.broken = f"{len(leaving)} of {len(streams)} clients leave within {spread_s:.1f} s"

    async def leave(stream: Stream) -> None:
        await asyncio.sleep(draw.uniform(0, spread_s))
        if stream.ended is None:
            await stream.cancel()

    await asyncio.gather(*(leave(stream) for stream in leaving))
    await stage.finish([s for s in streams if not s.cancelled])
    await stage.finish(victims)
    stage.judge([*victims, *(s for s in streams if not s.cancelled)])
    gone = sum(s.cancelled for s in streams)
    stage.expect("lost", gone, "nobody left: it proved nothing")
    await stage.judge_home()


DRILLS = (
    Drill(
        name="api-overload",
        what="more requests than the queue takes; what is admitted is answered",
        play=api_overload,
        caught="refused before launch",
        streams=40,
        needs=Needs(rows=4, queue_requests=8),
        ends=0,
    ),
    Drill(
        name="abort-storm",
        what="nine of ten clients leave at random moments",
        play=abort_storm,
        streams=2000,
        ends=0,
    ),
)
