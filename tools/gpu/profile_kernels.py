"""Where a step's time goes, by kernel: tools/gpu/profile_kernels.py MODEL [MODEL ...].

    PYTHONPATH=. python3 tools/gpu/profile_kernels.py MODEL ... [--batches 1 64] [--tokens 48]
        [--json FILE] [-- OPTION=VALUE ...]

One LLM a model, random weights, the fast path. Traces decode at each batch (context 512) and the
prefill of 16 x 4,096 with torch's profiler: GPU time by kernel, calls, and the *busy share*, GPU
time over the span from the first to the last kernel of the traced steps. The first steps of a
trace are left out of the busy share, where prompts are still computed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from holdfast.llm import LLM, SamplingParams
from holdfast.ops.kernels import dependent

LIMITS = {"rows_max": 256, "prefill_tokens": 8192, "context_tokens": 8192}


def traced(llm: LLM, prompts: list[list[int]], tokens: int, tenant: str) -> list[tuple]:
    """(start us, end us, name) of every GPU activity of one generation."""
    params = [SamplingParams(max_tokens=tokens, temperature=0.6, ignore_eos=True)] * len(prompts)
    llm.generate(prompts, params, tenant=tenant + " warm")
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        llm.generate(prompts, params, tenant=tenant)
        torch.cuda.synchronize()
    found = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(found)


def busy(spans: list[tuple]) -> tuple[float, float]:
    """(us in which some activity ran, us from the first to the last)."""
    total, end = 0.0, spans[0][0]
    for start, stop, _ in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total, end - spans[0][0]


def short(name: str) -> str:
    name = re.sub(r"<.*", "", name.removeprefix("void ")).split("(")[0]
    return name[-60:]


def summed(spans: list[tuple]) -> list[dict]:
    sums, calls = defaultdict(float), defaultdict(int)
    for start, stop, name in spans:
        sums[short(name)] += stop - start
        calls[short(name)] += 1
    return [
        {"kernel": name, "us": us, "calls": calls[name]}
        for name, us in sorted(sums.items(), key=lambda item: -item[1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=16, help="prompts of 4,096 tokens")
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "prof.json")
    parser.add_argument("--kernels", default="triton")
    parser.add_argument("--serial", action="store_true", help="no programmatic dependent launch")
    asked = parser.parse_args()
    found = []
    if asked.serial:
        dependent._capable = lambda device: False
    for model in asked.models:
        with LLM(
            str(model), device="cuda:0", kernels=asked.kernels, graphs=True, load="dummy", **LIMITS
        ) as llm:
            for batch in asked.batches:
                prompts = [[7 + row] * 512 for row in range(batch)]
                spans = traced(llm, prompts, asked.tokens, f"b{batch}")
                # The last two thirds are decode alone.
                first = spans[0][0] + (spans[-1][1] - spans[0][0]) * 0.4
                decode = [span for span in spans if span[0] >= first]
                show(found, f"{model.name} decode {batch}", decode)
            if asked.prefill:
                prompts = [[11 + row, 3] * 2048 for row in range(asked.prefill)]
                show(found, f"{model.name} prefill", traced(llm, prompts, 1, "prefill"))
    asked.json.write_text(json.dumps(found, indent=1))


def show(found: list, name: str, spans: list[tuple]) -> None:
    worked, span = busy(spans)
    kernels = summed(spans)
    found.append({"what": name, "busy": worked / span, "span_us": span, "kernels": kernels})
    print(f"\n{name}: {span / 1e3:.2f} ms, GPU busy {worked / span:.1%}", flush=True)
    for one in kernels[:16]:
        each = one["us"] / one["calls"]
        print(f"  {one['us'] / span:6.1%} {one['calls']:6} x {each:9.2f} us  {one['kernel']}")


if __name__ == "__main__":
    main()
