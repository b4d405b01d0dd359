"""--kernels: what is refused, and for whom the cached pages are."""

from __future__ import annotations

import importlib.util

import pytest

from holdfast.config import check_kernels
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
