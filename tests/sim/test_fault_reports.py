"""Reports of faults in simulated worlds: whatever state a brain is lost in, it can be told of."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from holdfast.core.brain import Brain
from holdfast.core.report import FORMAT, FaultReports, line_of
from holdfast.proc.control import FRAME_BYTES_MAX
from holdfast.sim.simulator import simulate
from holdfast.sim.world import PROFILES, draw

SEEDS = 25


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "calm"])
def test_every_lost_worker_leaves_a_report_that_agrees_with_its_ledger(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    renew = Brain.new_epoch

    def new_epoch(brain: Brain, epoch: int, now_s: float, **options: Any) -> None:
        reports = FaultReports(brain, wall_ns=lambda: 0)
        reports.lost(brain.epoch, "of the world", now_s)
        flying = {number for flight in brain.flights for number in flight.ids.tolist()}
        renew(brain, epoch, now_s, **options)
        reports.renewed(epoch)
        (report,) = reports.take(now_s, last=True)
        packed = msgspec.msgpack.encode(report)
        assert len(packed) < FRAME_BYTES_MAX
        told.append(json.loads(json.dumps(msgspec.msgpack.decode(packed))))
        named = {int(one["id"], 16) for one in report["requests"] if one["in_flight"]}
        assert named == flying
        for group in report["ledger"]:
            states = [group[name] for name in group if name not in ("group", "pages", "available")]
            assert sum(states) == group["pages"]
        owners: dict[tuple[int, int], str] = {}
        for page in report["pages"]:
            assert page["page"] != 0 and page["state"] not in ("FREE", "TRASH")
            key = (page["group"], page["page"])
            assert owners.setdefault(key, page["request"]) == page["request"]

    monkeypatch.setattr(Brain, "new_epoch", new_epoch)
    for seed in range(SEEDS):
        simulate(draw(seed, profile))
    assert any(report["in_flight"] for report in told), "no world lost a busy worker"
    assert any(report["pages"] for report in told)
    assert {report["format"] for report in told} == {FORMAT}
    assert all(line_of(report).startswith("epoch ") for report in told)
