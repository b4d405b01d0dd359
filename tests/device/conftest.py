"""A tiny checkpoint, made once, and a runner over it for each test."""

from __future__ import annotations

import pytest
import torch
from devicekit import Hand, make_checkpoint, make_runner

from holdfast.model.spec import ModelSpec


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device-model")
    return folder, make_checkpoint(folder)


@pytest.fixture(scope="session")
def spec(checkpoint) -> ModelSpec:
    return ModelSpec.load(checkpoint[0])


@pytest.fixture(scope="session")
def reference(checkpoint):
    return checkpoint[1]


@pytest.fixture
def hand(spec) -> Hand:
    return Hand(make_runner(spec))
