"""A warm-up rehearses a few layers and takes every kernel; what serves afterwards has them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from devicekit import LIMITS, Hand, Request

from holdfast.device.build import build_engine
from holdfast.device.memory import DeviceMemory
from holdfast.model.decoder import Decoder, Layer
from holdfast.model.weights import WeightsLayout
from holdfast.ops.attention import AttentionBatch

LAYERS = 4


class Recorded:
    """Stands for CudaCapture: what is captured does not run before it is replayed."""

    bakes = False

    def capture(self, work, rehearsal=None):
        (rehearsal or work)()
        return work


@pytest.fixture
def deep(spec):
    return replace(spec, layers=LAYERS)


@pytest.fixture
def memory(deep) -> DeviceMemory:
    made = DeviceMemory.allocate(deep, LIMITS)
    made.weights.view(torch.float32).normal_(std=0.05)
    return made


@pytest.mark.parametrize("graphs", [False, True])
def test_a_warm_up_rehearses_two_layers_and_a_step_has_them_all(deep, memory, monkeypatch, graphs):
    ran: list[int] = []
    before = Layer.before

    def told(layer: Layer, *given: Any) -> torch.Tensor:
        ran.append(layer.index)
        return before(layer, *given)

    monkeypatch.setattr(Layer, "before", told)
    views = WeightsLayout.of(deep, "float32").views(memory.weights)
    runner = build_engine(deep, LIMITS, views, memory, graphs=graphs)
    if graphs:
        runner._graphs._capture = Recorded()
    runner.warm_up()
    assert set(ran) == {0, 1}
    ran.clear()
    hand = Hand(runner)
    hand.admit(1, Request([5, 6, 7]), hand.fresh_pages(20))
    for count in (3, 1):
        hand.run([(1, count, 1)])
    assert ran == [*range(LAYERS)] * 2
    assert sum(runner.stats.graph_steps.values()) == graphs


def test_a_rehearsal_takes_every_piece_that_its_decoder_takes(deep, memory):
    """Each by its name, the kinds and shapes of what it is given, and the memory it goes to."""
    decoder = Decoder(deep, WeightsLayout.of(deep, "float32").views(memory.weights))
    short, ops = decoder.rehearsal(), decoder.ops
    assert short.ops is ops and len(decoder.layers) == LAYERS
    taken: set[tuple] = set()

    class Told:
        def __getattr__(self, name: str) -> Any:
            inner = getattr(ops, name)
            if not callable(inner):
                return inner

            def call(*given: Any, **named: Any) -> Any:
                taken.add((name, *map(_kind, given), *named))
                return inner(*given, **named)

            return call

    found = []
    for each in (decoder, short):
        each.ops = Told()
        taken.clear()
        attention = AttentionBatch.build(
            query_lens=np.array([3], np.int32),
            starts=np.zeros(1, np.int32),
            page_table=np.zeros((1, 1), np.int32),
            page_tokens=LIMITS.page_tokens,
            device=memory.pool.device,
        )
        ids, positions = torch.zeros(3, dtype=torch.int64), torch.arange(3)
        each.logits(each.forward(ids, positions, attention, memory.pool))
        found.append(set(taken))
    assert found[0] == found[1]
    assert {name for name, *_ in found[0]} >= {"begin", "add_norm", "linear", "attend", "gated"}


def _kind(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.dtype, tuple(given.shape), given.data_ptr() & 15
    return given if isinstance(given, str) else type(given)
