"""Shrinking: from a failing world to one with fewer requests and faults that still fails.

Greedy and deterministic: switch whole kinds of fault off, then drop halves, quarters and single
requests, then cut prompts and outputs short, and start over until nothing more can go. A smaller
world is kept when it fails in the same way, told by the violation with its numbers taken out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from holdfast.sim.simulator import Outcome, simulate
from holdfast.sim.world import Job, Rates, World, without


def signature(violation: str) -> str:
    """What a violation says, without its numbers: two seeds with one bug share it."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", violation)


def shrink(
    world: World,
    run: Callable[[World], Outcome] = simulate,
    *,
    runs_max: int = 400,
) -> tuple[World, Outcome]:
    """The smallest world found within `runs_max` runs, and how it fails.

    Raises ValueError when `world` does not fail.
    """
    outcome = run(world)
    if outcome.violation is None:
        raise ValueError(f"seed {world.seed} does not fail")
    wanted = signature(outcome.violation)
    runs = 1
    progress = True
    while progress and runs < runs_max:
        progress = False
        for smaller in _smaller(world):
            if runs >= runs_max:
                break
            runs += 1
            tried = run(smaller)
            if tried.violation is not None and signature(tried.violation) == wanted:
                world, outcome, progress = smaller, tried, True
                break
    return world, outcome


def _smaller(world: World) -> Iterator[World]:
    """Worlds one cut smaller, the largest cuts first."""
    for rate in fields(Rates):
        if getattr(world.rates, rate.name):
            yield without(world, **{rate.name: 0.0})
    count = len(world.jobs)
    size = count // 2
    while size >= 1:
        for at in range(0, count, size):
            left = world.jobs[:at] + world.jobs[at + size :]
            if left:
                yield without(world, left)
        size //= 2
    for at, job in enumerate(world.jobs):
        for cut in _cuts(job):
            yield without(world, (*world.jobs[:at], cut, *world.jobs[at + 1 :]))


def _cuts(job: Job) -> Iterator[Job]:
    if len(job.ids) > 1:
        yield replace(job, ids=job.ids[:1])
    if len(job.prompt) > 1:
        yield replace(job, prompt=job.prompt[: len(job.prompt) // 2])
    if job.max_tokens > 1:
        yield replace(job, max_tokens=job.max_tokens // 2)
    for name in ("abort_after", "finish_after", "poison_at"):
        if getattr(job, name) is not None:
            yield replace(job, **{name: None})
    if job.stop_ids:
        yield replace(job, stop_ids=())


def describe(world: World) -> str:
    """A world in a few lines, for people."""
    limits = world.limits
    lines = [
        f"seed {world.seed}: {limits.pages_usable} pages of {limits.page_tokens} tokens, "
        f"{limits.rows_max} rows, {limits.prefill_tokens} tokens a step, context "
        f"{limits.context_tokens}, {limits.steps_ahead} steps ahead, "
        f"{limits.api_processes} api processes",
        "faults: "
        + (
            ", ".join(
                f"{rate.name} {getattr(world.rates, rate.name):.3f}"
                for rate in fields(Rates)
                if getattr(world.rates, rate.name)
            )
            or "none"
        ),
    ]
    for job in world.jobs:
        extras = [
            f"{name} {value}"
            for name, value in (
                ("tenant", job.tenant),
                ("priority", job.priority),
                ("abort after", job.abort_after),
                ("stop string after", job.finish_after),
                ("poison at", job.poison_at),
                ("timeout", job.timeout if job.timeout < 10**12 else None),
            )
            if value not in (None, 0)
        ]
        lines.append(
            f"request {', '.join(hex(one) for one in job.ids)} at {job.at}: "
            f"{len(job.prompt)} in, {job.max_tokens} out; {', '.join(extras)}"
        )
    return "\n".join(lines)
