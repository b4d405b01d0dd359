"""The whole fast path without a GPU: kernels, row state on the device and graphs, interpreted.

Every kernel, `DeviceRows`, static buckets and the manifest are those of a GPU; a replay is the
captured function run again. In a process of its own: whether a kernel is interpreted is decided
where its module is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_model import bare_model
from interpreted import MARKS

pytestmark = MARKS

# Prompts of less than a page, of pages and one more token, shared beginnings; plain draws and such
# as need the general sampler; requests that end while others go on.
SCRIPT = """
import json, sys
from holdfast import LLM, SamplingParams
from holdfast.device import build
from holdfast.gpu_work import mixed_buffer_bytes
from holdfast.ops import pinned
from holdfast.ops.sampler import plain_rows
from mixed_steps import MixedSteps
made, build_engine, in_flight, needed = [], build.build_engine, [], []
mixed = MixedSteps()
def watched(*arguments, **named):
    runner = build_engine(*arguments, **named)
    launch = runner.launch
    def told(plan):
        mixed.see(plan)
        launch(plan)
        in_flight.append(runner.in_flight)
    runner.launch = told
    sample = runner._sampler.sample
    def general(logits, inputs, *more):
        needed.append(not plain_rows(inputs, logits.shape[1]).all())
        return sample(logits, inputs, *more)
    runner._sampler.sample = general
    made.append(runner)
    return runner
build.build_engine = watched
folder, options = sys.argv[1], json.loads(sys.argv[2])
if options.pop("staged", False):  # Through slots, as on a GPU; they are pinned only there.
    make = pinned.Uploads.__init__
    def staged(self, device, words=0):
        make(self, device, words, pinned.Ring(device, 1))
    pinned.Uploads.__init__ = staged
params = [
    SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=14, temperature=0.9, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.7, top_p=0.8, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, ignore_eos=True),
]
shared = list(range(40, 49))
prompts = [[3], shared, [*shared, 99], [5, 6, 7, 8], [9] * 17, [250, 2]]
found = []
with LLM(folder, load="dummy", threads=1, rows_max=5, pages=60, page_tokens=4,
         prefill_tokens=12, **options) as llm:
    for some in (slice(0, 3), slice(0, 6)):
        for result in llm.generate(prompts[some], params[some]):
            choice = result.choices[0]
            logprobs = [round(one.logprob, 3) for one in choice.logprobs or ()]
            found.append([choice.token_ids, choice.finish_reason, logprobs])
        assert made[0].in_flight == 0, "who has all answers left a step behind"
stats = made[0].stats
whole = made[0]._graphs and made[0]._graphs._mixed
static = []
if whole is not None:
    scratch = whole._decoder.ops.scratch._buffers.values()
    counted = mixed_buffer_bytes(whole._decoder.spec, made[0].limits, 4)
    buffers = sum(held.nbytes for held in (whole._hidden, *scratch)) + whole._layout.nbytes
    static = [buffers, counted]
flights = [in_flight.count(1), in_flight.count(2)]
print(json.dumps({"found": found, "flights": flights, "graphs": stats.graph_steps,
                  "mixed_steps": stats.mixed_steps, "static": static,
                  "eager": stats.eager_steps, "needed": needed, "mixed": mixed.count}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # More than one head of each kind, and float32, so that two ways agree.
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return bare_model(tmp_path, torch_dtype="float32", **shape)


def answers(folder: Path, **options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), json.dumps(options)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_and_graphs_say_what_the_reference_says(folder: Path) -> None:
    expected = answers(folder)
    assert expected["graphs"] == {}
    found = answers(folder, kernels="triton", graphs=True, staged=True)
    assert found["found"] == expected["found"]
    # Steps were replayed with both samplers behind them, those with prompts too, and no
    # step ran without.
    assert found["graphs"]["fast"] > 5 and found["graphs"]["general"] > 3
    assert found["mixed_steps"]["fast"] > 1 and found["mixed_steps"]["general"] > 0
    assert sum(found["mixed_steps"].values()) >= found["mixed"] > 0
    assert found["eager"] == {}
    # What plan counts for steps with prompts is what they have; of tiles it knows a bound.
    made, counted = found["static"]
    assert 0.95 * counted < made <= counted
    # Nearly every plan was launched before the result of the one before was collected.
    alone, ahead = found["flights"]
    assert ahead > 4 * alone > 0
    # Nobody who is ahead waits for the general sampler (which does wait) without a need.
    assert found["needed"] and all(found["needed"])
    assert not all(expected["needed"])


def test_kernels_without_graphs_say_what_the_reference_says(folder: Path) -> None:
    expected, found = answers(folder), answers(folder, kernels="triton")
    assert found["found"] == expected["found"]
    assert found["graphs"] == found["eager"] == found["mixed_steps"] == {}
    assert found["flights"][1] == 0, "rows on the host: a second plan has nothing to run beside"


def test_launching_ahead_can_be_switched_off(folder: Path) -> None:
    found = answers(folder, kernels="triton", graphs=True, steps_ahead=1)
    assert found["graphs"]["fast"] > 5 and found["flights"][1] == 0
