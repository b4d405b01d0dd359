"""A lost worker is counted as what its device may call it, and as nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.drill.faults import broke_itself, judge


class Heard:
    """A stage that counted one fault."""

    def __init__(self, device: str, counted: str) -> None:
        self.device = device
        self.counted = counted
        self.failed: list[str] = []

    def judge(self) -> None: ...
    def judge_clocks(self, role: str, **bounds: Any) -> None: ...
    def expect_moved(self, name: str, least: float = 1, **labels: str) -> None: ...
    async def judge_home(self) -> None: ...

    def moved(self, name: str, **labels: str) -> float:
        return float(labels == {"kind": self.counted})

    def expect(self, kind: str, condition: object, text: str) -> None:
        if not condition:
            self.failed.append(text)


@pytest.mark.parametrize(
    ("device", "counted", "right"),
    [
        ("cpu", "worker_crash", True),
        ("cpu", "worker_hang", False),
        ("cuda", "worker_fault", True),
        ("cuda", "worker_hang", True),
        ("cuda", "worker_killed", False),
    ],
)
def test_a_gpus_fault_is_told_by_a_word_or_by_the_steps_deadline(
    device: str, counted: str, right: bool
) -> None:
    stage: Any = Heard(device, counted)
    asyncio.run(judge(stage, 1.0, *broke_itself(stage)))
    assert (not stage.failed) == right
