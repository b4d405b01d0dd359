"""`holdfast bench prefill`: prompt tokens a second, up to the first token of every prompt.

All prompts at once, one token out each, every run with other ids, so that nothing is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.bench.timed import Spent, Task, Value, runs_of
from holdfast.bench.workload import even_work


@dataclass(frozen=True, slots=True)
class Prefill:
    vocab_size: int
    prompts: int = 16
    tokens: int = 4096
    repeats: int = 3
    temperature: float = 0.6
    option: str = "--tokens"

    @property
    def name(self) -> str:
        return f"{self.prompts} x {self.tokens}"

    def tasks(self) -> list[Task]:
        return [
            Task(
                self._key(run),
                even_work(
                    self.name,
                    self.vocab_size,
                    requests=self.prompts,
                    prompt_tokens=self.tokens,
                    output_tokens=1,
                    seed=run,
                ),
                self.temperature,
                self._key(run),
            )
            for run in range(self.repeats)
        ]

    def values(self, spent: Mapping[str, Spent]) -> list[Value]:
        tokens = self.prompts * self.tokens
        found = runs_of(map(self._key, range(self.repeats)), spent)
        rates = tuple(tokens / one.wall_s for one in found)
        return [Value("prefill", self.name, None, "prompt rate", "tok/s", rates)] if rates else []

    def _key(self, run: int) -> str:
        return f"prefill, run {run + 1}"
