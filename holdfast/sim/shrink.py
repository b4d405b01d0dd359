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
from holdfast.sim.world import FOREVER, Client, Job, Rates, World, without


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


# Job fields that are cut back to nothing.
PLAIN: dict[str, object] = {
    "stop": (),
    "stop_ids": (),
    "include_stop": False,
    "min_tokens": 0,
    "logprobs": -1,
    "sampled": False,
}


def _cuts(job: Job) -> Iterator[Job]:
    if job.choices > 1:
        yield replace(job, choices=1)
    if len(job.prompt) > 1:
        yield replace(job, prompt=job.prompt[: len(job.prompt) // 2])
    if job.max_tokens > 1:
        yield replace(job, max_tokens=job.max_tokens // 2)
    for name, plain in PLAIN.items():
        if getattr(job, name) != plain:
            yield replace(job, **{name: plain})
    for item in fields(Client):
        if getattr(job.client, item.name) != item.default:
            yield replace(job, client=replace(job.client, **{item.name: item.default}))


def describe(world: World) -> str:
    """A world in a few lines, for people."""
    limits = world.limits
    lines = [
        f"seed {world.seed}: {limits.pages_usable} pages of {limits.page_tokens} tokens, "
        f"{limits.rows_max} rows, {limits.prefill_tokens} tokens a step "
        f"({limits.mixed_tokens or 'any'} with prompts beside decode), context "
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
        extras: list[tuple[str, object]] = [
            ("tenant", job.tenant),
            ("priority", job.priority),
            ("timeout", job.timeout if job.timeout < FOREVER else None),
            ("stop ids", list(job.stop_ids)),
            ("stop", list(job.stop)),
            ("include stop", job.include_stop),
            ("sampled", job.sampled),
            ("min tokens", job.min_tokens),
            ("logprobs", job.logprobs if job.logprobs >= 0 else None),
            ("poison at", job.poison_at),
        ]
        extras += [(f.name.replace("_", " "), getattr(job.client, f.name)) for f in fields(Client)]
        lines.append(
            f"client {job.number} at {job.at}: api {job.api}, {len(job.prompt)} in, "
            f"{job.max_tokens} out, {job.choices} choices; "
            + ", ".join(f"{name} {value}" for name, value in extras if value)
        )
    return "\n".join(lines)
