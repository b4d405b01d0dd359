"""Holdfast: an LLM serving engine whose streams survive GPU faults.

    from holdfast import LLM, SamplingParams

The public names are looked up on first use, so that `import holdfast` costs nothing: child
processes without torch import this package too. Nothing else lives here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.api.schema import SamplingParams as SamplingParams
    from holdfast.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "holdfast.llm", "SamplingParams": "holdfast.api.schema"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
