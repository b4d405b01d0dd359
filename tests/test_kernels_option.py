"""--kernels and --graphs: what `auto` comes to on each device, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest

from holdfast.config import Computation, check_kernels
from holdfast.errors import OptionError


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_runs_anywhere(device):
    check_kernels("reference", device)


def test_kernels_run_on_a_gpu():
    check_kernels("triton", "cuda")


def test_kernels_on_the_cpu_are_refused_unless_interpreted(monkeypatch):
    with pytest.raises(OptionError, match=r"--kernels.*TRITON_INTERPRET=1"):
        check_kernels("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_kernels("triton", "cpu")


def test_kernels_without_triton_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"--kernels.*not installed"):
        check_kernels("triton", "cuda")


def test_kernels_that_are_not_there_are_refused_by_their_name():
    with pytest.raises(OptionError, match=r"reference, triton.*'fast'"):
        check_kernels("fast", "cuda")


def chosen(device: str, **asked) -> tuple[str, bool]:
    found = Computation.choose(device, **asked)
    assert found.fallback == ""
    return found.kernels, found.graphs


def test_a_gpu_runs_triton_s_kernels_and_graphs_unless_told_otherwise():
    assert chosen("cuda:1") == chosen("cuda") == ("triton", True)
    assert chosen("cuda", graphs=False) == ("triton", False)
    assert chosen("cuda", kernels="reference") == ("reference", False)
    assert chosen("cuda", kernels="triton", graphs=True) == ("triton", True)


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_cpu_runs_the_reference_without_graphs_unless_told_otherwise(monkeypatch, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert chosen("cpu") == ("reference", False)
    assert chosen("cpu", graphs=True) == ("reference", True)


def test_interpreted_kernels_bring_no_graphs_of_themselves(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("cpu", kernels="triton") == ("triton", False)


def test_a_gpu_without_triton_falls_back_to_the_reference_and_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = Computation.choose("cuda:0")
    assert (found.kernels, found.graphs) == ("reference", False)
    assert "triton" in found.fallback and "\n" not in found.fallback
    assert Computation.choose("cpu").fallback == ""


def test_graphs_that_a_gpu_cannot_have_are_refused_before_anything_is_loaded(monkeypatch):
    with pytest.raises(OptionError, match=r"--graphs.*--kernels reference"):
        Computation.choose("cuda", kernels="reference", graphs=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"--graphs.*triton is not installed"):
        Computation.choose("cuda", graphs=True)


def test_the_command_line_says_what_a_gpu_must_do_without(monkeypatch, capfd):
    from holdfast.cli.engine import pick_computation
    from holdfast.cli.options import EngineOptions, Graphs, Kernels

    def lines(**asked) -> list[str]:
        pick_computation(EngineOptions(**asked), "cuda:0")
        return capfd.readouterr().err.splitlines()

    assert lines() == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = lines()
    assert "cuda:0" in line and "triton is not installed" in line
    assert lines(kernels=Kernels.REFERENCE) == lines(graphs=Graphs.OFF, kernels=Kernels.REFERENCE)
    assert lines(kernels=Kernels.REFERENCE) == []


def test_what_auto_came_to_is_what_is_recorded_served_and_opened():
    from holdfast.cli.engine import prepare, settings
    from holdfast.cli.options import EngineOptions, ServerOptions
    from holdfast.cli.serve import serve_options

    engine = EngineOptions(device="cpu", max_rows=2, kv_pages=200)
    prepared = prepare(None, engine)
    assert prepared.computation == Computation("reference", False)
    recorded = settings(prepared, engine)
    assert (recorded["kernels"], recorded["graphs"]) == ("reference", "off")
    options = serve_options(None, ServerOptions(), engine)
    worker = options.worker_config(loaded=False)
    assert (worker["kernels"], worker["graphs"]) == ("reference", False)


def test_llm_of_nothing_but_a_gpu_opens_the_fast_path(monkeypatch):
    from types import SimpleNamespace

    from holdfast import llm as module

    opened = []

    def stop(spec, limits, device, dtype, computation, *more):
        opened.append((device, dtype, computation.kernels, computation.graphs))
        raise KeyboardInterrupt

    gib = 1 << 30
    room = SimpleNamespace(total_bytes=140 * gib, free_bytes=139 * gib)
    monkeypatch.setattr(module, "probe", lambda ordinal: room)
    monkeypatch.setattr(module, "_open_device", stop)
    for asked in ({"device": "cuda:0"}, {"device": "cuda:0", "graphs": False}, {}):
        with pytest.raises(KeyboardInterrupt):
            module.LLM(rows_max=2, **asked)
    assert opened == [
        ("cuda:0", "bfloat16", "triton", True),
        ("cuda:0", "bfloat16", "triton", False),
        ("cpu", "float32", "reference", False),
    ]
