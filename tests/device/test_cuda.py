"""device.cuda without a GPU: what it asks torch for."""

from __future__ import annotations

import torch

from holdfast.device.cuda import make_current


def test_a_thread_is_told_which_gpu_is_current_and_nothing_of_a_cpu(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    make_current(torch.device("cpu"))
    make_current(torch.device("cuda", 1))
    assert told == [torch.device("cuda", 1)]
