"""The benchmark works: which prompts and how many tokens out, each a function of its seed alone.

Pure; shared by the benches, the drills and the peers' side of a comparison, so that both sides of
any figure run the same requests. Prompts are token ids: no tokeniser's speed is in a figure.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Work:
    """`prompts[i]` (token ids) asks for exactly `output_tokens[i]` tokens, end tokens ignored."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_tokens: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens in and out of the largest request."""
        return max(map(sum, zip(map(len, self.prompts), self.output_tokens, strict=True)))

    def shifted(self, by: int, vocab_size: int) -> Work:
        """The same lengths with other ids: no run finds the prompts of another one cached."""
        prompts = tuple(tuple((x + by) % vocab_size for x in prompt) for prompt in self.prompts)
        return Work(self.name, prompts, self.output_tokens)

    def head(self, count: int, output_tokens: int) -> Work:
        """Its first requests, cut short: a warm-up."""
        outputs = tuple(min(output_tokens, n) for n in self.output_tokens[:count])
        return Work(self.name, self.prompts[:count], outputs)

    @property
    def requests(self) -> int:
        return len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def total_output_tokens(self) -> int:
        return sum(self.output_tokens)


def mixed_work(
    vocab_size: int,
    *,
    requests: int = 64,
    prompt_range: tuple[int, int] = (64, 512),
    output_range: tuple[int, int] = (64, 256),
    seed: int = 0,
) -> Work:
    """`requests` prompts of random ids; lengths in and out uniform in the (inclusive) ranges."""
    draw = np.random.default_rng([0x686F_6C64, seed])
    prompt_lens = draw.integers(*prompt_range, size=requests, endpoint=True)
    output_lens = draw.integers(*output_range, size=requests, endpoint=True)
    prompts = tuple(
        tuple(draw.integers(0, vocab_size, size=int(length)).tolist()) for length in prompt_lens
    )
    return Work(f"mixed{requests}", prompts, tuple(int(length) for length in output_lens))


def peers_work(
    vocab_size: int, *, requests: int = 256, low: int = 100, high: int = 1024, seed: int = 0
) -> Work:
    """The work that the peers' published figures were measured on: 100..1024 in, 100..1024 out.

    Python's own generator, seeded; ids below 10,000 as the peers' scripts draw them, folded into a
    smaller vocabulary where need be (lengths, which decide the time, stay the same).
    """
    draw = random.Random(seed)
    prompts = tuple(
        tuple(draw.randint(0, 10_000) % vocab_size for _ in range(draw.randint(low, high)))
        for _ in range(requests)
    )
    outputs = tuple(draw.randint(low, high) for _ in range(requests))
    return Work(f"peers{requests}", prompts, outputs)


def even_work(
    name: str, vocab_size: int, *, requests: int, prompt_tokens: int, output_tokens: int, seed: int
) -> Work:
    """`requests` prompts of as many random ids each, asking for as many tokens each."""
    draw = np.random.default_rng([0x6576_656E, seed])
    ids = draw.integers(0, vocab_size, size=(requests, prompt_tokens))
    return Work(name, tuple(map(tuple, ids.tolist())), (output_tokens,) * requests)


WORKS = {"mixed": mixed_work, "peers": peers_work}
