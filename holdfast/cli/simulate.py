"""`holdfast simulate`: run seeds through the deterministic simulator, or hunt planted bugs.

One seed, one trace, whatever the machine. Seeds are spread over the cores; what fails is shrunk and
printed with the command that shows it again. Exit code 1 when anything failed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.show import bars, err, out
from holdfast.errors import OptionError
from holdfast.sim.mutations import hunt
from holdfast.sim.planted import MUTATIONS
from holdfast.sim.shrink import describe, shrink
from holdfast.sim.simulator import Outcome, simulate
from holdfast.sim.world import PROFILES, draw

EXIT_FAILED = 1
# Seeds handed to a process at once: a second of work or so.
CHUNK = 16


def simulate_command(
    seed: Annotated[int | None, typer.Option(help="Run this seed alone.")] = None,
    seeds: Annotated[
        str, typer.Option(metavar="A..B", help="Seeds from A up to, not including, B.")
    ] = "0..200",
    minutes: Annotated[
        float | None, typer.Option(help="Run on from A for so long instead.", min=0.0)
    ] = None,
    profile: Annotated[
        str, typer.Option(help=f"What the seeds stress: {', '.join(PROFILES)}.")
    ] = "short",
    trace: Annotated[
        Path | None, typer.Option(help="Write every event of --seed to this file.")
    ] = None,
    mutations: Annotated[
        bool, typer.Option("--mutations", help="Plant each known bug and see it caught.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="With --mutations: this bug; may be repeated.")
    ] = None,
    shrunk: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="Make failing seeds smaller.")
    ] = True,
) -> None:
    """Run the engine's brain under every bad timing that a seed can draw."""
    if profile not in PROFILES:
        raise OptionError("--profile", f"{profile!r} is none of {', '.join(PROFILES)}")
    if trace is not None and seed is None:
        raise OptionError("--trace", "needs --seed: a trace is of one seed")
    first, last = _range(seeds) if seed is None else (seed, seed + 1)
    if mutations:
        failed = _hunt_all(only or [], first, last)
    elif seed is not None:
        failed = _one(seed, profile, trace, shrunk)
    else:
        failed = _many(first, last, minutes, profile, shrunk)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _range(text: str) -> tuple[int, int]:
    first, dots, last = text.partition("..")
    if not dots or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise OptionError("--seeds", f"{text!r} is not A..B with A below B")
    return int(first), int(last)


def _one(seed: int, profile: str, trace: Path | None, shrunk: bool) -> bool:
    world = draw(seed, profile)
    lines: list[str] = []
    outcome = simulate(world, lines.append if trace is not None else None)
    if trace is not None:
        trace.write_text("\n".join([describe(world), "", *lines, ""]))
        out.print(f"{len(lines)} lines in {trace}")
    out.print(_told(outcome))
    if outcome.violation is None:
        return False
    _show_shrunk(seed, profile, shrunk)
    return True


def _many(first: int, last: int, minutes: float | None, profile: str, shrunk: bool) -> bool:
    deadline_s = None if minutes is None else time.monotonic() + 60 * minutes
    numbers: Iterator[int] = (
        itertools.count(first) if minutes is not None else iter(range(first, last))
    )
    done = tokens = faults = 0
    failed: list[Outcome] = []
    with bars(unit="seeds") as report, multiprocessing.get_context("spawn").Pool() as pool:
        for outcome in pool.imap(_job, ((n, profile) for n in numbers), chunksize=CHUNK):
            done += 1
            tokens += outcome.tokens
            faults += sum(outcome.faults.values())
            report(f"simulate {profile}", done, last - first if minutes is None else done + 1)
            if outcome.violation is not None:
                failed.append(outcome)
                err.print(f"seed {outcome.seed}: {outcome.violation}")
                err.print(f"  again: holdfast simulate --seed {outcome.seed} --profile {profile}")
            if deadline_s is not None and time.monotonic() >= deadline_s:
                pool.terminate()
                break
    out.print(
        f"{done:,} seeds of profile {profile}: {len(failed)} failed; {tokens:,} tokens, "
        f"{faults:,} faults"
    )
    if failed:
        _show_shrunk(failed[0].seed, profile, shrunk)
    return bool(failed)


def _job(job: tuple[int, str]) -> Outcome:
    seed, profile = job
    return simulate(draw(seed, profile))


def _show_shrunk(seed: int, profile: str, shrunk: bool) -> None:
    if not shrunk:
        return
    world, outcome = shrink(draw(seed, profile))
    out.print("\nshrunk to:")
    out.print(describe(world), markup=False)
    out.print(_told(outcome))


def _told(outcome: Outcome) -> str:
    verdict = outcome.violation or "clean"
    faults = ", ".join(f"{name} {count}" for name, count in sorted(outcome.faults.items()))
    ends = ", ".join(f"{name.lower()} {count}" for name, count in sorted(outcome.ends.items()))
    return (
        f"seed {outcome.seed}: {verdict}\n  {outcome.events} events, {outcome.steps} steps, "
        f"{outcome.tokens} tokens; faults: {faults or 'none'}; ends: {ends or 'none'}"
    )


def _hunt_all(only: list[str], first: int, last: int) -> bool:
    """Whether a planted bug went unseen in all seeds."""
    chosen = [m for m in MUTATIONS if not only or m.name in only]
    missing = set(only) - {m.name for m in chosen}
    if missing:
        raise OptionError("--only", f"no mutation is called {sorted(missing)[0]!r}")
    unseen = 0
    work = ((m.name, last - first, first) for m in chosen)
    with bars(unit="mutations") as report, multiprocessing.get_context("spawn").Pool() as pool:
        for number, (name, seed, said) in enumerate(pool.imap(_hunt_job, work), 1):
            report("mutations", number, len(chosen))
            unseen += seed is None
            where = "NOT CAUGHT" if seed is None else f"seed {seed}"
            out.print(f"{name:<28} {where:<12} {said}", markup=False)
    out.print(f"{len(chosen) - unseen} of {len(chosen)} caught within {last - first} seeds")
    return unseen > 0


def _hunt_job(job: tuple[str, int, int]) -> tuple[str, int | None, str]:
    name, seeds, first = job
    mutation = next(m for m in MUTATIONS if m.name == name)
    found = hunt(mutation, seeds, first)
    if found is None:
        return name, None, f"makes untrue: {mutation.bug}"
    seed, outcome = found
    return name, seed, (outcome.violation or "")[:110]
