"""`holdfast bench offline`: output tokens a second of a pile of requests handed in at once.

Method, the same for every engine: token ids in, end tokens ignored, from the first request handed
in to the last token out; loading and a small warm-up are outside. Only requested output tokens
count. Each run has other ids, so that no run finds the prompts of an earlier one cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.bench.timed import Spent, Task, Value, runs_of
from holdfast.bench.workload import Work


@dataclass(frozen=True, slots=True)
class Offline:
    vocab_size: int
    work: Work
    repeats: int = 3
    temperature: float = 0.0
    option: str = "--work"

    @property
    def name(self) -> str:
        return self.work.name

    def tasks(self) -> list[Task]:
        return [
            Task(
                self._key(run),
                self.work.shifted(run, self.vocab_size),
                self.temperature,
                self._key(run),
            )
            for run in range(self.repeats)
        ]

    def values(self, spent: Mapping[str, Spent]) -> list[Value]:
        tokens = self.work.total_output_tokens
        found = runs_of(map(self._key, range(self.repeats)), spent)
        if not found:
            return []
        name = self.work.name
        rates = tuple(tokens / one.wall_s for one in found)
        values = [Value("offline", name, None, "output rate", "tok/s", rates)]
        if all(one.cpu_s for one in found):
            # On a machine that others use too, this one moves less.
            rates = tuple(tokens / one.cpu_s for one in found)
            values.append(Value("offline", name, None, "output rate of a CPU", "tok/s", rates))
        return values

    def _key(self, run: int) -> str:
        return f"offline {self.work.name}, run {run + 1}"
