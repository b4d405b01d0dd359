"""proc.graph_steps: a worker's word becomes counters, and a lost fast path is told once."""

from __future__ import annotations

import pytest

from holdfast.core.metrics import EAGER, Metrics
from holdfast.proc.graph_steps import GraphSteps
from holdfast.wire.envelope import Refusal


def test_steps_are_counted_by_sampler_and_by_reason():
    metrics = Metrics.private()
    steps = GraphSteps(metrics)
    steps.told({"graph": {"fast": 3, "general": 1}, "mixed": {}, "eager": {"prefill": 2}})
    eager = {"prefill": 1, "address_moved": 5}
    steps.told({"graph": {"fast": 4}, "mixed": {"fast": 2, "general": 9}, "eager": eager})
    assert metrics.get("graph_steps_total", ("decode", "fast")) == 7
    assert metrics.get("graph_steps_total", ("decode", "general")) == 1
    assert metrics.get("graph_steps_total", ("mixed", "fast")) == 2
    assert metrics.get("graph_steps_total", ("mixed", "general")) == 9
    assert metrics.get("eager_steps_total", ("prefill",)) == 3
    assert metrics.get("eager_steps_total", ("address_moved",)) == 5


def test_every_reason_of_admission_has_a_counter_of_its_own():
    metrics = Metrics.private()
    for reason in Refusal:
        GraphSteps(metrics).told({"graph": {}, "mixed": {}, "eager": {reason.value: 1}})
        assert metrics.get("eager_steps_total", (reason.value,)) == 1
    assert set(EAGER) == {reason.value for reason in Refusal}


def test_a_reason_that_is_no_part_of_serving_is_told_the_first_time_only():
    steps = GraphSteps(Metrics.private())
    ordinary = {"prefill": 1, "mixed_query_lens": 1, "too_many_tokens": 2}
    assert steps.told({"graph": {}, "mixed": {}, "eager": ordinary}) == []
    (notice,) = steps.told({"graph": {}, "mixed": {}, "eager": {"address_moved": 1}})
    assert notice.kind == "warning" and "address_moved" in notice.message
    assert steps.told({"graph": {}, "mixed": {}, "eager": {"address_moved": 9}}) == []


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"graph": {}, "eager": {}},
        {"graph": {}, "mixed": {}, "eager": 3},
        {"graph": "ab", "mixed": {}, "eager": {}},
    ],
)
def test_nonsense_is_an_error_that_the_supervisor_takes_for_a_broken_worker(message):
    with pytest.raises((LookupError, TypeError, ValueError)):
        GraphSteps(Metrics.private()).told(message)
