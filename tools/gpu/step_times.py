"""What a step costs host and device, by its kind: tools/gpu/step_times.py MODEL [MODEL ...].

    PYTHONPATH=. python3 tools/gpu/step_times.py MODEL ... [--requests 1024] [--mixed-tokens 1024
        2048] [--input 512] [--output 256] [--rows 256] [--json FILE]

One LLM a model and bound of a mixed step, random weights, the fast path; more requests than rows,
so that prompts keep coming as in a loaded server. For steps of decode, of both, and of prompts
alone: how long `Runner.launch` kept the host (p50, p99), and how long the step took from its start
on the device, or from its launch where the device waited for that, to its result (`device_ns`). A
launch that takes longer than the step before it leaves the device idle: that share of all steps is
`starved`, and the rate is output tokens a second of the whole run. Steps that no graph was admitted
for are told by their reason.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from holdfast.device.runner import Runner
from holdfast.llm import LLM, SamplingParams
from holdfast.wire.plan import StepPlan, StepResult

LIMITS = {"prefill_tokens": 8192, "context_tokens": 4096}


class Steps:
    """Times of the steps of a runner, while it is entered."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.launch_s: list[float] = []
        self.device_s: list[float] = []
        self._runner: Runner | None = None
        self._eager: dict[str, int] = {}

    def __enter__(self) -> Steps:
        self._launch, self._collect = Runner.launch, Runner.collect
        seen = self

        def launch(runner: Runner, plan: StepPlan) -> None:
            if seen._runner is None:
                seen._runner, seen._eager = runner, dict(runner.stats.eager_steps)
            started_s = time.perf_counter()
            seen._launch(runner, plan)
            seen.launch_s.append(time.perf_counter() - started_s)
            seen.kinds.append(kind_of(plan))

        def collect(runner: Runner) -> StepResult:
            result = seen._collect(runner)
            seen.device_s.append(result.device_ns / 1e9)
            return result

        Runner.launch, Runner.collect = launch, collect
        return self

    def __exit__(self, *_: object) -> None:
        Runner.launch, Runner.collect = self._launch, self._collect

    @property
    def eager(self) -> dict[str, int]:
        """Eager steps by their reason, of the one runner that was seen, since it was entered."""
        now = {} if self._runner is None else self._runner.stats.eager_steps
        moved = {reason: count - self._eager.get(reason, 0) for reason, count in now.items()}
        return {reason: count for reason, count in moved.items() if count}

    def table(self) -> list[dict[str, float | str]]:
        by_kind = defaultdict(list)
        for at, kind in enumerate(self.kinds):
            before_s = self.device_s[at - 1] if at else 0.0
            starved = self.launch_s[at] > before_s
            by_kind[kind].append((self.launch_s[at] * 1e3, self.device_s[at] * 1e3, starved))
        rows = []
        for kind, found in by_kind.items():
            launch, device, starved = (np.array(column) for column in zip(*found, strict=True))
            rows.append(
                {
                    "kind": kind,
                    "steps": len(found),
                    "launch_p50_ms": float(np.percentile(launch, 50)),
                    "launch_p99_ms": float(np.percentile(launch, 99)),
                    "device_p50_ms": float(np.percentile(device, 50)),
                    "device_p99_ms": float(np.percentile(device, 99)),
                    "starved": float(starved.mean()),
                }
            )
        return rows


def kind_of(plan: StepPlan) -> str:
    if plan.rows.size == 0:
        return "none"
    decodes, prompts = bool((plan.query_lens == 1).any()), bool((plan.query_lens > 1).any())
    return "both" if decodes and prompts else "prompts" if prompts else "decode"


def run(model: Path, mixed: int, asked: argparse.Namespace) -> dict:
    rng = np.random.default_rng(7)
    limits = {**LIMITS, "rows_max": asked.rows, "mixed_tokens": mixed}
    params = SamplingParams(max_tokens=asked.output, temperature=0.6, ignore_eos=True)

    def prompts(count: int) -> list[list[int]]:
        return rng.integers(10, 6000, (count, asked.input)).tolist()

    with LLM(str(model), device=asked.device, load=asked.load, **limits) as llm:
        llm.generate(prompts(asked.rows), [params] * asked.rows, tenant="warm")
        work = prompts(asked.requests)
        with Steps() as steps:
            started_s = time.perf_counter()
            llm.generate(work, [params] * asked.requests, tenant="measured")
            seconds = time.perf_counter() - started_s
    rate = asked.requests * asked.output / seconds
    found = {"model": model.name, "mixed_tokens": mixed, "rate": rate, "steps": steps.table()}
    return found | {"input": asked.input, "output": asked.output, "eager": steps.eager}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--mixed-tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--load", default="dummy")
    parser.add_argument(
        "--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "steps.json"
    )
    asked = parser.parse_args()
    found = []
    for model in asked.models:
        for mixed in asked.mixed_tokens:
            found.append(run(model, mixed, asked))
            print(f"\n{model.name}, mixed steps of {mixed}: {found[-1]['rate']:,.0f} tok/s")
            for row in found[-1]["steps"]:
                launch = f"launch {row['launch_p50_ms']:.2f} / {row['launch_p99_ms']:.2f} ms"
                device = f"device {row['device_p50_ms']:.2f} / {row['device_p99_ms']:.2f} ms"
                shown = f"{row['steps']:6} {launch}, {device}, starved {row['starved']:.0%}"
                print(f"  {row['kind']:8}{shown}", flush=True)
            print(f"  eager: {found[-1]['eager'] or 'none'}", flush=True)
    asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
