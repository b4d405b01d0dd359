"""Timed generations: what offline, decode and prefill have in common, for us and for every peer.

A bench names tasks (generate these prompts to these lengths), each side says how many seconds each
task took, and the bench makes its values of them. So a method is written once, and a peer is
whatever can run a list of tasks. Several benches may share one start of an engine. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from holdfast.bench.report import Figure, PeerFigure
from holdfast.bench.workload import Work
from holdfast.errors import OptionError

Report = Callable[[str, int, int], None]


class Spent(NamedTuple):
    """One task: by the clock, and on all CPUs of its process (0 where nobody counted)."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Task:
    """Generate all of `work`, end tokens ignored. `tenant`: tasks of one share cached prefixes."""

    key: str
    work: Work
    temperature: float
    tenant: str


class Value(NamedTuple):
    """A figure of one side."""

    bench: str
    work: str
    batch: int | None
    metric: str
    unit: str
    runs: tuple[float, ...]


class Bench(Protocol):
    """`option`: what to change when its work is too long for the model. name: of its work.

    values: of the tasks that were run; none where a side did not get that far.
    """

    option: str
    repeats: int

    @property
    def name(self) -> str: ...
    def tasks(self) -> list[Task]: ...
    def values(self, spent: Mapping[str, Spent]) -> list[Value]: ...


@dataclass(frozen=True, slots=True)
class OurSide:
    """What our engine did so far, filled in as it goes: a session that ends early keeps it.

    facts: settings of the engine that nobody asked for by an option.
    """

    spent: dict[str, Spent] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerSide:
    """The same of a peer: seconds of each task's key. options: its settings that move figures."""

    name: str
    version: str
    spent: dict[str, Spent]
    options: Mapping[str, Any]


def all_tasks(benches: Iterable[Bench]) -> list[Task]:
    """Every task in order, a small warm-up first, which counts for nothing."""
    tasks = [task for bench in benches for task in bench.tasks()]
    assert tasks, "nothing to measure"
    first = tasks[0]
    warm = Task("warm-up", first.work.head(4, 8), first.temperature, "warm-up")
    return [warm, *tasks]


def check_fits(benches: Iterable[Bench], context_tokens: int, rows_max: int) -> None:
    """Raises OptionError for work that the engine cannot hold, or not at once."""
    for bench in benches:
        for task in bench.tasks():
            if task.work.longest > context_tokens:
                raise OptionError(
                    bench.option,
                    f"{task.work.name} has a request of {task.work.longest} tokens in and out; "
                    f"this model takes {context_tokens}",
                )
        for value in getattr(bench, "batches", ()):
            if value > rows_max:
                raise OptionError(
                    "--batch", f"{value} rows are more than --max-rows, which is {rows_max}"
                )


def figures(
    benches: Sequence[Bench],
    ours: Mapping[str, Spent],
    peer: PeerSide | None,
    *,
    model: str,
    options: Mapping[str, Any],
    floor: Callable[[Value], float | None],
) -> list[Figure]:
    """Both sides of every value that ours has."""
    found = []
    for bench in benches:
        theirs = [] if peer is None else bench.values(peer.spent)
        for value in bench.values(ours):
            # A peer may have fewer: nobody counts the CPU time of its processes.
            other = next((one for one in theirs if one[:-1] == value[:-1]), None)
            found.append(
                Figure(
                    bench=value.bench,
                    model=model,
                    work=value.work,
                    batch=value.batch,
                    metric=value.metric,
                    unit=value.unit,
                    runs=value.runs,
                    peer=None
                    if peer is None or other is None
                    else PeerFigure(
                        name=peer.name, version=peer.version, runs=other.runs, options=peer.options
                    ),
                    floor=floor(value),
                    options=options,
                )
            )
    return found


def runs_of(keys: Iterable[str], spent: Mapping[str, Spent]) -> list[Spent]:
    """Of the keys that a side has: a peer may have had fewer runs, or a session ended early."""
    return [spent[key] for key in keys if key in spent]
