"""What a stage asks of a server before anything is broken, which tau is taken from."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.drill import stage as stages
from holdfast.drill.job import Job
from holdfast.drill.report import Report
from holdfast.drill.server import Needs
from holdfast.drill.stage import ALONE, Judges, Stage
from holdfast.errors import InvariantError

ROWS = 12


class Crowds:
    """Stands for drill.client.Stream; sizes: of the crowd that each stream was answered in."""

    def __init__(self) -> None:
        self.open = 0
        self.sizes: list[int] = []

    def stream(self, job: Job) -> Any:
        async def finish() -> None:
            self.open += 1
            await asyncio.sleep(0.01)
            self.sizes.append(self.open)
            await asyncio.sleep(0.01)
            self.open -= 1

        def start(address: object, name: object) -> None:
            pass

        return SimpleNamespace(start=start, finish=finish, whole=True, tokens=[job.seed], job=job)


@pytest.fixture
def crowds(monkeypatch: pytest.MonkeyPatch) -> Crowds:
    made = Crowds()
    monkeypatch.setattr(stages, "Stream", made.stream)
    return made


def make_stage(count: int, explainer: object, *, sabotage: bool = False) -> Stage:
    needs = Needs(rows=ROWS)
    server = SimpleNamespace(
        needs=needs, address=("", 0), name="x", metrics=dict, provoke=lambda **order: 0.0
    )
    judges: Any = Judges(None, None, explainer)  # type: ignore[arg-type]
    return Stage(server, Report("x", "", sabotage), judges, count, device="cpu")  # type: ignore[arg-type]


JOBS = [Job((1, 2, 3), seed=seed) for seed in range(6)]


@pytest.mark.parametrize("count", [3, 9, 2000])
def test_fault_free_runs_meet_all_crowds_that_the_drills_streams_will(
    crowds: Crowds, count: int
) -> None:
    asyncio.run(make_stage(count, object()).prepare(JOBS))
    together, rest = crowds.sizes[: len(JOBS)], crowds.sizes[len(JOBS) :]
    assert together == [len(JOBS)] * len(JOBS)
    width = min(ROWS, count)
    wide = [width] * width if width > len(JOBS) else []
    assert rest == [*wide, *[1] * ALONE]


def test_no_job_is_run_again_and_a_key_makes_no_other_job(crowds: Crowds) -> None:
    stage = make_stage(2, object())

    async def prepare() -> None:
        await stage.prepare(JOBS)
        asked = len(crowds.sizes)
        await stage.prepare([replace(job, key="other") for job in JOBS])
        assert len(crowds.sizes) == asked

    asyncio.run(prepare())
    assert stage._clean == {job: [job.seed] for job in JOBS}


def test_nothing_is_asked_where_equality_is_exact(crowds: Crowds) -> None:
    asyncio.run(make_stage(9, None).prepare(JOBS))
    assert crowds.sizes == []


def test_the_sabotaged_prompt_is_never_asked_for_as_if_it_were_fault_free(
    crowds: Crowds, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would be answered from its wrong page, and tau would be what the sabotage did.
    victim = Job((9, 9, 9))
    stage = make_stage(len(JOBS), object(), sabotage=True)
    monkeypatch.setattr(stage, "jobs", lambda count, name=None: [victim])

    async def play() -> None:
        streams = await stage.open_sabotaged(JOBS)
        assert [stream.job for stream in streams] == [victim, *JOBS]
        await stage.open([victim], clean=False)
        with pytest.raises(InvariantError, match="sabotaged"):
            await stage.open([replace(victim, key="other")])

    asyncio.run(play())
    assert set(stage._clean) == set(JOBS)
