"""Tests of the GPU path: `pytest -m gpu tests/gpu`, by hand or by tools/gpu/drills_h200.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.model.spec import ModelSpec, resolve_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def tiny() -> ModelSpec:
    """The bundled, trained model."""
    return ModelSpec.load(resolve_model(None))


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runners that an LLM makes."""
    from holdfast.device import build

    made: list[Any] = []
    inner = build.build_engine

    def kept(*arguments: Any, **named: Any) -> Any:
        made.append(inner(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(build, "build_engine", kept)
    return made
