"""What of a decode step keeps the worker's host: tools/gpu/launch_times.py MODEL [MODEL ...].

    PYTHONPATH=. python3 tools/gpu/launch_times.py MODEL ... [--rows 1 8 64 256] [--tokens 200]
        [--json FILE]

One LLM a model, random weights, the fast path, prompts of uneven lengths. Microseconds of
`Runner.launch` in steps of so many decoding rows, p50 and p99, and of its parts: who calls whom is
shown by the indent. What is measured costs a microsecond itself, so the parts are some too long.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.device import device_rows
from holdfast.device.device_rows import DeviceRows
from holdfast.device.graphs import StepGraphs
from holdfast.device.memory import DeviceMemory
from holdfast.device.runner import Runner
from holdfast.llm import LLM, SamplingParams
from holdfast.wire.plan import StepPlan

LIMITS = {"prefill_tokens": 8192, "context_tokens": 4096}
# Of a step, in the order in which they are called.
PARTS = (
    (0, "apply", DeviceRows, "apply"),
    (1, "check deltas", device_rows, "check_deltas"),
    (1, "check rows", device_rows, "check_rows"),
    (0, "digest", DeviceRows, "begin_digest"),
    (0, "seals", DeviceMemory, "begin_seal_sums"),
    (0, "forward", Runner, "_forward"),
    (1, "graphs", StepGraphs, "run"),
    (2, "body", None, "_bodies"),
    (2, "tail", None, "_tails"),
    (0, "fetch", DeviceRows, "fetch"),
)


class Clock:
    """Microseconds of every part, by the step in which it was called, while it is entered."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.took: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._own: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Clock:
        for _, name, holder, attribute in PARTS:
            if holder is not None:
                self._wrap(holder, attribute, name)
        own, seen = Runner.launch, set[int]()

        def launch(runner: Runner, plan: StepPlan) -> None:
            if id(runner) not in seen:
                seen.add(id(runner))
                self._wrap_graphs(runner)
            self.rows.append(plan.rows.size if (plan.query_lens == 1).all() else 0)
            self._timed("launch", own)(runner, plan)

        self._own.append((Runner, "launch", own))
        Runner.launch = launch
        return self

    def __exit__(self, *_: object) -> None:
        for holder, attribute, own in reversed(self._own):
            setattr(holder, attribute, own)

    def of(self, name: str, rows: int) -> np.ndarray:
        """float64[k] of the steps of so many decoding rows."""
        return np.array([us for at, us in self.took[name] if self.rows[at] == rows])

    def _wrap(self, holder: Any, attribute: str, name: str) -> None:
        own = getattr(holder, attribute)
        self._own.append((holder, attribute, own))
        setattr(holder, attribute, self._timed(name, own))

    def _wrap_graphs(self, runner: Runner) -> None:
        for _, name, holder, attribute in PARTS:
            if holder is None and runner._graphs is not None:
                replays = getattr(runner._graphs, attribute)
                for bucket, replay in list(replays.items()):
                    replays[bucket] = self._timed(name, replay)

    def _timed(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            started_ns = time.perf_counter_ns()
            try:
                return own(*args, **named)
            finally:
                took_us = (time.perf_counter_ns() - started_ns) / 1e3
                self.took[name].append((len(self.rows) - 1, took_us))

        return timed


def run(model: Path, asked: argparse.Namespace) -> list[dict]:
    rng, found = np.random.default_rng(3), []
    with Clock() as clock, LLM(str(model), device=asked.device, load="dummy", **LIMITS) as llm:
        for rows in asked.rows:
            for turn in ("warm", "measured"):
                clock.rows.clear()
                clock.took.clear()
                prompts = [
                    rng.integers(10, 6000, length).tolist()
                    for length in rng.integers(400, 600, rows)
                ]
                params = SamplingParams(max_tokens=asked.tokens, temperature=0.6, ignore_eos=True)
                llm.generate(prompts, [params] * rows, tenant=f"{rows} {turn}")
            launch = clock.of("launch", rows)
            print(f"\n{model.name}, {rows} rows, {launch.size} steps: launch {shown(launch)} us")
            parts = {}
            for depth, name, _, _ in PARTS:
                each = clock.of(name, rows)
                print(f"  {'  ' * depth}{name:14}{shown(each)}", flush=True)
                parts[name] = percentiles(each)
            found.append({"model": model.name, "rows": rows, "launch": percentiles(launch)})
            found[-1]["parts"] = parts
    return found


def percentiles(each: np.ndarray) -> list[float]:
    return [float(np.percentile(each, at)) if each.size else 0.0 for at in (50, 99)]


def shown(each: np.ndarray) -> str:
    p50, p99 = percentiles(each)
    return f"p50 {p50:.0f} p99 {p99:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--device", default="cuda:0")
    out = Path(os.environ.get("OUT", ".")) / "launch_times.json"
    parser.add_argument("--json", type=Path, default=out)
    asked = parser.parse_args()
    found = [row for model in asked.models for row in run(model, asked)]
    asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
