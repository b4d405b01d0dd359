"""From options to what is to run: the model's dimensions, its type of numbers, its bounds.

The one road from the command line to an engine, so that serve, chat, generate, plan and the benches
decide alike. Reads the model's config, never its weights; raises OperatorError only.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.cli.options import Dtype, EngineOptions, Graphs
from holdfast.config import Computation
from holdfast.cuda_driver import parse_device
from holdfast.errors import OptionError
from holdfast.proc.cuda_probe import devices_there, probe, torch_has_cuda
from holdfast.sizing import GpuRoom, Sizing, memory_available_bytes, size

if TYPE_CHECKING:
    from holdfast.cli.show import Report
    from holdfast.llm import LLM
    from holdfast.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Prepared:
    """device: cpu or cuda:N; computation: what runs there, with nothing left to decide."""

    spec: ModelSpec
    sizing: Sizing
    device: str
    computation: Computation


def prepare(
    model: str | None,
    engine: EngineOptions,
    *,
    gpu_processes: int = 1,
    streams: bool = True,
    **wishes: object,
) -> Prepared:
    """Find the model and decide what fits. Raises ModelError or OptionError.

    gpu_processes: that compute on a GPU at once. streams: as of sizing.size.
    """
    from holdfast.model.spec import ModelSpec, resolve_model

    device = pick_device(engine)
    dtype = pick_dtype(engine, device)
    computation = pick_computation(engine, device)
    asked = engine.wishes(**wishes)
    spec = ModelSpec.load(resolve_model(model))
    available = memory_available_bytes()
    gpu = None
    if device != "cpu":
        found = probe(parse_device(device)[1])
        gpu = GpuRoom(
            total_bytes=found.total_bytes,
            free_bytes=found.free_bytes,
            utilization=engine.gpu_memory_utilization,
            # Where its memory cannot be shared, each worker has its own, one at a time.
            processes=gpu_processes if not found.unshared else 1,
        )
    sizing = size(
        spec,
        asked,
        dtype=dtype,
        available_bytes=available,
        gpu=gpu,
        kernels=computation.kernels,
        graphs=computation.graphs,
        streams=streams,
    )
    return Prepared(spec, sizing, device, computation)


def pick_device(engine: EngineOptions) -> str:
    """cpu or cuda:N. Raises OptionError("--device") for a word that is neither."""
    if engine.device == "auto":
        return "cuda:0" if torch_has_cuda() and devices_there() else "cpu"
    kind, ordinal = parse_device(engine.device)
    return "cpu" if kind == "cpu" else f"cuda:{ordinal}"


def pick_dtype(engine: EngineOptions, device: str) -> str:
    """The type of numbers for the device. Raises OptionError for what cannot run there."""
    if device != "cpu":
        return "bfloat16" if engine.dtype is Dtype.AUTO else engine.dtype.value
    if engine.dtype is Dtype.BFLOAT16:
        raise OptionError(
            "--dtype", "bfloat16 is for GPUs; on the CPU leave it out, or say float32"
        )
    return "float32"


def pick_computation(engine: EngineOptions, device: str) -> Computation:
    """Kernels and graphs for the device, with a line on stderr where `auto` had to do without.
    Raises OptionError for what cannot be had."""
    from holdfast.cli.show import err

    graphs = None if engine.graphs is Graphs.AUTO else engine.graphs is Graphs.ON
    found = Computation.choose(device, engine.kernels.value, graphs)
    if found.fallback:
        err.print(f"{device}: {found.fallback}", style="yellow", markup=False)
    return found


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

    prepared = prepare(model, engine)
    share_cores()
    with bars() as report:
        return open_prepared(prepared, engine, report)


def open_prepared(prepared: Prepared, engine: EngineOptions, report: Report) -> LLM:
    """An LLM in this process of what was prepared: the one place that hands it engine options."""
    from holdfast.llm import LLM

    return LLM.prepared(
        prepared.spec,
        prepared.sizing,
        device=prepared.device,
        computation=prepared.computation,
        load=engine.load.value,
        threads=engine.threads,
        progress=report,
    )


def settings(prepared: Prepared, engine: EngineOptions) -> dict[str, Any]:
    """Every engine option by its name, with what `auto` and `what fits` came to: for a record. How
    many steps are launched ahead is no such option: an LLM decides it (bench.ours.facts), a server
    is told."""
    named = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    limits = prepared.sizing.limits
    decided = {
        "device": prepared.device,
        "dtype": prepared.sizing.dtype,
        "kernels": prepared.computation.kernels,
        "graphs": str(Graphs.ON if prepared.computation.graphs else Graphs.OFF),
        "threads": engine.threads or os.cpu_count() or 1,
        "max_rows": limits.rows_max,
        "max_context_tokens": limits.context_tokens,
        "kv_pages": limits.pages,
        "page_tokens": limits.page_tokens,
        "prefill_tokens": limits.prefill_tokens,
        "mixed_tokens": limits.mixed_tokens,
        "queue_requests": limits.queue_requests,
        "live_tokens": limits.live_tokens,
    }
    plain = {k: v.value if isinstance(v, enum.Enum) else v for k, v in (named | decided).items()}
    spinning = {
        name.lower(): os.environ[name]
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        if prepared.device == "cpu" and name in os.environ
    }
    return {**plain, **spinning}
