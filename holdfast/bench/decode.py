"""`holdfast bench decode`: milliseconds of one decode step, for each batch size.

Method, the same for every engine: the same prompts to 8 tokens and to 8 + steps tokens; the
difference of both times, divided by `steps`. What both have (prompts, the first step, handing out)
drops out. The prompts were run before, so that both find them in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.bench.timed import Spent, Task, Value
from holdfast.bench.workload import Work

SHORT_TOKENS = 8
_WARM_TOKENS = 4
# Ids of the prompts of one run differ from those of the next by more than any batch has rows.
_RUN_STRIDE = 5003


@dataclass(frozen=True, slots=True)
class Decode:
    vocab_size: int
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 512
    steps: int = 256
    repeats: int = 3
    temperature: float = 0.6
    option: str = "--context"

    @property
    def name(self) -> str:
        return f"{self.context} in, {SHORT_TOKENS}+{self.steps} out"

    def tasks(self) -> list[Task]:
        return [
            Task(
                self._key(batch, run, kind), self._work(batch, run, tokens), self.temperature, group
            )
            for batch in self.batches
            for run in range(self.repeats)
            for group in [f"decode {batch} {run}"]
            for kind, tokens in (
                ("warm", _WARM_TOKENS),
                ("short", SHORT_TOKENS),
                ("long", SHORT_TOKENS + self.steps),
            )
        ]

    def values(self, spent: Mapping[str, Spent]) -> list[Value]:
        return [
            Value("decode", self.name, batch, "step", "ms", self._steps_ms(batch, spent))
            for batch in self.batches
            if self._steps_ms(batch, spent)
        ]

    def _steps_ms(self, batch: int, spent: Mapping[str, Spent]) -> tuple[float, ...]:
        found = []
        for run in range(self.repeats):
            long, short = (spent.get(self._key(batch, run, kind)) for kind in ("long", "short"))
            if long is not None and short is not None:
                found.append((long.wall_s - short.wall_s) / self.steps * 1e3)
        return tuple(found)

    def _key(self, batch: int, run: int, kind: str) -> str:
        return f"decode, batch {batch}, run {run + 1}, {kind}"

    def _work(self, batch: int, run: int, tokens: int) -> Work:
        """Row i is one id over and over, as the peers' scripts have it."""
        ids = ((7 + row + batch + run * _RUN_STRIDE) % self.vocab_size for row in range(batch))
        prompts = tuple((one,) * self.context for one in ids)
        return Work(self.name, prompts, (tokens,) * batch)
