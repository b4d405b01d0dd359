"""ServeOptions: everything `holdfast serve` was asked for, resolved and checked before any process.

Made by the CLI (or a test), read by the supervisor, which turns it into the config of each role.
It must not know how a process is started. No torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from holdfast.config import Limits, check_kernels
from holdfast.core.clocks import MARGIN_S, STEP_TIMEOUT_S
from holdfast.cuda_driver import parse_device
from holdfast.errors import OptionError
from holdfast.proc.child import limits_config
from holdfast.proc.coredump import WRITING_S, check_device, coredump_environment
from holdfast.proc.lifecycle.policy import HEARTBEAT_S
from holdfast.proc.lifecycle.states import Standby

JOURNAL_SYNCS = ("none", "interval", "step")
STANDBYS = tuple(str(standby) for standby in Standby)
DTYPES = ("float32", "bfloat16")
# A server that may be broken on purpose is nobody's but this machine's.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Spec(Protocol):
    """What serving needs of a model's dimensions; model.spec.ModelSpec has it."""

    path: Path

    def weights_bytes(self, dtype: str) -> int: ...
    def kv_token_bytes(self, dtype: str) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """`spec` belongs to `spec.path`; `limits.api_processes` api processes are started."""

    spec: Spec
    limits: Limits
    served_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    """0 = any free port; the supervisor's `port` then says which."""
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    device: str = "cpu"
    """cpu, cuda or cuda:N; whether it is there was asked before."""
    load: str = "hf"
    """hf: the folder's safetensors; dummy: random weights from `seed`."""
    dtype: str = "float32"
    """Of weights and activations."""
    pool_dtype: str = "float32"
    kernels: str = "reference"
    """How the worker computes layers, of config.KERNELS."""
    seed: int = 0
    graphs: bool = False
    """Steps are replayed from captured graphs where they are admitted (device.graphs)."""
    threads: int = 1
    """Threads of the worker's tensor library."""
    standby: str = "warm"
    """warm: the next worker waits, prepared; cold: it is started while a lost one is fenced; none:
    after that. On a CPU a waiting one costs 150 MB (torch) and no time."""
    drain_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keepalive_s: float = 15.0
    body_bytes_max: int = 16 << 20
    start_timeout_s: float = 600.0
    """A process that is starting and says nothing for so long has failed."""
    heartbeat_timeout_s: float = HEARTBEAT_S
    """A core, api process, keeper or waiting standby that answers nothing for so long hangs."""
    step_timeout_s: float = STEP_TIMEOUT_S
    """A step of the worker never takes longer; how long it may take is learnt (core.clocks)."""
    scrub_gbps: float = 0.0
    """GB a second that are read again in the background, half of weights, half of sealed pages."""
    restarts_per_minute: int = 5
    """Of one process; one more and the server gives up."""
    journal_dir: Path | None = None
    journal_sync: str = "interval"
    journal_sync_interval_s: float = 1.0
    journal_file_mb: float = 64
    journal_files: int = 8
    fault_dir: Path | None = None
    """Where reports of faults are written; without one a report is one line."""
    fault_tokens: bool = False
    """Reports hold the tokens of the requests in flight."""
    gpu_coredump: Path | None = None
    """Where the CUDA driver dumps a GPU that faulted (proc.coredump)."""
    log_level: str = "info"
    drills: bool = False
    """Processes of this user may break the server on purpose, over its status socket."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Added to the config of every role."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise OptionError("--port", f"0 to 65535, got {self.port}")
        parse_device(self.device)
        if self.drills and self.host not in LOOPBACK:
            raise OptionError("--drills", f"only on {' or '.join(LOOPBACK)}, not {self.host!r}")
        for option, value, choices in (
            ("--journal-sync", self.journal_sync, JOURNAL_SYNCS),
            ("--standby", self.standby, STANDBYS),
            ("--dtype", self.dtype, DTYPES),
            ("--pool-dtype", self.pool_dtype, DTYPES),
        ):
            if value not in choices:
                raise OptionError(option, f"one of {', '.join(choices)}, got {value!r}")
        check_kernels(self.kernels, parse_device(self.device)[0])
        for name in (
            "threads",
            "write_timeout_s",
            "keepalive_s",
            "body_bytes_max",
            "start_timeout_s",
            "heartbeat_timeout_s",
            "step_timeout_s",
            "journal_sync_interval_s",
            "journal_file_mb",
            "journal_files",
        ):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise OptionError("--" + name.replace("_", "-"), f"must be positive, got {value}")
        if self.fault_tokens and self.fault_dir is None:
            raise OptionError("--fault-tokens", "says what files hold; give --fault-dir as well")
        if self.gpu_coredump is not None:
            check_device(self.device)
        for name in ("restarts_per_minute", "drain_timeout_s"):
            if not getattr(self, name) >= 0:
                raise OptionError("--" + name.replace("_", "-"), "must not be negative")
        if not 0 <= self.scrub_gbps < math.inf:
            raise OptionError("--scrub", f"GB a second, 0 or more, got {self.scrub_gbps}")

    @property
    def weights_bytes(self) -> int:
        """Size of the weights slab, alignment included."""
        return self.spec.weights_bytes(self.dtype)

    @property
    def pool_bytes(self) -> int:
        """Size of the KV slab, the trash page included."""
        tokens = self.limits.pages * self.limits.page_tokens
        return tokens * self.spec.kv_token_bytes(self.pool_dtype)

    @property
    def tag(self) -> bytes:
        """What a cached page depends on besides its tokens; pages of another tag never match."""
        path = self.spec.path.resolve()
        kind = parse_device(self.device)[0]
        facts = [
            str(path),
            kind,
            self.load,
            self.dtype,
            self.pool_dtype,
            self.kernels,
            str(self.limits.page_tokens),
        ]
        facts += [str(self.seed)] if self.load == "dummy" else []
        digest = hashlib.blake2b("\0".join(facts).encode(), digest_size=16)
        digest.update((path / "config.json").read_bytes())
        return digest.digest()

    def keeper_config(self) -> dict[str, Any]:
        sizes = {"weights_bytes": self.weights_bytes, "pool_bytes": self.pool_bytes}
        return {**sizes, "device": self.device, **self.extra}

    def worker_environment(self) -> dict[str, str]:
        """What is added to the environment of a worker."""
        threads = str(self.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.gpu_coredump is not None:
            environment.update(coredump_environment(self.gpu_coredump))
        return environment

    def worker_config(self, *, loaded: bool) -> dict[str, Any]:
        return {
            "limits": limits_config(self.limits),
            "model": str(self.spec.path),
            "device": self.device,
            "dtype": self.dtype,
            "pool_dtype": self.pool_dtype,
            "kernels": self.kernels,
            "load": self.load,
            "seed": self.seed,
            "threads": self.threads,
            "graphs": self.graphs,
            "loaded": loaded,
            "scrub_gbps": self.scrub_gbps / 2,
            "background": loaded,
            **self.extra,
        }

    def core_config(self, epoch: int, *, recover: bool) -> dict[str, Any]:
        limits = limits_config(self.limits)
        config = {"limits": limits, "epoch": epoch, "tag": self.tag, "recover": recover}
        page_bytes = self.limits.page_tokens * self.spec.kv_token_bytes(self.pool_dtype)
        scrub_pages_s = self.scrub_gbps / 2 * 1e9 / page_bytes
        margin_s = MARGIN_S if self.gpu_coredump is None else MARGIN_S + WRITING_S
        times = {"step_timeout_s": self.step_timeout_s, "step_margin_s": margin_s}
        times["scrub_pages_s"] = scrub_pages_s
        return {**config, **times, "fault_tokens": self.fault_tokens, **self.extra}

    def api_config(self) -> dict[str, Any]:
        return {
            "limits": limits_config(self.limits),
            "model": str(self.spec.path),
            "ids_will_do": self.load == "dummy",
            "served_name": self.served_name,
            "api_keys": list(self.api_keys),
            "cors_origins": list(self.cors_origins),
            "write_timeout_s": self.write_timeout_s,
            "keepalive_s": self.keepalive_s,
            "body_bytes_max": self.body_bytes_max,
            "drain_timeout_s": self.drain_timeout_s,
            "log_level": self.log_level,
            **self.extra,
        }
