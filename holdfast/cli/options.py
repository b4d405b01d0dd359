"""The options that several commands share, each declared once with its unit in its name.

`EngineOptions` says which model to run and how large; `ServerOptions` how it is served. A command
takes a group by annotating one parameter with it and `grouped` spreads the fields out, so that an
option is the same option, with the same help, wherever it appears. Owns no defaults of bounds:
None means that config.Limits or sizing decides. Must not import torch or a model's files.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from holdfast.errors import OptionError
from holdfast.sizing import GIB, Wishes

MODEL_PANEL = "Model"
BATCH_PANEL = "Batching and memory"
NETWORK_PANEL = "Network"
TIME_PANEL = "Deadlines"
PROCESS_PANEL = "Processes and journal"


class Load(enum.StrEnum):
    HF = "hf"
    DUMMY = "dummy"


class Dtype(enum.StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Kernels(enum.StrEnum):
    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"


class Graphs(enum.StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class JournalSync(enum.StrEnum):
    NONE = "none"
    INTERVAL = "interval"
    STEP = "step"


class Standby(enum.StrEnum):
    WARM = "warm"
    COLD = "cold"
    NONE = "none"


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder in Hugging Face format or a hub id. Left out: the bundled holdfast-tiny.",
        show_default=False,
    ),
]


def _option(panel: str, help: str, default: str | bool = True, **settings: object) -> typing.Any:
    """`default` is what --help says where the default itself is None."""
    return typer.Option(rich_help_panel=panel, help=help, show_default=default, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which model and how large: the same for serve, chat, generate, plan and bench offline."""

    load: Annotated[
        Load, _option(MODEL_PANEL, "hf: read the weights; dummy: draw them (for timing)")
    ] = Load.HF
    device: Annotated[
        str,
        _option(
            MODEL_PANEL,
            "Where the model runs: cpu, cuda or cuda:N; auto: the first GPU that torch can use",
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        _option(MODEL_PANEL, "Numbers of weights and KV cache; auto: CPU float32, GPU bfloat16"),
    ] = Dtype.AUTO
    kernels: Annotated[
        Kernels,
        _option(
            MODEL_PANEL,
            "How layers are computed; reference: plain torch; triton: fused kernels, for GPUs; "
            "auto: triton on a GPU, reference on the CPU",
        ),
    ] = Kernels.AUTO
    graphs: Annotated[
        Graphs,
        _option(
            MODEL_PANEL,
            "on: replay steps from captured graphs (on the CPU: the same logic, no gain); "
            "auto: on where triton's kernels run on a GPU, else off",
        ),
    ] = Graphs.AUTO
    gpu_memory_utilization: Annotated[
        float,
        _option(
            BATCH_PANEL,
            "Share of the GPU's memory to take, what others hold on it included",
            min=0.0,
            max=1.0,
        ),
    ] = 0.9
    threads: Annotated[
        int | None, _option(MODEL_PANEL, "CPU threads of the worker", "cores", min=1, max=1024)
    ] = None
    max_rows: Annotated[
        int | None,
        _option(BATCH_PANEL, "Requests computed in one step", "64; large GPU 256", min=1),
    ] = None
    max_context_tokens: Annotated[
        int | None,
        _option(BATCH_PANEL, "Longest prompt and answer together", "the model's own", min=1),
    ] = None
    kv_pages: Annotated[
        int | None, _option(BATCH_PANEL, "Pages of the KV cache", "what fits; see plan", min=2)
    ] = None
    kv_memory_gib: Annotated[
        float | None,
        _option(BATCH_PANEL, "KV cache in GiB, instead of --kv-pages", min=0.0),
    ] = None
    page_tokens: Annotated[
        int | None, _option(BATCH_PANEL, "Tokens of one KV page", "16", min=1, max=4096)
    ] = None
    prefill_tokens: Annotated[
        int | None,
        _option(BATCH_PANEL, "Tokens of one step, prompts included", "512; large GPU 8192", min=1),
    ] = None
    mixed_tokens: Annotated[
        int | None,
        _option(
            BATCH_PANEL,
            "Tokens of a step that decodes and takes prompts: fewer keep streams even, more start "
            "prompts sooner",
            "GPU 50 ms, at most 4096; CPU --prefill-tokens",
            min=0,
        ),
    ] = None
    queue_requests: Annotated[
        int | None, _option(BATCH_PANEL, "Requests that may wait for a row", "4096", min=1)
    ] = None
    live_tokens: Annotated[
        int | None,
        _option(BATCH_PANEL, "Prompt and answer tokens of all admitted requests", "2 Mi", min=1),
    ] = None

    def wishes(self, **more: object) -> Wishes:
        """What sizing is asked. Raises OptionError when two options contradict."""
        if self.kv_pages is not None and self.kv_memory_gib is not None:
            raise OptionError("--kv-memory-gib", "cannot be given together with --kv-pages")
        memory = None if self.kv_memory_gib is None else int(self.kv_memory_gib * GIB)
        return Wishes(
            rows_max=self.max_rows,
            pages=self.kv_pages,
            kv_memory_bytes=memory,
            page_tokens=self.page_tokens,
            prefill_tokens=self.prefill_tokens,
            mixed_tokens=self.mixed_tokens,
            context_tokens=self.max_context_tokens,
            queue_requests=self.queue_requests,
            live_tokens=self.live_tokens,
            **more,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a model is served."""

    steps_ahead: Annotated[
        int | None,
        _option(BATCH_PANEL, "Steps launched at once: 2 overlaps, 1 does not", "2", min=1, max=2),
    ] = None
    host: Annotated[str, _option(NETWORK_PANEL, "Address to listen on; 0.0.0.0 for everybody")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int,
        _option(NETWORK_PANEL, "Port to listen on; 0 picks a free one", min=0, max=65535),
    ] = 8000
    served_name: Annotated[
        str | None, _option(NETWORK_PANEL, "Name of the model in the API", "the folder's name")
    ] = None
    api_key: Annotated[
        list[str] | None,
        _option(
            NETWORK_PANEL,
            "Key that clients must send; may be repeated. Safer: set HOLDFAST_API_KEY, which no "
            "list of processes shows (several: separated by spaces)",
            envvar="HOLDFAST_API_KEY",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _option(NETWORK_PANEL, "Web origin that may call the API; may be repeated; * for any"),
    ] = None
    api_processes: Annotated[
        int | None, _option(PROCESS_PANEL, "HTTP processes", "1", min=1, max=64)
    ] = None
    standby: Annotated[
        Standby,
        _option(
            PROCESS_PANEL,
            "The next worker: warm waits prepared (CPU: 150 MB), cold starts when one is lost, "
            "none when that one is gone",
        ),
    ] = Standby.WARM
    scrub: Annotated[
        float,
        _option(
            PROCESS_PANEL,
            "GB a second of weights and sealed KV pages that are read again in the background, to "
            "find what changed silently; 0 = off",
            min=0.0,
        ),
    ] = 0.0
    journal_dir: Annotated[
        Path | None,
        _option(PROCESS_PANEL, "Keep a copy of the journal here; it holds prompts (mode 0600)"),
    ] = None
    journal_sync: Annotated[
        JournalSync, _option(PROCESS_PANEL, "When that copy is fsynced, off the step")
    ] = JournalSync.INTERVAL
    fault_dir: Annotated[
        Path | None,
        _option(
            PROCESS_PANEL,
            "Write a report of each fault here, the last 20; see holdfast faults",
            "one line on stderr",
        ),
    ] = None
    fault_tokens: Annotated[
        bool,
        _option(
            PROCESS_PANEL,
            "Put the tokens of the requests in flight into those reports: prompts and answers",
        ),
    ] = False
    gpu_coredump: Annotated[
        Path | None,
        _option(
            PROCESS_PANEL,
            "Have the CUDA driver dump a faulted GPU here, without its memory; delays recovery",
            "off",
        ),
    ] = None
    log_level: Annotated[LogLevel, _option(PROCESS_PANEL, "What goes to stderr")] = LogLevel.INFO
    drills: Annotated[
        bool,
        _option(PROCESS_PANEL, "Let `holdfast drill` break this server on purpose", hidden=True),
    ] = False
    request_timeout_s: Annotated[
        float | None,
        _option(
            TIME_PANEL, "Deadline of a request that names none; the largest one", "600", min=0.0
        ),
    ] = None
    write_timeout_s: Annotated[
        float,
        _option(TIME_PANEL, "A reader that takes nothing for so long is cut off", min=0.1),
    ] = 30.0
    keepalive_s: Annotated[
        float, _option(TIME_PANEL, "A comment on a stream silent for so long", min=0.1)
    ] = 15.0
    step_timeout_s: Annotated[
        float,
        _option(TIME_PANEL, "No step of the worker takes longer; usual ones are learnt", min=0.1),
    ] = 60.0
    drain_timeout_s: Annotated[
        float, _option(TIME_PANEL, "After SIGTERM, streams may take so long to end", min=0.0)
    ] = 30.0

    def keys(self) -> tuple[str, ...]:
        """API keys, in order. Raises OptionError on one that no client could send."""
        for key in self.api_key or ():
            if not key or any(letter.isspace() or not letter.isprintable() for letter in key):
                raise OptionError("--api-key", "is empty or has a space in it")
        return tuple(self.api_key or ())


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with each dataclass parameter replaced by that dataclass's fields as options."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, type] = {}
    spread: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            spread.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        hints = typing.get_type_hints(parameter.annotation, include_extras=True)
        spread.extend(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(parameter.annotation)
        )

    def command(**values: object) -> None:
        for name, group in groups.items():
            names = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in names})
        function(**values)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in spread}
    return command


def arguments(group: object) -> list[str]:
    """The options of a dataclass instance of this module, as words of a command line: those that
    differ from their defaults, so that a child process is told what this one was told."""
    words: list[str] = []
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, field.name)
        if value == field.default:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [name, str(one.value if isinstance(one, enum.Enum) else one)]
    return words
