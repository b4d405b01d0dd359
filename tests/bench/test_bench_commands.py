"""Each command as a shell runs it, on a tiny model without a tokenizer, beside a fake peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bare_model import bare_model

from holdfast.bench import null, process, report, serve
from holdfast.cli.options import EngineOptions, Load, arguments

FAKES = Path(__file__).parent / "fakes"
SMALL = ("--load", "dummy", "--threads", "1", "--max-rows", "4", "--kv-pages", "80")
PEER = ("--peer", "vllm", "--peer-path", str(FAKES), "--peer-repeats", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_model(tmp_path_factory.mktemp("tiny-shape"))


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast", "bench", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_decode_runs_ours_then_the_peer_on_the_same_work(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    sizes = ("--batch", "1,2", "--context", 8, "--steps", 4, "--repeats", 2)
    done = bench("decode", folder, *SMALL, *PEER, *sizes, "--json", rows)
    assert done.returncode == 0, done.stderr
    found = {row["batch"]: row for row in report.read(rows)}
    assert found.keys() == {1, 2}
    for row in found.values():
        assert len(row["runs"]) == 2 and len(row["peer"]["runs"]) == 1
        assert row["peer"]["version"] == "0.0.fake"
        assert row["ratio"] == pytest.approx(row["value"] / row["peer"]["value"], abs=1e-3)
        assert row["model"] == folder.name and row["options"]["load"] == "dummy"
        # A CPU answers before the next plan, so nothing is launched ahead there.
        assert row["options"]["steps_ahead"] == 1
    assert "vllm" in done.stdout and "ratio" in done.stdout


def test_serve_loads_our_server_and_the_peers_with_the_same_client(
    folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    load = ("--concurrency", "2", "--input", 12, "--output", 6, "--prompts-per", 2)
    server = ("--server-options", "--standby none --steps-ahead 1")
    done = bench("serve", folder, *SMALL, *PEER, "--repeats", 1, *load, *server, "--json", rows)
    assert done.returncode == 0, done.stderr
    found = {row["metric"]: row for row in report.read(rows)}
    assert set(found) == {*(metric for metric, _, _ in serve.METRICS), serve.MERGED[0]}
    for row in found.values():
        assert row["concurrency"] == 2 and row["peer"]["name"] == "vllm"
        # What a row without a safety switch must say.
        assert row["options"]["safety_off"] == ["standby"]
        assert row["options"]["standby"] == "none"
        assert row["options"]["steps_ahead"] == 1
    assert found["tokens an event"]["value"] == pytest.approx(1, abs=0.5)
    assert found["TTFT p99"]["value"] > 0


def test_serve_begins_when_the_standby_is_warm_and_says_so(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    load = ("--concurrency", "1", "--input", 4, "--output", 2, "--prompts-per", 1)
    done = bench("serve", folder, *SMALL, "--repeats", 1, *load, "--json", rows)
    assert done.returncode == 0, done.stderr
    assert {row["options"]["standby"] for row in report.read(rows)} == {"warm"}


def test_a_standby_that_does_not_get_warm_is_waited_for_no_longer_than_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_STANDBY_POLL_S", 0.001)
    started = process.Started("http://127.0.0.1:1", 1.0, 4_000_000)
    for words, said in (
        ([], "not warm"),
        (["--standby", "none"], "none"),
        (["--standby=warm", "--standby=cold"], "cold"),
    ):
        server = process.our_server(words, timeout_s=1.0)
        assert server.await_standby(started, seconds=0.01) == said


def test_what_we_measured_is_kept_when_the_peer_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    rows = tmp_path / "rows.jsonl"
    done = bench("prefill", folder, *SMALL, *PEER, "--tokens", 9, "--repeats", 1, "--json", rows)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "illegal memory access" in line
    (row,) = report.read(rows)
    assert row["metric"] == "prompt rate" and row["value"] > 0 and row["peer"] is None


def test_start_counts_a_cold_and_a_second_start_of_each_engine(
    folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    options = (*SMALL, *PEER, "--repeats", 1, "--server-options", "--standby none")
    done = bench("start", folder, *options, "--json", rows)
    assert done.returncode == 0, done.stderr
    found = {row["metric"]: row for row in report.read(rows)}
    assert set(found) == {"cold start", "second start"}
    for row in found.values():
        assert row["value"] > 0.1 and row["peer"]["value"] > 0.01 and row["unit"] == "s"


def test_a_server_that_cannot_start_is_told_in_its_own_words(folder: Path) -> None:
    done = bench("start", folder, *SMALL, "--repeats", 1, "--server-options", "--standby never")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--standby" in line and "never" in line and "code 2" in line


def test_the_null_core_ends_requests_where_they_ask_for_it() -> None:
    with null.rig(1) as running:
        load = serve.Load(3000, (8,), input_tokens=5, output_tokens=7, prompts_per=2)
        url = f"http://{null.HOST}:{running.port}"
        name = running.options.served_name
        answers: serve.Answers = {}
        serve.measure(url, name, load, lambda *_: None, answers, who="null", repeats=1)
    assert answers[8][0]["output_tokens"] == 16 * 7
    assert answers[8][0]["requests"] == 16


def test_a_child_process_is_told_the_options_that_differ_from_their_defaults() -> None:
    assert arguments(EngineOptions()) == []
    engine = EngineOptions(load=Load.DUMMY, max_rows=7, gpu_memory_utilization=0.5)
    words = ["--load", "dummy", "--gpu-memory-utilization", "0.5", "--max-rows", "7"]
    assert arguments(engine) == words
