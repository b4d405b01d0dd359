"""A row a figure: what it says, which row counts, and that the rows of before can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.bench import history, report
from holdfast.bench.machine import environment
from holdfast.bench.report import Figure, PeerFigure
from holdfast.errors import OptionError

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def figure(**changes) -> Figure:
    given = {"bench": "decode", "metric": "step", "unit": "ms", "runs": (3.0, 1.0, 2.0), "batch": 8}
    return Figure(**(given | changes))


def test_a_value_is_the_median_and_every_run_is_kept() -> None:
    row = figure().row({})
    assert (row["value"], row["runs"]) == (2.0, [3.0, 1.0, 2.0])
    assert row["peer"] is row["ratio"] is None


def test_the_ratio_is_our_value_divided_by_the_peers() -> None:
    peer = PeerFigure(name="vllm", version="1", runs=(4.0, 5.0, 3.0), options={"max_num_seqs": 256})
    row = figure(peer=peer).row({})
    assert row["ratio"] == 0.5
    assert row["peer"]["runs"] == [4.0, 5.0, 3.0] and row["peer"]["value"] == 4.0
    assert not figure().more_is_better
    assert figure(unit="tok/s").more_is_better


def test_a_row_has_machine_versions_commit_and_date(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    report.append(path, [figure(), figure(batch=64)], environment())
    rows = report.read(path)
    assert [row["batch"] for row in rows] == [8, 64]
    for row in rows:
        assert {"date", "commit", "machine", "versions"} <= row.keys()
        assert row["machine"]["cores"] and row["versions"]["holdfast"]


def test_of_rows_that_measure_the_same_thing_the_last_counts() -> None:
    rows = [figure(runs=(runs,), batch=batch).row({}) for runs, batch in ((1, 8), (2, 64), (3, 8))]
    assert [(row["batch"], row["value"]) for row in report.newest(rows)] == [(8, 3), (64, 2)]


def test_a_row_without_a_safety_switch_never_stands_for_one_with_it() -> None:
    unsafe = figure(runs=(1.0,), options={report.SAFETY_OFF: ["standby"]})
    assert len(report.newest([figure().row({}), unsafe.row({})])) == 2


def test_loads_of_a_server_under_another_bound_beside_decode_are_another_thing() -> None:
    def load(**options: object) -> dict:
        return {**figure(options=options).row({}), "bench": "serve"}

    rows = [load(mixed_prefill_tokens=1024), load(mixed_tokens=1024), load(mixed_tokens=2048)]
    assert len(report.newest([*rows, *rows, load()])) == 4
    found = [report.mixed_bound(row) for row in (*rows, load())]
    assert found == ["chunk 1,024", "mixed 1,024", "mixed 2,048", ""]
    # What nobody streams has no such bound.
    assert report.mixed_bound(figure(options={"mixed_tokens": 8}).row({})) == ""


def test_the_rows_of_before_are_read_as_figures() -> None:
    rows = history.rows_of(report.read(RESULTS / "cpu.jsonl"))
    assert all(report.is_row(row) for row in rows)
    (offline,) = [row for row in rows if row["bench"] == "offline" and "mixed64" in row["work"]][:1]
    # The README's row of issue 2: 9,854 tokens in 10.183 s, and 2.0 times the best of the peer's.
    assert offline["value"] == pytest.approx(967.7, abs=0.1)
    assert offline["peer"]["options"] == {"cut": "batch 32, sorted"}
    assert offline["ratio"] == pytest.approx(2.018, abs=0.002)
    steps = [row for row in rows if row["metric"] == "brain step p99" and row["batch"] == 256]
    assert {row["work"] for row in steps} == {"context 512", "context 4096", "context 32768"}


@pytest.mark.parametrize("text", ["{", "[]", '{"no": "bench"}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(figure().row({})) + "\n" + text + "\n")
    with pytest.raises(OptionError, match="line 2"):
        report.read(path)


def test_the_table_has_a_line_a_figure_and_the_peer_beside_it() -> None:
    text = report.show([figure(peer=PeerFigure(name="vllm", version="1", runs=(4.0,)), floor=1.5)])
    line = text.splitlines()[1]
    assert "decode, batch 8, step" in line
    assert line.split()[-4:] == ["vllm", "4", "0.50", "1.5"]
