"""What drills of graphs break: each is noticed as it shall be, and is not where that is planted.

The same scenes twice: over host rows and the reference, and over rows in device memory and kernels,
which Triton's interpreter runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from devicekit import VOCAB, Hand, Request

from holdfast.config import Limits
from holdfast.device.build import build_engine
from holdfast.device.memory import DeviceMemory
from holdfast.device.provoke import Provocations
from holdfast.device.runner import Runner
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout, load_weights
from holdfast.ops import kernels

LIMITS = Limits(
    vocab_size=VOCAB,
    context_tokens=15,
    page_tokens=3,
    pages=40,
    rows_max=4,
    prefill_tokens=64,
    live_tokens=1 << 12,
)
ROWS = (1, 2, 3)


def engine(folder: Path, kernels: str, *, graphs: bool) -> Runner:
    spec = ModelSpec.load(folder)
    memory = DeviceMemory.allocate(spec, LIMITS)
    layout = WeightsLayout.of(spec, "float32")
    load_weights(spec, memory.weights, layout)
    views = layout.views(memory.weights)
    runner = build_engine(spec, LIMITS, views, memory, kernels=kernels, graphs=graphs)
    runner.warm_up()
    return runner


class Provoked:
    """A runner with provocations around each step, as proc.worker has them."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.limits = runner, runner.limits
        self.said: list[dict[str, Any]] = []
        self.provocations = Provocations("cpu", self.said.append)

    @property
    def epoch(self) -> int:
        return self.runner.epoch

    def arm(self, kind: str, phase: str = "any") -> None:
        self.provocations.take({"type": "provoke", "kind": kind, "phase": phase})

    def run(self, plan: Any) -> Any:
        self.provocations.before(self.runner, plan)
        result = self.runner.run(plan)
        self.provocations.after(self.runner, plan)
        return result


class Scene:
    """Three rows behind their prompts, in an epoch of their own, on a runner with graphs and on one
    without."""

    def __init__(self, provoked: Provoked, clean: Runner) -> None:
        self.provoked = provoked
        self._before = self._counts()
        self.hands = Hand(provoked), Hand(clean)
        for runner in (provoked.runner, clean):
            runner.reset(runner.epoch + 1)
        for hand in self.hands:
            for row in ROWS:
                fields = {"temperature": 0.8 * (row % 2), "seed": row}
                request = Request([(7 * row + at) % VOCAB for at in range(2 + row)], fields=fields)
                hand.admit(row, request, hand.fresh_pages(15))
            hand.run([(row, 2 + row, 1) for row in ROWS])

    def decode(self, steps: int, rows: tuple[int, ...] = ROWS) -> bool:
        """Whether all tokens are right."""
        right = True
        for _ in range(steps):
            ours, theirs = (hand.run([(row, 1, 1) for row in rows]) for hand in self.hands)
            right &= ours.tokens.tolist() == theirs.tokens.tolist()
        return right

    def one_by_hand(self) -> tuple[bool, bool]:
        """A step: whether its digest is right, and its tokens."""
        hand, clean = self.hands
        plan = hand.plan([(row, 1, 1) for row in ROWS])
        result, right = self.provoked.run(plan), clean.run([(row, 1, 1) for row in ROWS])
        return result.digest == right.digest, result.tokens.tolist() == right.tokens.tolist()

    def steps(self) -> dict[str, int]:
        """By what became of them, since the scene began."""
        steps = {name: count - self._before.get(name, 0) for name, count in self._counts().items()}
        return {name: count for name, count in steps.items() if count}

    def _counts(self) -> dict[str, int]:
        stats = self.provoked.runner.stats
        replayed, mixed = (sum(d.values()) for d in (stats.graph_steps, stats.mixed_steps))
        return {**stats.eager_steps, "replayed": replayed, "mixed": mixed}


def scenes(folder: Path, kernels: str) -> dict[str, Any]:
    """Every scene, as JSON has it."""
    found: dict[str, Any] = {}
    provoked = Provoked(engine(folder, kernels, graphs=True))
    clean = engine(folder, "reference", graphs=False)
    # First: later ones find pages that were written.
    scene = Scene(provoked, clean)
    provoked.arm("canary")
    right = [scene.decode(2), scene.decode(1, (2,)), scene.decode(1)]
    said = provoked.said[:]
    provoked.arm("mend-graphs")
    right.append(scene.decode(1))
    provoked.arm("canary")
    provoked.arm("stray-store", "decode")
    right.append(scene.decode(1))
    stray = provoked.said[-1]["stray"]
    provoked.arm("stray-store", "decode")
    # In a step that is not looked at: the next one that is tells it.
    right += [scene.decode(1), scene.decode(1, (3, 1))]
    stray += provoked.said[-1]["stray"]
    found["canary"] = {"right": right, "said": said, "stray": stray}
    for kind in ("move-buffer", "move-buffer-unseen", "narrow-envelope"):
        scene = Scene(provoked, clean)
        provoked.arm("mend-graphs")
        right = [scene.decode(2)]
        provoked.arm(kind)
        right.append(scene.decode(2 if kind.startswith("move") else 6))
        before = scene.steps()
        provoked.arm("mend-graphs")
        right.append(scene.decode(1))
        found[kind] = {"right": right, "before": before, "after": scene.steps()}
    for kind in ("stale-rows", "stale-rows-unseen"):
        scene = Scene(provoked, clean)
        scene.decode(1)
        provoked.arm(kind, "decode")
        found[kind] = scene.one_by_hand()
    return found


@pytest.fixture(scope="module", params=["reference", "triton"])
def found(request: pytest.FixtureRequest, checkpoint) -> dict[str, Any]:
    folder, _ = checkpoint
    if request.param == "reference":
        return json.loads(json.dumps(scenes(folder, "reference")))
    if not kernels.available():
        pytest.skip("triton is not installed")
    call = f"import json, test_provoke_graphs as t; print(json.dumps(t.scenes({str(folder)!r}, "
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call + "'triton')))"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"kernels": "triton"}


def test_moved_buffers_are_computed_eagerly_and_replayed_where_they_were_put_back(found) -> None:
    scene = found["move-buffer"]
    assert scene["right"] == [True] * 3
    assert scene["before"] == {"mixed": 1, "address_moved": 2, "replayed": 2}
    assert scene["after"] == {"mixed": 1, "address_moved": 2, "replayed": 3}


def test_a_manifest_that_moves_along_has_the_old_buffers_replayed(found) -> None:
    scene = found["move-buffer-unseen"]
    assert scene["before"] == {"mixed": 1, "replayed": 4}
    # Rows in device memory are staged by the replay itself, into where it reads.
    assert scene["right"][1] == (found.get("kernels") == "triton")


def test_an_envelope_that_is_a_page_too_short_is_counted_at_its_end(found) -> None:
    scene = found["narrow-envelope"]
    assert scene["right"] == [True] * 3
    # The longest row sees 6 tokens in its first step and 13 in its eighth; 12 have room.
    assert scene["before"] == {"mixed": 1, "context_too_long": 1, "replayed": 7}
    assert scene["after"]["replayed"] == 8


def test_row_state_of_one_step_before_is_another_digest(found) -> None:
    digest, tokens = found["stale-rows"]
    assert not digest and not tokens
    digest, tokens = found["stale-rows-unseen"]
    assert digest and not tokens


def test_a_canary_stays_in_every_page_that_a_step_does_not_write(found) -> None:
    scene = found["canary"]
    assert all(scene["right"])
    watched = [each for each in scene["said"] if each["kind"] == "canary-step"]
    assert [each["rows"] for each in watched] == [3, 1], "each number of rows once"
    # All but the trash page and five of each row.
    assert all(each["free"] == 40 - 1 - 15 and each["stray"] == [] for each in watched)
    assert scene["stray"] == [39, 38]
