"""Launching ahead on a real GPU: what is launched while the device is busy does not wait for it.

tests/device/test_fast_path.py has the logic, interpreted; here are real streams and pinned copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mixed_steps import MixedSteps

from holdfast.llm import LLM, SamplingParams
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.ops.pinned import SLOTS, Uploads

CUDA = torch.device("cuda", 0)
# About 0.1 s of an H200's clock.
BUSY_CYCLES = 200_000_000


def test_an_upload_behind_a_busy_stream_returns_at_once_and_brings_what_it_was_given():
    uploads = Uploads(CUDA, words=8)
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 1 << 60, 100) for _ in range(SLOTS)]
    torch.zeros(100, device=CUDA)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(BUSY_CYCLES)
    busy.record()
    found = [uploads.put(array)[0] for array in arrays]
    assert not busy.query(), "an upload waited for what the stream was given before it"
    # The next one waits for the slot that the first one's copy is read from.
    last = uploads.put(arrays[0] + 1)[0]
    assert busy.query()
    for array, tensor in zip([*arrays, arrays[0] + 1], [*found, last], strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def test_no_step_of_plain_rows_waits_for_the_device_and_nothing_compiles(runners: list[Any]):
    """Prompts, mixed steps and decode; more requests than rows, so that prompts keep coming."""
    prompts = [list(range(5 + at, 5 + at + 3 + 7 * at)) for at in range(10)]
    params = [
        SamplingParams(max_tokens=4 + at, temperature=0.8 * (at % 2), seed=at, ignore_eos=True)
        for at in range(10)
    ]
    found = []
    for steps_ahead in (1, 2):
        options = {"kernels": "triton", "graphs": True, "dtype": "float32", "rows_max": 4}
        with LLM(
            device="cuda:0", steps_ahead=steps_ahead, pages=2000, prefill_tokens=32, **options
        ) as llm:
            (runner,) = runners[-1:]
            compiles, waited, ahead, mixed = CompileCount(), [], [0], MixedSteps()
            launch = runner.launch

            def busy_launch(plan: Any, launch: Any = launch, runner: Any = runner) -> None:
                mixed.see(plan)  # noqa: B023
                busy = torch.cuda.Event()
                torch.cuda._sleep(BUSY_CYCLES)
                busy.record()
                launch(plan)
                # Bound in this turn of the loop alone: it ends before the next begins.
                waited.append(busy.query())  # noqa: B023
                ahead.append(runner.in_flight)  # noqa: B023

            runner.launch = busy_launch
            results = llm.generate(prompts, params)
            found.append([result.token_ids for result in results])
            stats = runner.stats
        assert not any(waited), f"{sum(waited)} of {len(waited)} launches waited; {stats}"
        # All steps are replayed, those with a prompt too; some of them decode as well.
        assert not stats.eager_steps
        assert set(stats.mixed_steps) == {"fast"} and stats.mixed_steps["fast"] >= mixed.count > 0
        assert stats.graph_steps["fast"] and set(stats.graph_steps) == {"fast"}
        assert compiles.count == 0, compiles.last
        assert max(ahead) == steps_ahead
    assert found[0] == found[1]
