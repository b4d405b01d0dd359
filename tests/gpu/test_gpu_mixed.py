"""Segments on a real GPU: captured products between eager attention.

tests/device/test_segments.py has the logic; here is what an interpreter cannot show: that a segment
reads what the eager attention before it wrote, that it computes the bits of the same functions
launched one by one at the same padding, and that nothing compiles. That no launch waits is
tests/gpu/test_gpu_ahead.py's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mixed_steps import MixedSteps

from holdfast.llm import LLM, SamplingParams
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.wire.envelope import Refusal, TokenEnvelope

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


def test_segments_compute_the_bits_of_the_same_functions_launched_one_by_one(runners: list[Any]):
    with LLM(**OPTIONS) as llm:
        (runner,) = runners
        segments, mixed, compiles = runner._graphs._segments, MixedSteps(), CompileCount()
        assert segments.ladder == (128, 256, 384)
        run, launch = segments.run, runner.launch
        replayed: list[int] = []
        differ: list[str] = []

        def both(batch: Any, found: Any) -> torch.Tensor:
            """The step in segments and, again, eagerly: what it stores is the same each time."""
            assert isinstance(found, TokenEnvelope), found
            count = batch.tokens.numel()
            replayed.append(found.tokens)
            first = run(batch, found)[:count].clone()
            pool = runner.memory.pool.clone()
            second = run(batch, Refusal.ADDRESS_MOVED)
            if not torch.equal(first, second[:count]):
                far = (first.float() - second[:count].float()).abs().max().item()
                differ.append(f"{count} tokens in {found.tokens}: hidden states by {far}")
            if not torch.equal(pool.view(torch.int16), runner.memory.pool.view(torch.int16)):
                differ.append(f"{count} tokens in {found.tokens}: what is stored")
            if not bool(first.isfinite().all()):
                differ.append(f"{count} tokens in {found.tokens}: not finite")
            return second

        def watched(plan: Any) -> None:
            mixed.see(plan)
            launch(plan)

        segments.run, runner.launch = both, watched
        llm.generate(*requests())
        stats = runner.stats
    assert not differ, "; ".join(differ[:5])
    assert set(replayed) == {128, 256, 384}
    assert sum(stats.mixed_steps.values()) == len(replayed) >= mixed.count > 0
    assert not stats.eager_steps and compiles.count == 0, (stats.eager_steps, compiles.last)


def test_an_engine_with_segments_says_what_one_without_graphs_says(runners: list[Any]):
    """In float32, where steps of other shapes do not flip a token."""
    found = []
    for graphs in (True, False):
        with LLM(**(OPTIONS | {"dtype": "float32", "graphs": graphs})) as llm:
            found.append([result.choices[0].token_ids for result in llm.generate(*requests())])
    assert found[0] == found[1]
    with_graphs, without = (sum(runner.stats.mixed_steps.values()) for runner in runners)
    assert with_graphs > 3 and without == 0
