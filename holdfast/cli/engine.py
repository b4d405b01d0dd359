"""From options to what is to run: the model's dimensions, its type of numbers, its bounds.

The one road from the command line to an engine, so that serve, chat, generate, plan and the benches
decide alike. Reads the model's config, never its weights; raises OperatorError only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.options import Device, Dtype, EngineOptions
from holdfast.errors import OptionError
from holdfast.sizing import Sizing, memory_available_bytes, size

if TYPE_CHECKING:
    from holdfast.llm import LLM
    from holdfast.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Prepared:
    spec: ModelSpec
    sizing: Sizing


def prepare(model: str | None, engine: EngineOptions, **wishes: object) -> Prepared:
    """Find the model and decide what fits. Raises ModelError or OptionError."""
    from holdfast.model.spec import ModelSpec, resolve_model

    dtype = pick_dtype(engine)
    asked = engine.wishes(**wishes)
    spec = ModelSpec.load(resolve_model(model))
    available = memory_available_bytes()
    return Prepared(spec, size(spec, asked, dtype=dtype, available_bytes=available))


def pick_dtype(engine: EngineOptions) -> str:
    """The type of numbers for the device. Raises OptionError for what cannot run here."""
    if engine.device is Device.CUDA:
        raise OptionError("--device", "cuda is not in this version yet; leave it out, or say cpu")
    if engine.dtype is Dtype.BFLOAT16:
        raise OptionError(
            "--dtype", "bfloat16 is for GPUs; on the CPU leave it out, or say float32"
        )
    return "float32"


def share_cores() -> None:
    """Let threads of the tensor library spin only briefly while they wait for each other.

    Read when torch is loaded, here or in a child. libgomp's default spins for ever as long as there
    are as many cores as threads, which is ruinous on cores that api and core use as well: 16
    requests of 64 tokens were not done after 100 s beside others, where sleeping took 6.3 s. But
    sleeping at once costs a third on a quiet machine. `bench offline`, 2 cores, tokens a second:
    default 1122, sleeping at once 757, spin counts 500 / 2,000 / 10,000: 832 / 1043 / 1092 (one
    run each). An operator's own setting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def open_llm(model: str | None, engine: EngineOptions) -> LLM:
    """An LLM in this process, with a progress bar while it loads."""
    from holdfast.cli.show import bars
    from holdfast.llm import LLM

    prepared = prepare(model, engine)
    share_cores()
    with bars() as report:
        return LLM.prepared(
            prepared.spec,
            prepared.sizing,
            load=engine.load.value,
            threads=engine.threads,
            progress=report,
        )
