"""Job: one request whose answer depends on what stands far back in its prompt.

A prompt is a list of facts and the beginning of one that stood near its start, so that an answer
computed from a wrong page is another answer. Owns the prompts of all drills; they are the same for
every run, so that a reference is computed once. Half of the jobs are greedy, half draw by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# fmt: off
_NAMES = (
    "copper", "lantern", "river", "maple", "granite", "violin", "harbor", "saddle", "pepper",
    "anchor", "marble", "candle", "falcon", "meadow", "ribbon", "walnut",
)
# fmt: on
FACTS = 9
TOKENS = 48


@dataclass(frozen=True, slots=True)
class Job:
    """prompt: token ids. key: the API key it is sent with; nothing of it decides the answer."""

    prompt: tuple[int, ...]
    max_tokens: int = TOKENS
    temperature: float = 0.0
    seed: int = 0
    key: str | None = None

    def without_key(self) -> Job:
        """What decides the answer."""
        return replace(self, key=None)

    def body(self, model: str) -> dict[str, Any]:
        """Of POST /v1/completions; the answer names its tokens by id."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }


def facts_prompt(name: str) -> str:
    """Facts that only this name has, and the first half of the second of them."""
    draw = random.Random(name)
    names = draw.sample(_NAMES, FACTS)
    lines = [f"{each}_{draw.randint(10, 99)} = {draw.randint(100, 999)}" for each in names]
    return f"# {name}\n" + "\n".join(lines) + f"\n\n{lines[1].partition(' ')[0]}"


def make_jobs(
    encode: Callable[[str], list[int]], name: str, count: int, *, tokens: int = TOKENS
) -> list[Job]:
    """`count` jobs called `name` 0, 1, ...; the same name gives the same jobs."""
    return [
        Job(
            prompt=tuple(encode(facts_prompt(f"{name} {number}"))),
            max_tokens=tokens,
            temperature=0.8 * (number % 2),
            seed=number,
        )
        for number in range(count)
    ]
