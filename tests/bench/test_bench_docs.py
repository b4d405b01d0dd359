"""The page of figures says what the rows say, and the GPU's job asks for options that exist."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.__main__ import run
from holdfast.bench.report import Figure, PeerFigure

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    path = ROOT / "tools" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _paths_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_page_of_figures_is_what_the_rows_say() -> None:
    tables = tool("bench_tables.py")
    text = tables.PAGE.read_text()
    new, plots = tables.page(text)
    assert new == text, "run tools/bench_tables.py"
    assert {path.name: path.read_text() for path in tables.PLOTS.glob("*.svg")} == plots
    for svg in plots.values():
        ET.fromstring(svg)


def test_a_row_without_a_safety_switch_is_marked_in_its_table() -> None:
    tables = tool("bench_tables.py")
    peer = PeerFigure(name="vllm", version="0.26", runs=(4.0,))
    given = {"bench": "start", "metric": "cold start", "unit": "s", "peer": peer}
    environment = {"commit": "c", "date": "2026-01-01", "machine": {}, "versions": {}}
    rows = [
        Figure(runs=(2.0,), **given).row(environment),
        Figure(runs=(1.0,), options={"safety_off": ["standby"]}, **given).row(environment),
    ]
    safe, unsafe = tables._tables("x", rows, {}).splitlines()[4:6]
    assert "standby" in unsafe and "standby" not in safe
    assert "4 (vllm 0.26) | 0.50" in safe


def test_bars_begin_at_zero_in_one_scale_and_a_floor_is_a_line() -> None:
    bars = tool("bench_bars.py")
    groups = [
        bars.Group("batch 1", 2.0, "2", peer=4.0, peer_shown="4", floor=1.0),
        bars.Group("batch 8", 1.0, "1"),
    ]
    drawn = ET.fromstring(bars.draw("step <1>", "ms", groups, peer="vllm", better="less"))
    name = "{http://www.w3.org/2000/svg}"
    widths = [float(one.get("width")) for one in drawn.iter(f"{name}rect") if one.get("rx")]
    assert widths == [bars.BARS_WIDTH / 2, bars.BARS_WIDTH, bars.BARS_WIDTH / 4]
    (line,) = drawn.iter(f"{name}line")
    left = next(float(one.get("x")) for one in drawn.iter(f"{name}rect") if one.get("rx"))
    assert float(line.get("x1")) == pytest.approx(left + bars.BARS_WIDTH / 4)


@pytest.mark.parametrize("part", ["generate", "serve", "start", "offline", "decode", "prefill"])
def test_the_gpu_job_asks_for_options_that_exist(
    part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without a GPU each of its commands fails for that reason and no other."""
    monkeypatch.setattr("holdfast.proc.cuda_probe.torch_has_cuda", lambda: False)
    job = tool("gpu/bench_h200.py")
    asked = argparse.Namespace(
        models=tmp_path,
        out=tmp_path,
        engine=["--page-tokens", "32"],
        repeats=3,
        peer_repeats=1,
        peer_path=[tmp_path],
        peer_python="python3",
    )
    (tmp_path / "qwen3-8b").symlink_to(ROOT / "holdfast" / "assets" / "holdfast-tiny")
    words = job.command(part, "qwen3-8b", asked, 100.0)
    assert run(words[3:]) == 2
    said = capfd.readouterr().err
    assert said.startswith("holdfast: --device: ") and "CUDA" in said, said
    assert len(said.splitlines()) == 1
