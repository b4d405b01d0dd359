"""Every drill on the CPU with few streams: it passes, and it does not pass under sabotage.

Servers are shared by neighbours, as `holdfast drill run all` does it; only what is run here and
nowhere else costs a server of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.drill.drill import Drill
from holdfast.drill.oracle import TAU_MIN
from holdfast.drill.registry import DRILLS, chosen
from holdfast.drill.runner import Plan, Runner

# 32 streams are the figure of the first drill; the others are small, so that all fit in minutes.
STREAMS = {"worker-kill": 32, "abort-storm": 60, "api-overload": 24, "api-kill": 8}
STREAMS_ELSE = 4
# The other kinds are signals too (tests/device/test_provoke.py).
KINDS = ("address", "instruction", "spin", "stop", "promotion", "scrub", "")


def cases() -> list[tuple[Drill, str, bool]]:
    """Each drill clean, then under sabotage: what that must show, one case shows."""
    found = []
    for drill in DRILLS:
        listed = [case for case in drill.cases if case.split("/")[0] in KINDS]
        found += [(drill, case, False) for case in listed]
        found += [(drill, case, True) for case in (listed[1:2] or listed)]
    return found


def name(value: object) -> str:
    if isinstance(value, bool):
        return "sabotage" if value else "clean"
    return value.name if isinstance(value, Drill) else str(value)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner(Plan(drills=DRILLS))
    yield made
    made.close()


def streams(drill: Drill) -> int:
    return STREAMS.get(drill.name, STREAMS_ELSE)


@pytest.mark.slow
@pytest.mark.parametrize(("drill", "case", "sabotage"), cases(), ids=name)
def test_the_drill_passes_and_does_not_under_sabotage(
    runner: Runner, drill: Drill, case: str, sabotage: bool
) -> None:
    count = min(STREAMS_ELSE, streams(drill)) if sabotage else streams(drill)
    report = runner.play(drill, case, streams=count, sabotage=sabotage)
    assert report.passed, (report.planted, report.failures)
    assert report.broken
    if not sabotage:
        assert report.tokens_equal == report.tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [False, True], ids=["clean", "sabotage"])
def test_a_judge_that_explains_tokens_passes_and_sees_the_same(sabotage: bool) -> None:
    """As on a GPU: tau from the same jobs before anything is broken."""
    (drill,) = chosen("worker-kill")
    runner = Runner(Plan(drills=(drill,), explain=True))
    try:
        report = runner.play(drill, "", streams=STREAMS_ELSE, sabotage=sabotage)
    finally:
        runner.close()
    assert report.passed, report.failures
    assert report.tau == TAU_MIN
    assert (report.tokens_explained == report.tokens > 0) != sabotage
