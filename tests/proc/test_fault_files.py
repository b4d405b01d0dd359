"""Reports of faults on disk: whole, few, private, and in nobody's way."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest
from conftest import until

from holdfast.config import Limits
from holdfast.core.clocks import MARGIN_S
from holdfast.errors import OptionError
from holdfast.proc.coredump import WRITING_S, coredump_environment
from holdfast.proc.fault_files import QUEUE_MAX, FaultFiles, reports_in
from holdfast.proc.options import ServeOptions


def report(epoch: int) -> dict[str, object]:
    return {"format": "x", "epoch": epoch, "time_ns": 1_700_000_000_000_000_000 + epoch}


def test_reports_appear_whole_and_readable_by_their_owner_alone(tmp_path: Path) -> None:
    warnings: list[str] = []
    files = FaultFiles(tmp_path / "faults", warn=warnings.append)
    files.start()
    path = files.put(report(3))
    files.close()
    assert path is not None and json.loads(path.read_text())["epoch"] == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert reports_in(path.parent) == [path] == list(path.parent.iterdir())
    assert not warnings


def test_only_the_newest_reports_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    files = FaultFiles(tmp_path, warn=print, files=3)
    files.start()
    for epoch in range(1, 8):
        assert files.put(report(epoch)) is not None
        until("written", lambda epoch=epoch: files.written == epoch)
    files.close()
    assert [json.loads(p.read_text())["epoch"] for p in reports_in(tmp_path)] == [5, 6, 7]
    assert (tmp_path / "notes.txt").exists()


def test_a_disk_that_fails_costs_its_reports_and_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    folder = tmp_path / "faults"
    files = FaultFiles(folder, warn=warnings.append)
    files.start()
    folder.rmdir()
    for epoch in (1, 2):
        files.put(report(epoch))
    files.close()
    assert files.errors == 2 and files.written == 0 and len(warnings) == 1
    assert str(folder) in warnings[0]


def test_a_disk_that_hangs_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, entered = threading.Event(), threading.Event()

    def write(self: FaultFiles, name: str, report: dict[str, object]) -> None:
        entered.set()
        hangs.wait(20)

    monkeypatch.setattr(FaultFiles, "_write", write)
    files = FaultFiles(tmp_path, warn=print)
    files.start()
    files.put(report(0))
    assert entered.wait(20)
    taken = [files.put(report(epoch)) is not None for epoch in range(1, QUEUE_MAX + 3)]
    assert taken == [True] * QUEUE_MAX + [False] * 2
    assert files.errors == 2
    hangs.set()
    files.close()


def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--fault-dir"):
        FaultFiles(tmp_path / "file" / "faults", warn=print).start()


def test_a_coredump_is_light_and_lies_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables = coredump_environment(Path("dumps"))
    assert variables["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] == "1"
    assert variables["CUDA_COREDUMP_FILE"].startswith(f"{tmp_path}/dumps/")
    assert {"%h", "%p", "%t"} <= set(variables["CUDA_COREDUMP_FILE"].rpartition("/")[2].split("-"))
    flags = variables["CUDA_COREDUMP_GENERATION_FLAGS"].split(",")
    assert {"skip_global_memory", "skip_abort"} <= set(flags)


@pytest.mark.parametrize(("dumps", "more_s"), [(False, 0.0), (True, WRITING_S)])
def test_a_worker_that_dumps_its_gpu_is_not_taken_for_hung(
    tmp_path: Path, dumps: bool, more_s: float
) -> None:
    class Spec:
        path = tmp_path

        def weights_bytes(self, dtype: str) -> int:
            return 1

        kv_token_bytes = weights_bytes

    (tmp_path / "config.json").write_text("{}")
    options = ServeOptions(
        spec=Spec(),
        limits=Limits(vocab_size=8, context_tokens=64, pages=8, live_tokens=1024),
        served_name="x",
        device="cuda:0",
        gpu_coredump=tmp_path / "dumps" if dumps else None,
    )
    assert options.core_config(1, recover=False)["step_margin_s"] == MARGIN_S + more_s
