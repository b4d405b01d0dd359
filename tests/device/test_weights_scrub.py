"""The pace at which weights are read again."""

from __future__ import annotations

import pytest
import torch

from holdfast.device.scrub import PASS_S_MIN, WeightsScrub
from holdfast.ops.checksum import BLOCK_BYTES, slab_sum

SLAB = torch.arange(8 * BLOCK_BYTES // 4, dtype=torch.int32).view(torch.uint8)


def test_slices_are_due_at_the_rate_and_a_pass_gives_the_sum() -> None:
    gbps = BLOCK_BYTES / 1e9  # a block a second
    scrub = WeightsScrub(SLAB, gbps, 100.0)
    assert scrub.due_s(100.0) == pytest.approx(1.0)
    sums = []
    for second in range(1, 9):
        assert scrub.due_s(100.0 + second) == pytest.approx(0.0)
        sums.append(scrub.read(100.0 + second))
        assert scrub.due_s(100.0 + second) == pytest.approx(1.0)
    assert sums == [None] * 7 + [slab_sum(SLAB)]


def test_what_was_missed_is_not_caught_up_on() -> None:
    scrub = WeightsScrub(SLAB, BLOCK_BYTES / 1e9, 0.0)
    scrub.read(500.0)
    assert scrub.due_s(500.0) == pytest.approx(1.0)


def test_small_weights_are_read_once_a_second() -> None:
    scrub = WeightsScrub(SLAB, 1000.0, 0.0)
    now_s = 1.0
    while scrub.read(now_s) is None:
        now_s += scrub.due_s(now_s)
    assert 0 <= scrub.due_s(now_s) <= PASS_S_MIN
    now_s += scrub.due_s(now_s)
    began_s = now_s
    while scrub.read(now_s) is None:
        now_s += scrub.due_s(now_s)
    assert scrub.due_s(now_s) > PASS_S_MIN - 0.1 and now_s - began_s < 0.1
