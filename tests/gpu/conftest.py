"""Tests of the GPU path: `pytest -m gpu tests/gpu`, by hand or by tools/gpu/drills_h200.py."""

from __future__ import annotations

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
