"""What fits: memory of this machine, weights, KV pages, rows; decided before anything is loaded.

One function, `size`, turns a model's dimensions and the operator's options into `Limits` and the
arithmetic behind them. `holdfast plan` prints it, `serve`, `LLM` and the benches obey it, so what
`plan` says is what `serve` does. Knows nothing of torch, processes or files of a model; it reads
/proc and /sys only in `memory_available_bytes`, and is otherwise pure.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast import gpu_work
from holdfast.config import Limits
from holdfast.errors import OptionError

GIB = 1 << 30
MIB = 1 << 20

# Share of the available memory that the KV pool takes by default: the machine has other work.
KV_SHARE = 0.25
# A GPU's steps want many rows, since weights are read once for all of them, and long chunks; on one
# of less memory than this their scratch would be missed by the KV cache.
LARGE_GPU_BYTES = 40 * GIB
LARGE_GPU_ROWS, LARGE_GPU_PREFILL_TOKENS = 256, 8192
# Tokens of a step that takes prompts beside as many rows that decode as it likes (the scheduler
# gives fewer rows fewer), on a GPU: every stream waits for them. As many, a power of two, as an
# H200 multiplies in 50 ms (bf16, as cuBLAS does random numbers), within these bounds. Shorter steps
# fill its tiles badly and longer ones gain nothing: core.scheduler has the figures.
_MIXED_S, _OPERATIONS_PER_S = 0.05, 7e14
GPU_MIXED_MIN, GPU_MIXED_MAX = 256, 4096
# Resident memory of the processes beside the slabs, with room above what `ps` showed on Linux with
# torch 2.13 CPU and the bundled model: worker 292 MiB, core 32, supervisor 53, keeper 17, api
# process 77.
WORKER_BYTES = 350 * MIB
GPU_WORKER_BYTES = 3 * GIB
BRAIN_BYTES = 150 * MIB
API_BYTES = 120 * MIB


# On the GPU, of one process that computes there: its context with torch's and cuBLAS's own memory.
GPU_CONTEXT_BYTES = 800 * MIB
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class Dimensions(gpu_work.Dimensions, Protocol):
    """What sizing needs of a model; model.spec.ModelSpec has it."""

    context_tokens: int

    def kv_token_bytes(self, dtype: str) -> int: ...
    def weights_bytes(self, dtype: str) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the operator asked for; None = decide for me. Counts as in Limits, but for
    mixed_tokens, of which 0 too is decided: `gpu_mixed_tokens` or prefill_tokens,
    whichever is less; prefill_tokens on a CPU, whose steps wait for arithmetic alone, and where
    nobody waits for a step (`size`, streams)."""

    rows_max: int | None = None
    pages: int | None = None
    kv_memory_bytes: int | None = None
    page_tokens: int | None = None
    prefill_tokens: int | None = None
    mixed_tokens: int | None = None
    context_tokens: int | None = None
    queue_requests: int | None = None
    live_tokens: int | None = None
    timeout_s: float | None = None
    steps_ahead: int | None = None
    api_processes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRoom:
    """A GPU's memory before anything of ours is on it, and how much of it may be taken.

    utilization: share of total_bytes, what others hold included, over 0 and at most 1. processes:
    that compute there at once, a standby included.
    """

    total_bytes: int
    free_bytes: int
    utilization: float = 0.9
    processes: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise OptionError(
                "--gpu-memory-utilization", f"over 0 and at most 1, got {self.utilization}"
            )

    @property
    def ours_bytes(self) -> int:
        taken = self.total_bytes - self.free_bytes
        return min(self.free_bytes, int(self.total_bytes * self.utilization) - taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The outcome: Limits, and where each byte goes. `binds` says what set the number of pages.

    gpu: where weights and KV cache lie, None for the memory of the machine, whose bytes
    available_bytes, needed_bytes and left_bytes are. gpu_work_bytes: of all processes on the GPU.
    """

    limits: Limits
    dtype: str
    available_bytes: int
    weights_bytes: int
    kv_token_bytes: int
    journal_bytes: int
    process_bytes: int
    binds: str
    gpu: GpuRoom | None = None
    gpu_work_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        return self.kv_token_bytes * self.limits.page_tokens

    @property
    def kv_bytes(self) -> int:
        return self.limits.pages * self.page_bytes

    @property
    def needed_bytes(self) -> int:
        slabs = self.weights_bytes + self.kv_bytes if self.gpu is None else 0
        return slabs + self.journal_bytes + self.process_bytes

    @property
    def left_bytes(self) -> int:
        return self.available_bytes - self.needed_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that all requests together can hold."""
        return self.limits.pages_usable * self.limits.page_tokens

    @property
    def full_rows(self) -> int:
        """Requests of the longest context that fit at once."""
        return min(self.limits.rows_max, self.limits.pages_usable // self.limits.table_columns)

    def as_dict(self) -> dict[str, object]:
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["limits"] = dataclasses.asdict(self.limits)
        for name in (
            "page_bytes",
            "kv_bytes",
            "needed_bytes",
            "left_bytes",
            "kv_tokens",
            "full_rows",
        ):
            facts[name] = getattr(self, name)
        return facts


def size(
    model: Dimensions,
    wishes: Wishes,
    *,
    dtype: str,
    available_bytes: int,
    gpu: GpuRoom | None = None,
    kernels: str = "reference",
    graphs: bool = False,
    streams: bool = True,
) -> Sizing:
    """Decide every bound of an engine that serves `model`, on `gpu` where one is given.

    available_bytes: of the machine's own memory. kernels, graphs: how a GPU computes. streams:
    somebody reads each token as it comes; a batch only wants to be done.
    Raises OptionError, with the numbers, when an option is wrong or the memory is too small.
    """
    limits = _wished_limits(model, wishes, gpu, streams=streams)
    if gpu is not None:
        step = gpu_work.work_bytes(
            model, limits, itemsize=_ITEM_BYTES[dtype], kernels=kernels, graphs=graphs
        )
        work = gpu.processes * (GPU_CONTEXT_BYTES + step)
        return _size_on_gpu(model, wishes, limits, dtype, available_bytes, gpu, work)
    weights = model.weights_bytes(dtype)
    token_bytes = model.kv_token_bytes(dtype)
    page_bytes = token_bytes * limits.page_tokens
    process = WORKER_BYTES + BRAIN_BYTES + API_BYTES * limits.api_processes
    journal = 2 * limits.journal_bytes
    spare = available_bytes - weights - process - journal

    context_pages = limits.table_columns + 1
    if wishes.pages is not None:
        pages, binds = wishes.pages, "--kv-pages"
    elif wishes.kv_memory_bytes is not None:
        pages, binds = wishes.kv_memory_bytes // page_bytes, "--kv-memory-gib"
        if pages < 2:
            raise OptionError(
                "--kv-memory-gib",
                f"holds {pages} pages of {show_bytes(page_bytes)}; at least 2 are needed",
            )
    else:
        share = int(min(available_bytes * KV_SHARE, spare)) // page_bytes
        wanted = limits.rows_max * limits.table_columns + 1
        pages = min(share, wanted)
        binds = f"{KV_SHARE:.0%} of available memory" if share < wanted else "rows x context"
        if pages < context_pages:
            # One request of the longest context is worth more than the share, if it fits at all.
            pages, binds = context_pages, "one request of the longest context"
    if weights + process > available_bytes:
        raise OptionError(
            "MODEL",
            f"weights ({show_bytes(weights)}) and processes ({show_bytes(process)}) are more than "
            f"the {show_bytes(available_bytes)} of memory available: choose a smaller model, or "
            "free some memory",
        )
    if pages * page_bytes > spare:
        raise OptionError(
            _memory_option(wishes),
            f"{pages} KV pages of {show_bytes(page_bytes)} are {show_bytes(pages * page_bytes)}; "
            f"{show_bytes(available_bytes)} of memory are available, and weights "
            f"({show_bytes(weights)}), journal ({show_bytes(journal)}) and processes "
            f"({show_bytes(process)}) leave {show_bytes(max(0, spare))}: "
            f"{_memory_advice(wishes)}",
        )
    return Sizing(
        limits=dataclasses.replace(limits, pages=pages),
        dtype=dtype,
        available_bytes=available_bytes,
        weights_bytes=weights,
        kv_token_bytes=token_bytes,
        journal_bytes=journal,
        process_bytes=process,
        binds=binds,
    )


def _size_on_gpu(
    model: Dimensions,
    wishes: Wishes,
    limits: Limits,
    dtype: str,
    available_bytes: int,
    gpu: GpuRoom,
    work: int,
) -> Sizing:
    """work: bytes that all processes take there beside weights and pages."""
    weights = model.weights_bytes(dtype)
    token_bytes = model.kv_token_bytes(dtype)
    page_bytes = token_bytes * limits.page_tokens
    workers = GPU_WORKER_BYTES * gpu.processes
    process = workers + BRAIN_BYTES + API_BYTES * limits.api_processes
    journal = 2 * limits.journal_bytes
    if process + journal > available_bytes:
        raise OptionError(
            "memory",
            f"journal ({show_bytes(journal)}) and processes ({show_bytes(process)}) are more than "
            f"the {show_bytes(available_bytes)} of memory available: {_memory_advice(wishes)}",
        )
    room = max(0, gpu.ours_bytes - weights - work)
    taken = (
        f"of {show_bytes(gpu.free_bytes)} free GPU memory --gpu-memory-utilization "
        f"{gpu.utilization:g} allows {show_bytes(max(0, gpu.ours_bytes))}; weights "
        f"({show_bytes(weights)}) and the work of {gpu.processes} processes ({show_bytes(work)}) "
        f"leave {show_bytes(room)}"
    )
    context_pages = limits.table_columns + 1
    if wishes.pages is not None:
        pages, binds = wishes.pages, "--kv-pages"
    elif wishes.kv_memory_bytes is not None:
        pages, binds = max(2, wishes.kv_memory_bytes // page_bytes), "--kv-memory-gib"
    else:
        wanted = limits.rows_max * limits.table_columns + 1
        pages = min(room // page_bytes, wanted)
        binds = "--gpu-memory-utilization" if pages < wanted else "rows x context"
        if pages < context_pages:
            raise OptionError(
                "--gpu-memory-utilization",
                f"{taken}, and one request of the longest context needs "
                f"{show_bytes(context_pages * page_bytes)}: raise it, free some GPU memory, lower "
                "--max-context-tokens, or choose a smaller model",
            )
    if pages * page_bytes > room:
        raise OptionError(
            _memory_option(wishes),
            f"{pages} KV pages of {show_bytes(page_bytes)} are {show_bytes(pages * page_bytes)}; "
            f"{taken}: ask for less, or free some GPU memory",
        )
    return Sizing(
        limits=dataclasses.replace(limits, pages=pages),
        dtype=dtype,
        available_bytes=available_bytes,
        weights_bytes=weights,
        kv_token_bytes=token_bytes,
        journal_bytes=journal,
        process_bytes=process,
        binds=binds,
        gpu=gpu,
        gpu_work_bytes=work,
    )


def gpu_mixed_tokens(model: gpu_work.Dimensions) -> int:
    """Tokens of a step that decodes and takes prompts; see _MIXED_S."""
    tokens = int(_MIXED_S * _OPERATIONS_PER_S / (2 * gpu_work.layer_weights(model)))
    power = 1 << (max(1, tokens).bit_length() - 1)
    return min(max(power, GPU_MIXED_MIN), GPU_MIXED_MAX)


def _wished_limits(
    model: Dimensions, wishes: Wishes, gpu: GpuRoom | None, *, streams: bool
) -> Limits:
    """Limits as wished, with defaults elsewhere: Limits' own, or those of a large GPU; `pages` is
    decided afterwards."""
    context = wishes.context_tokens or model.context_tokens
    if context > model.context_tokens:
        raise OptionError(
            "--max-context-tokens",
            f"the model was made for {model.context_tokens} tokens, got {context}",
        )
    chosen = {
        field.name: value
        for field in dataclasses.fields(wishes)
        if field.name not in ("pages", "kv_memory_bytes", "context_tokens")
        and (value := getattr(wishes, field.name)) is not None
    }
    # The default allowance of live tokens must hold one longest request of any model.
    default_live = next(f.default for f in dataclasses.fields(Limits) if f.name == "live_tokens")
    chosen.setdefault("live_tokens", max(default_live, context))
    if gpu is not None and gpu.total_bytes >= LARGE_GPU_BYTES:
        chosen.setdefault("rows_max", LARGE_GPU_ROWS)
        chosen.setdefault("prefill_tokens", LARGE_GPU_PREFILL_TOKENS)
    pages = {} if wishes.pages is None else {"pages": wishes.pages}
    limits = Limits(vocab_size=model.vocab_size, context_tokens=context, **pages, **chosen)
    if limits.mixed_tokens:
        return limits
    most = limits.prefill_tokens
    if gpu is not None and streams:
        most = min(gpu_mixed_tokens(model), most)
    return dataclasses.replace(limits, mixed_tokens=most)


def _memory_option(wishes: Wishes) -> str:
    if wishes.pages is not None:
        return "--kv-pages"
    return "--kv-memory-gib" if wishes.kv_memory_bytes is not None else "memory"


def _memory_advice(wishes: Wishes) -> str:
    if wishes.pages is not None or wishes.kv_memory_bytes is not None:
        return "ask for less, or free some memory"
    return "lower --max-context-tokens, --queue-requests or --live-tokens, or free some memory"


def memory_available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping: the least of the kernel's estimate and cgroups.

    `root` is where /proc and /sys are looked up. Raises OptionError where neither can be read.
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    found.extend(_cgroup_headrooms(root))
    if not found and root == Path("/") and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        # Not Linux: how much there is can be read, how much is free cannot. Count on half.
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if not found:
        raise OptionError("--kv-pages", "free memory cannot be read on this system; say how many")
    return max(0, min(found))


def _cgroup_headrooms(root: Path) -> list[int]:
    """Room under every memory limit of this process's cgroup and its parents, v2 and v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be the host's; then the mount's own root holds our limits.
        for place in [folder, *folder.parents]:
            if place.is_relative_to(base):
                rooms.extend(_headroom(place, *names))
    return rooms


def _headroom(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> list[int]:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= 1 << 60:
            return []
        used = int((folder / usage_name).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == reclaimable:
                used -= int(value)
        return [int(limit) - used]
    except (OSError, ValueError):
        return []


def show_bytes(count: int) -> str:
    """`count` with a binary unit, for people: 1536 -> '1.5 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
