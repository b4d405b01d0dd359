"""Steps with prompts as graphs on a real GPU: one replay, attention included.

tests/device/test_mixed.py has the logic and tests/ops/test_mixed_arrays.py the arrays; here is what
an interpreter cannot show: that a replay computes the bits of the same function launched kernel by
kernel in the same bucket, that one graph is right for every step it has room for, that what has no
room falls back and says the same, and that nothing compiles. That no launch waits is
tests/gpu/test_gpu_ahead.py's; that warps without a tile wait for nobody is prefill_checks'
`empty_tiles`, which has a deadline and is to be run first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mixed_steps import MixedSteps

from holdfast.config import Limits
from holdfast.device.build import build_engine
from holdfast.device.memory import DeviceMemory
from holdfast.device.runner import Runner
from holdfast.llm import LLM, SamplingParams
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.wire.envelope import MixedEnvelope, Refusal
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan

OPTIONS = {
    "device": "cuda:0",
    "kernels": "triton",
    "graphs": True,
    "dtype": "bfloat16",
    "rows_max": 8,
    "pages": 2000,
    # Three buckets: 128, 256 and 384 tokens.
    "prefill_tokens": 300,
}

LIMITS = Limits(
    vocab_size=300,
    context_tokens=2048,
    page_tokens=16,
    pages=8000,
    rows_max=256,
    prefill_tokens=1024,
    live_tokens=1 << 18,
)
# Query tokens and tokens before them, a row each.
MIXES: dict[str, tuple[list[int], list[int]]] = {
    "one prompt, 255 decode": ([1] * 100 + [512] + [1] * 155, [40] * 100 + [0] + [33] * 155),
    "three prompts of unequal length": ([17, 1, 300, 2, 1], [0, 9, 0, 0, 700]),
    "a prompt goes on from the middle": ([1, 130, 1, 9], [5, 333, 1000, 16]),
    "a prompt alone": ([128], [0]),
    "prompts alone": ([90, 33, 5], [0, 128, 1]),
    "the bucket is full": ([1, 127], [64, 0]),
    "one token more": ([1, 128], [64, 0]),
}


class Scene:
    """A runner of random weights, and steps over cached tokens that are noise."""

    def __init__(
        self,
        tiny: ModelSpec,
        *,
        device: str = "cuda:0",
        kernels: str = "triton",
        dtype: str = "bfloat16",
    ) -> None:
        torch.manual_seed(4)
        self.spec = replace(tiny, vocab_size=LIMITS.vocab_size, layers=3)
        self.memory = DeviceMemory.allocate(
            self.spec, LIMITS, dtype=dtype, pool_dtype=dtype, device=device
        )
        views = WeightsLayout.of(self.spec, dtype).views(self.memory.weights)
        for view in views.values():
            view.normal_(std=0.05)
        self.runner = build_engine(
            self.spec, LIMITS, views, self.memory, kernels=kernels, graphs=True
        )
        self.runner.warm_up()
        self.runner.mark_ready()
        self.draw = np.random.default_rng(5)

    def plan(self, lens: list[int], starts: list[int]) -> StepPlan:
        """Rows in a new epoch with all their tokens, of which the `starts` are cached: noise."""
        self.runner.reset(self.runner.epoch + 1)
        n, pages = len(lens), 1
        admits, tokens, writes = np.zeros(n, ADMIT), [], []
        for row, (count, start) in enumerate(zip(lens, starts, strict=True)):
            record, known = admits[row], count + start
            record["row"], record["owner"], record["length"] = row + 1, row + 1, start
            record["tokens_len"] = record["prompt_len"] = known
            record["top_p"] = record["repetition_penalty"] = 1.0
            record["top_logprobs"] = -1
            tokens += self.draw.integers(0, LIMITS.vocab_size, known).tolist()
            for column in range(int(LIMITS.pages_for_tokens(known + 1))):
                writes.append((0, row + 1, column, pages))
                pages += 1
        assert pages <= LIMITS.pages
        self.memory.pool[1:pages].normal_()
        return StepPlan(
            epoch=self.runner.epoch,
            step=1,
            admits=admits,
            admit_tokens=np.array(tokens, np.int32),
            page_writes=np.array(writes, PAGE_WRITE),
            rows=np.arange(1, n + 1, dtype=np.int32),
            query_lens=np.array(lens, np.int32),
            samples=np.ones(n, np.uint8),
        )


@pytest.fixture(scope="module")
def scene(tiny: ModelSpec) -> Scene:
    return Scene(tiny)


def both_ways(runner: Runner, found: list[str]) -> tuple[Any, Any]:
    """(the runner's graphs, a `run` of theirs that computes each step as it was decided and, again,
    eagerly in the same bucket). What differs is told in `found`; what a step stores is the same
    each time."""
    mixed = runner._graphs._mixed
    run, pool = mixed.run, runner.memory.pool

    def twice(plan: StepPlan, shape: Any, decided: Any) -> Any:
        assert isinstance(decided, MixedEnvelope), decided
        hidden, _ = run(plan, shape, decided)
        first, stored = hidden[: shape.tokens].clone(), pool.clone()
        hidden, ends = run(plan, shape, Refusal.ADDRESS_MOVED)
        second = hidden[: shape.tokens]
        name = f"{shape} in {decided.tokens}"
        if not bool(first.isfinite().all()):
            found.append(f"{name}: not finite")
        if not torch.equal(first, second):
            far = (first.float() - second.float()).abs().max().item()
            found.append(f"{name}: hidden states by {far}")
        if not torch.equal(stored.view(torch.int16), pool.view(torch.int16)):
            found.append(f"{name}: what is stored")
        return hidden, ends

    return mixed, twice


@pytest.mark.parametrize("mix", list(MIXES))
def test_a_replay_has_the_bits_of_its_kernels_and_the_values_of_an_eager_step(
    scene: Scene, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, differ = scene.runner, list[str]()
    mixed, twice = both_ways(runner, differ)
    monkeypatch.setattr(mixed, "run", twice)
    before = sum(runner.stats.mixed_steps.values())
    plan = scene.plan(*MIXES[mix])
    pool = scene.memory.pool.clone()
    hidden: list[torch.Tensor] = []
    raw = runner.decoder.raw_logits
    monkeypatch.setattr(
        runner.decoder, "raw_logits", lambda rows: hidden.append(rows.clone()) or raw(rows)
    )
    compiles = CompileCount()
    runner.run(plan)
    assert not differ, "; ".join(differ)
    assert sum(runner.stats.mixed_steps.values()) == before + 1, runner.stats.eager_steps
    assert compiles.count == 0, compiles.last
    # The same rows by the decoder without graphs, unpadded, with its own choice of kernels.
    scene.memory.pool.copy_(pool)
    runner.reset(runner.epoch + 1)
    plan.epoch = runner.epoch
    monkeypatch.setattr(runner._graphs, "run", lambda _, *, alike: None)
    runner.run(plan)
    replayed, eager = (one.float() for one in hidden)
    error = float((replayed - eager).norm() / eager.norm())
    assert error < 3e-2, f"{mix}: relative error {error}"


@pytest.mark.parametrize(
    ("lens", "starts", "reason"),
    [
        # The smallest bucket that has room for as many prompts has 768 tokens.
        ([2] * 20, [0] * 20, None),
        ([2] * 100, [0] * 100, "too_many_prompts"),
        ([64] * 20, [2000 - 64] * 20, "too_many_gathered"),
        ([1024, 257, 1], [0, 0, 7], "too_many_tokens"),
    ],
)
def test_what_has_no_room_is_computed_eagerly_and_counted(
    scene: Scene, lens: list[int], starts: list[int], reason: str | None
) -> None:
    stats = scene.runner.stats
    before, eager = sum(stats.mixed_steps.values()), dict(stats.eager_steps)
    result = scene.runner.run(scene.plan(lens, starts))
    assert not bool(result.faults.any())
    if reason is None:
        assert sum(stats.mixed_steps.values()) == before + 1
    else:
        assert sum(stats.mixed_steps.values()) == before
        assert stats.eager_steps[reason] == eager.get(reason, 0) + 1


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """More requests than rows, so that prompts of all lengths keep coming beside decode."""
    draw = np.random.default_rng(11)
    lengths = [*range(1, 12), 120, 121, 127, 128, 129, 200, 250, 290, 5, 60, 90]
    prompts = [draw.integers(5, 200, length).tolist() for length in lengths]
    params = [
        SamplingParams(max_tokens=3 + at % 9, temperature=0.8 * (at % 2), seed=at, ignore_eos=True)
        for at in range(len(prompts))
    ]
    return prompts, params


def test_every_step_of_an_engine_has_the_bits_of_its_kernels(runners: list[Any]) -> None:
    with LLM(**OPTIONS) as llm:
        (runner,) = runners
        differ, replayed, seen, compiles = [], [], MixedSteps(), CompileCount()
        mixed, twice = both_ways(runner, differ)
        assert mixed.ladder == (128, 256, 384)
        launch = runner.launch

        def noted(plan: Any, shape: Any, decided: Any) -> Any:
            replayed.append(decided.tokens)
            return twice(plan, shape, decided)

        def watched(plan: Any) -> None:
            seen.see(plan)
            launch(plan)

        mixed.run, runner.launch = noted, watched
        llm.generate(*requests())
        stats = runner.stats
    assert not differ, "; ".join(differ[:5])
    assert set(replayed) == {128, 256, 384}
    assert sum(stats.mixed_steps.values()) == len(replayed) >= seen.count > 0
    assert not stats.eager_steps and compiles.count == 0, (stats.eager_steps, compiles.last)


def test_an_engine_with_graphs_says_what_one_without_says(runners: list[Any]) -> None:
    """In float32, where steps of other shapes do not flip a token."""
    found = []
    for graphs in (True, False):
        with LLM(**(OPTIONS | {"dtype": "float32", "graphs": graphs})) as llm:
            found.append([result.choices[0].token_ids for result in llm.generate(*requests())])
    assert found[0] == found[1]
    with_graphs, without = (sum(runner.stats.mixed_steps.values()) for runner in runners)
    assert with_graphs > 3 and without == 0
