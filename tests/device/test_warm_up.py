"""device.warm_up: the rows that load a GPU's kernels take every road through the sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devicekit import LIMITS

from holdfast.device import warm_up
from holdfast.ops import sampler
from holdfast.ops.sampler import Sampler


def test_warm_up_rows_take_every_road_through_the_sampler(monkeypatch):
    taken = []
    for owner, name in (
        (Sampler, "_edit"),
        (Sampler, "_draw_any"),
        (Sampler, "_draw_filtered"),
        (sampler._Filtered, "draw"),
    ):
        inner = getattr(owner, name)

        def told(*arguments, _inner=inner, _name=name, **named):
            taken.append(_name)
            return _inner(*arguments, **named)

        monkeypatch.setattr(owner, name, told)
    logits = torch.zeros(warm_up.ROWS, 50)
    draws = Sampler(50).sample(logits, warm_up.sampler_inputs(), warm_up.TOP_COUNT)
    assert set(taken) == {"_edit", "_draw_any", "_draw_filtered", "draw"}
    assert draws.finite.all() and draws.top_ids.shape == (1, warm_up.TOP_COUNT)
    assert draws.tokens[3] != 1, "a stop id is forbidden in its row"


@pytest.mark.parametrize("rows_max", [1, 2, 6, 64])
def test_a_gpu_is_warmed_up_by_every_kind_of_step_with_few_rows_and_with_all(rows_max):
    limits = replace(LIMITS, rows_max=rows_max)
    shapes = [tuple(shape.tolist()) for shape in warm_up.step_shapes(limits, on_gpu=True)]
    chunk = (limits.page_tokens,)
    some = {(1,), chunk, (limits.prefill_tokens,), (1,) * rows_max, (1,) * (rows_max - 1) + chunk}
    assert some <= set(shapes) and len(set(shapes)) == len(shapes)
    if rows_max > 1:
        assert {(1, 1), (1, *chunk)} <= set(shapes)
    assert max(map(len, shapes)) == rows_max
    assert len(warm_up.step_shapes(limits, on_gpu=False)) == 2
