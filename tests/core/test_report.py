"""The report of a fault: bounded, without content, and never before new work has begun."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import msgspec
import pytest
from brain_driver import Driver, limits_of

from holdfast.core import report as report_module
from holdfast.core.report import FaultReports, line_of
from holdfast.proc.control import FRAME_BYTES_MAX


def reports_of(driver: Driver, *, tokens: bool = False) -> FaultReports:
    return FaultReports(driver.brain, tokens=tokens, wall_ns=lambda: 1_700_000_000_000_000_000)


def decoding(*, requests: int = 3, tokens: bool = False) -> tuple[Driver, FaultReports]:
    """Requests in the middle of their answers, two plans in flight."""
    driver = Driver(limits_of())
    reports = reports_of(driver, tokens=tokens)
    for request in range(1, requests + 1):
        driver.submit(request, [10 * request + at for at in range(6)], 20, tenant=f"team-{request}")
    for _ in range(4):
        driver.tick()
    driver.launch()
    return driver, reports


def lose(driver: Driver, reports: FaultReports, *, epoch: int = 2, implicates: bool = True) -> None:
    reports.lost(epoch - 1, "an illegal address", driver.now_s)
    reports.ended("ended by its own fault, code 70", implicates=implicates)
    driver.replace_worker(epoch, implicates=implicates)
    reports.renewed(epoch)


def told(driver: Driver, reports: FaultReports) -> list[dict[str, Any]]:
    """What leaves, having been through the control channel and a file."""
    taken = reports.take(driver.now_s)
    return json.loads(json.dumps(msgspec.msgpack.decode(msgspec.msgpack.encode(taken))))


def test_a_report_names_the_plans_in_flight_their_rows_and_the_suspects() -> None:
    driver, reports = decoding()
    flying = [flight.plan for flight in driver.brain.flights]
    known = {n: len(driver.prompts[n]) + len(driver.tokens[n]) for n in (1, 2, 3)}
    lose(driver, reports)
    driver.tick()
    (report,) = told(driver, reports)
    assert [plan["step"] for plan in report["in_flight"]] == [plan.step for plan in flying]
    assert [len(plan["rows"]) for plan in report["in_flight"]] == [
        plan.rows.size for plan in flying
    ]
    assert report["said"] == "an illegal address"
    assert (report["epoch"], report["next_epoch"], report["hung"]) == (1, 2, False)
    by_id = {int(one["id"], 16): one for one in report["requests"]}
    assert set(by_id) == {1, 2, 3}
    for number, one in by_id.items():
        assert one["in_flight"] and one["tenant"] == f"team-{number}"
        assert one["tokens"] == one["suspected_at"] == known[number]
        assert one["faults_there"] == 1
    # Three rows that decode are the bucket of four; what was answered before took the prompts in.
    assert [plan["graph"] for plan in report["in_flight"]] == ["rows 4", "rows 4"]
    taken = [plan for plan in report["acknowledged"] if plan["query_tokens"] > plan["rows_total"]]
    assert taken and all(plan["graph"] == f"tokens {plan['query_tokens']}" for plan in taken)
    # Decode rows: one plan behind the other, each a token further.
    first, second = (plan["rows"] for plan in report["in_flight"])
    assert [row["from"] + 1 for row in first] == [row["from"] for row in second]
    assert all(row["from"] == known[int(row["request"], 16)] - 1 for row in first), (
        "the token that is known is the one that is computed"
    )


def test_a_report_names_the_owner_of_each_page_that_the_last_plans_wrote() -> None:
    driver, reports = decoding()
    brain, size = driver.brain, driver.limits.page_tokens
    run = brain.scheduler.running
    lose_at = {
        int(flight.ids[at]): (int(row), int(flight.reach[at]) - 1)
        for flight in brain.flights
        for at, row in enumerate(flight.plan.rows)
    }
    written = {
        number: int(run.handles[0, row, position // size]) & 0xFF_FFFF
        for number, (row, position) in lose_at.items()
    }
    lose(driver, reports)
    driver.tick()
    (report,) = told(driver, reports)
    last_step = report["in_flight"][-1]["step"]
    for number, page in written.items():
        (found,) = [one for one in report["pages"] if one["page"] == page]
        assert int(found["request"], 16) == number and last_step in found["steps"]
        assert found["state"] == "WRITING"
    (group,) = report["ledger"]
    states = ("free", "reserved", "writing", "sealed", "loading", "retiring", "quarantined")
    assert sum(group[state] for state in states) + group["trash"] == group["pages"]


def test_nothing_is_told_before_the_next_worker_has_answered() -> None:
    driver, reports = decoding()
    lose(driver, reports)
    assert reports.take(driver.now_s) == []
    driver.launch()
    assert reports.take(driver.now_s) == []
    driver.commit()
    assert len(reports.take(driver.now_s)) == 1
    assert reports.take(driver.now_s) == []


def test_a_report_does_not_wait_for_a_worker_that_never_comes() -> None:
    driver, reports = decoding()
    reports.lost(1, "it is gone", driver.now_s)
    assert reports.take(driver.now_s + report_module.WAIT_S - 0.1) == []
    (report,) = reports.take(driver.now_s + report_module.WAIT_S)
    assert report["next_epoch"] is None and report["ended"] is None


def test_what_is_there_leaves_when_the_core_stops() -> None:
    driver, reports = decoding()
    reports.lost(1, "it is gone", driver.now_s)
    assert len(reports.take(driver.now_s, last=True)) == 1


def test_a_report_holds_no_token_unless_asked() -> None:
    for tokens in (False, True):
        driver, reports = decoding(tokens=tokens)
        lose(driver, reports)
        driver.tick()
        (report,) = told(driver, reports)
        for one in report["requests"]:
            number = int(one["id"], 16)
            if tokens:
                said = driver.prompts[number] + driver.tokens[number]
                assert one["token_ids"] == said[: len(one["token_ids"])]
                assert len(one["token_ids"]) == one["tokens"]
            else:
                assert "token_ids" not in one


def test_who_runs_alone_after_the_second_fault_at_one_position_is_named() -> None:
    driver, reports = decoding(requests=1)
    for epoch in (2, 3):
        lose(driver, reports, epoch=epoch)
        driver.launch()
    driver.run()
    first, second = told(driver, reports)
    assert first["alone"] is None
    assert second["alone"] == first["requests"][0]["id"]
    assert second["requests"][0]["faults_there"] == 2
    assert "runs alone" in line_of(second)


def test_a_worker_killed_from_outside_leaves_a_report_without_suspects() -> None:
    driver, reports = decoding()
    lose(driver, reports, implicates=False)
    driver.tick()
    (report,) = told(driver, reports)
    assert report["implicates"] is False
    assert not any("suspected_at" in one for one in report["requests"])
    assert "suspected" not in line_of(report)


def test_a_report_is_bounded_whatever_is_in_flight() -> None:
    rows, context = 600, 64
    limits = limits_of(
        rows_max=rows,
        pages=rows * 16 + 1,
        prefill_tokens=4096,
        context_tokens=context,
        queue_requests=rows,
        live_tokens=rows * context,
    )
    driver = Driver(limits)
    reports = reports_of(driver, tokens=True)
    for request in range(1, rows + 1):
        prompt = [(request * 31 + at) % 900 for at in range(12)]
        driver.submit(request, prompt, 50, tenant="t" * 64)
    for _ in range(12):
        driver.tick()
    lose(driver, reports)
    driver.tick()
    (report,) = reports.take(driver.now_s)
    assert report["requests_left_out"] == rows - report_module.REQUESTS_TOLD
    assert len(report["pages"]) == report_module.PAGES_TOLD and report["pages_left_out"] > 0
    assert all(len(plan["rows"]) <= report_module.ROWS_TOLD for plan in report["acknowledged"])
    assert len(msgspec.msgpack.encode(report)) < FRAME_BYTES_MAX // 2


def test_workers_that_die_one_after_the_other_leave_the_newest_reports() -> None:
    driver, reports = decoding()
    for epoch in range(2, 2 + report_module.REPORTS_KEPT + 3):
        lose(driver, reports, epoch=epoch, implicates=False)
    driver.tick()
    taken = reports.take(driver.now_s)
    assert len(taken) == report_module.REPORTS_KEPT
    assert taken[-1]["epoch"] == report_module.REPORTS_KEPT + 3
    assert taken[0]["reports_dropped"] == 3


def test_damaged_pages_are_told_once_each_as_the_brain_notes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, _ = decoding()
    noted: deque[dict[str, Any]] = deque(maxlen=3)
    monkeypatch.setattr(type(driver.brain), "page_faults", property(lambda brain: list(noted)))
    reports = FaultReports(driver.brain)
    for first, last in ((1, 1), (2, 4)):
        pages = range(first, last + 1)
        noted.extend(
            {"group": 0, "page": page, "generation": 2, "found": "scrub"} for page in pages
        )
        found = told(driver, reports)
        assert [report["page"] for report in found] == list(pages)
        assert {report["kind"] for report in found} == {"page"}
        assert told(driver, reports) == []
    assert "page 4" in line_of(found[-1])
