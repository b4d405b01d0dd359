"""Vllm: another engine's side of a bench, run by the Python that has it, after ours has ended.

Owns the peer's processes' command lines, its settings (those that its published figures were taken
with) and what it says. Never imports vllm. Every wait has the deadline that the bench gives.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from holdfast.bench.peers import run_vllm
from holdfast.bench.process import HOST, Server, begin, end, tail
from holdfast.bench.report import PeerFigure
from holdfast.bench.timed import PeerSide, Report, Spent, Task
from holdfast.errors import OperatorError, OptionError
from holdfast.model.spec import ModelSpec

NAME = "vllm"
# gpu/README.md's method: what the figures to beat were measured with.
ROWS_MAX = 256
CONTEXT_TOKENS = 8192
MEMORY_SHARE = 0.85
_VERSION_S = 120.0
# To end by itself, its engine's processes too, after its last word.
_END_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """python: an executable that can import vllm. path: folders before its PYTHONPATH.

    load: hf or dummy, as ours; dtype: ours. timeout_s: of one whole run of it.
    """

    model: Path
    load: str
    dtype: str
    context_tokens: int
    python: str = sys.executable
    path: tuple[Path, ...] = ()
    timeout_s: float = 900.0
    version: str = ""

    @property
    def options(self) -> dict[str, Any]:
        return {
            "max_model_len": min(CONTEXT_TOKENS, self.context_tokens),
            "max_num_seqs": ROWS_MAX,
            "gpu_memory_utilization": MEMORY_SHARE,
            "dtype": self.dtype,
            "load_format": "dummy" if self.load == "dummy" else "auto",
        }

    def found(self) -> Vllm:
        """Itself with its version. Raises OptionError("--peer-python") when it is not there."""
        with self._run([], _VERSION_S) as events:
            said = next(event["version"] for event in events if event["event"] == "version")
        return replace(self, version=said)

    def side(self) -> PeerSide:
        return PeerSide(NAME, self.version, {}, self.options)

    def measure(self, tasks: Sequence[Task], report: Report, side: PeerSide) -> None:
        """Run `tasks` in one process of it; `side` is told each as it ends.

        Raises OptionError, or OperatorError with its words.
        """
        with self._run(tasks, self.timeout_s) as events:
            for event in events:
                if event["event"] == "spent":
                    side.spent[event["key"]] = Spent(event["seconds"], 0.0)
                report(f"{NAME} {self.version}", len(side.spent), len(tasks))
        if missing := [task.key for task in tasks if task.key not in side.spent]:
            raise OperatorError(f"{NAME} left out {missing[0]!r}")

    def figure(self, runs: tuple[float, ...]) -> PeerFigure:
        return PeerFigure(name=NAME, version=self.version, runs=runs, options=self.options)

    @contextmanager
    def server(self, name: str, spec: ModelSpec) -> Iterator[Server]:
        """How its server is started; its model's folder is there meanwhile."""
        with tempfile.TemporaryDirectory(prefix="holdfast-model-") as made:
            folder = self.served_folder(Path(made), spec.vocab_size, spec.end_ids)
            yield self._server(folder, name)

    def _server(self, folder: Path, name: str) -> Server:
        options = {key.replace("_", "-"): value for key, value in self.options.items()}
        given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        words = [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
        words += ["--served-model-name", name, "--host", HOST, *given, "--no-enable-log-requests"]
        return Server(
            name=NAME,
            command=lambda port: [*words, "--port", str(port)],
            env=self.environment(),
            ready_path="/health",
            timeout_s=self.timeout_s,
            option="--peer-python",
        )

    def served_folder(self, made: Path, vocab_size: int, end_ids: Sequence[int]) -> Path:
        """A folder that its server takes: the model's own, or, where that has no tokenizer, `made`
        with links to the model's files and a tokenizer whose words are t0, t1, ..."""
        if (self.model / "tokenizer.json").is_file():
            return self.model.resolve()
        for path in self.model.resolve().iterdir():
            (made / path.name).symlink_to(path)
        words = tokenizers.models.WordLevel(
            {f"t{token}": token for token in range(vocab_size)}, unk_token="t0"
        )
        tokenizer = tokenizers.Tokenizer(words)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(made / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "t0",
            "eos_token": f"t{end_ids[0] if end_ids else 0}",
        }
        (made / "tokenizer_config.json").write_text(json.dumps(settings))
        return made

    def environment(self) -> dict[str, str]:
        """Of its processes: ours, its folders first, and the settings of run_vllm."""
        path = [str(folder.resolve()) for folder in self.path]
        if inherited := os.environ.get("PYTHONPATH"):
            path.append(inherited)
        return {**run_vllm.SETTINGS, **os.environ, "PYTHONPATH": os.pathsep.join(path)}

    @contextmanager
    def _run(self, tasks: Sequence[Task], timeout_s: float) -> Iterator[Iterator[dict[str, Any]]]:
        """Its events, while it runs; it is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="holdfast-peer-") as folder:
            job, log = Path(folder) / "job.json", Path(folder) / "log"
            job.write_text(json.dumps({"llm": self._llm(), "tasks": list(map(_plain, tasks))}))
            command = [self.python, str(Path(run_vllm.__file__)), str(job)]
            process = begin(
                command,
                env=self.environment(),
                log=log,
                stdout=subprocess.PIPE,
                option="--peer-python",
            )
            done = False
            try:
                yield self._events(process, log, time.monotonic() + timeout_s, timeout_s)
                done = True
            finally:
                end(process, grace_s=_END_S if done else 0.0, ask=not done)
                assert process.stdout is not None
                process.stdout.close()

    def _events(
        self, process: subprocess.Popen[bytes], log: Path, deadline_s: float, timeout_s: float
    ) -> Iterator[dict[str, Any]]:
        for line in _lines(process, deadline_s, timeout_s):
            try:
                event = json.loads(line)
                kind = event["event"]
            except (ValueError, KeyError, TypeError):
                raise OperatorError(f"{NAME} said {line[:80]!r}, which is no event") from None
            if kind == "end":
                return
            if kind == "failed":
                raise OptionError("--peer-python", f"{self.python}: {event['message']}")
            yield event
        code = process.wait(_END_S)
        raise OperatorError(f"{NAME} ended with code {code} before its work was done: {tail(log)}")

    def _llm(self) -> dict[str, Any]:
        return {
            "model": str(self.model.resolve()),
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **self.options,
        }


def _plain(task: Task) -> dict[str, Any]:
    return {
        "key": task.key,
        "prompts": task.work.prompts,
        "output_tokens": task.work.output_tokens,
        "temperature": task.temperature,
    }


def _lines(
    process: subprocess.Popen[bytes], deadline_s: float, timeout_s: float
) -> Iterator[bytes]:
    """Whole lines of its stdout until that ends. Raises OperatorError at the deadline."""
    assert process.stdout is not None
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                raise OperatorError(
                    f"{NAME} was not done within {timeout_s:g} s; see --peer-timeout-s"
                )
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            *lines, held = (held + data).split(b"\n")
            yield from lines
