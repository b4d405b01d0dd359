"""Row state and graphs on a real GPU: the compiled kernels, real copies, real captures.

The logic is the CPU tests' (tests/device/test_device_rows.py, test_graphs.py); here is what an
interpreter cannot show: that copies and kernels are ordered when the host runs ahead, that nothing
compiles after the warm-up, and that a captured graph reads the step that was uploaded last.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.config import Limits
from holdfast.ops.kernels.compiles import CompileCount
from holdfast.wire.envelope import bucket_of, buckets
from holdfast.wire.staging import Staging

sys.path.insert(0, str(Path(__file__).parents[1] / "device"))
from rowskit import Plans

LIMITS = Limits(
    vocab_size=997,
    context_tokens=200,
    page_tokens=3,
    pages=4000,
    rows_max=33,
    windows=(0, 20),
    prefill_tokens=256,
    bias_entries=5,
    stop_ids=7,
)
ONE_GROUP = Limits(
    vocab_size=997, context_tokens=120, page_tokens=16, pages=600, rows_max=40, prefill_tokens=256
)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("limits", [LIMITS, ONE_GROUP], ids=["windows", "one group"])
def test_over_random_plans_tables_digests_and_staging_are_the_hosts(limits):
    from holdfast.device.device_rows import DeviceRows

    plans, staging = Plans(limits, 1), Staging(limits, 1)
    rows = DeviceRows(limits, CUDA, delta_words=2048)
    rows.warm_up()
    compiles = CompileCount()
    for step in range(150):
        plan = plans.step()
        rows.apply(plan, 1, step)
        assert rows.digest(plan) == plans.judge.digest_full(plan)
        assert np.array_equal(rows.page_table.cpu(), plans.judge.page_table)
        if plan.rows.size and plan.query_lens.max() == 1:
            count = bucket_of(plan.rows.size, buckets(limits.rows_max))
            staged = staging.fill(plan, plans.judge, count)
            rows.stage_bucket(count)
            found = rows.bucket(count)
            assert np.array_equal(found.tokens.cpu(), staged.tokens)
            assert np.array_equal(found.page_table.cpu(), staged.page_table)
        tokens = plans.tokens(plan)
        rows.advance(plan, tokens)
        plans.advance(plan, tokens)
        assert np.array_equal(rows.tokens.cpu(), plans.judge.tokens)
    assert compiles.count == 0, compiles.last


@pytest.mark.parametrize("limits", [LIMITS, ONE_GROUP], ids=["windows", "one group"])
def test_the_host_runs_ahead_and_every_digest_is_right(limits):
    from holdfast.device.device_rows import DeviceRows

    plans, rows = Plans(limits, 9), DeviceRows(limits, CUDA)
    rows.warm_up()
    busy = torch.zeros(4096, 4096, device=CUDA)
    late: list[Any] = []
    for step in range(200):
        plan = plans.step(decode=True)
        # Work before each step, so that copies wait and slots are still in use.
        torch.mm(busy, busy)
        rows.apply(plan, 1, step)
        expected = plans.judge.digest(plan)
        rows.begin_digest(plan)
        tokens = plans.tokens(plan)
        rows.drawn[: plan.rows.size].copy_(torch.from_numpy(tokens).pin_memory(), non_blocking=True)
        rows.finite.fill_(1)
        rows.settle(plan, placed=False)
        plans.advance(plan, tokens)
        late.append((rows.fetch(plan, placed=False), expected, tokens))
        if len(late) == 2:
            fetch, digest, drawn = late.pop(0)
            found = fetch.take()
            assert found[0] == digest and np.array_equal(found[1], drawn)


class Toy:
    """A decoder whose next token is a function of the last one and its position; exact in float32.
    What it has of attention is one write to the pool, at the slots of the step."""

    addresses = ()

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randint(0, 50, (vocab_size, 64), generator=generator).float().to(device)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attention: Any, pool: torch.Tensor
    ) -> torch.Tensor:
        return self.table[tokens] + (positions % 7).float()[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.table.t()

    raw_logits = logits


class NoAttention:
    name, on_device, addresses = "none", True, ()

    def of(self, bucket: Any, plan: Any) -> None:
        return None


class Argmax:
    addresses = ()

    def __call__(self, logits: torch.Tensor, bucket: Any) -> None:
        bucket.finite.copy_(logits.isfinite().all(dim=-1))
        bucket.drawn.copy_(logits.argmax(dim=-1))


class Memory:
    """What a runner needs of DeviceMemory; nothing is sealed or zeroed here."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.zeros(16, device=device)
        self.weights = torch.zeros(16, device=device)

    def begin_seal_sums(self, pages: np.ndarray) -> Any:
        return type("None_", (), {"take": lambda self: np.empty(0, np.uint64)})()

    def zero_pages(self, pages: np.ndarray) -> None:
        assert pages.size <= 1


def test_captured_steps_launched_ahead_give_the_tokens_of_a_host_that_waits():
    from holdfast.device.build import build_runner
    from holdfast.device.runner import Runner

    toy = Toy(ONE_GROUP.vocab_size, CUDA)
    runner = build_runner(
        ONE_GROUP, toy, Memory(CUDA), graphs=toy, attention=NoAttention(), draw=Argmax()
    )
    runner.rows.warm_up()
    runner._graphs.capture()
    compiles = CompileCount()
    host = Toy(ONE_GROUP.vocab_size, torch.device("cpu"))
    judge = Runner(ONE_GROUP, host, Memory(torch.device("cpu")))
    plans = Plans(ONE_GROUP, 4)
    expected, steps = [], []
    for _ in range(300):
        plan = plans.step()
        plan.admits = plan.admits.copy()
        plan.admits["temperature"] = 0
        steps.append(plan)
        expected.append(judge.run(plan))
        plans.advance(plan, expected[-1].tokens)
    found = []
    for plan in steps:
        runner.launch(plan)
        if runner.in_flight == 2:
            found.append(runner.collect())
    found.append(runner.collect())
    for one, other in zip(found, expected, strict=True):
        assert one.digest == other.digest
        assert np.array_equal(one.tokens, other.tokens)
    assert sum(runner.stats.graph_steps.values()) > 50
    assert compiles.count == 0, compiles.last
