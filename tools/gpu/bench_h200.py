"""Measure us and vLLM on a GPU machine, and print one table: tools/gpu/bench_h200.py.

    python3 tools/gpu/bench_h200.py --models DIR [--out DIR] [--budget S] [--peer-path DIR]
        [--peer-python PATH] [--only PART ...] [--sizes NAME ...] [--peer-repeats N] [-- OPTION ...]

DIR of --models has a folder for each size (qwen3-0.6b, qwen3-8b) with a config.json; weights are
drawn. Parts, for each size: generate (offline, decode and prefill with one start of each engine),
serve, start. Words after `--` go to every bench as engine options, for instance
`-- --kernels reference`. The peer runs where --peer-path or --peer-python is given.

Installs nothing. It needs, on that machine: a Python with what pyproject.toml asks for, this
checkout, and for the peer a folder made by shared/gpu/pack_vllm.sh and laid out as its header says.
HOLDFAST_COMMIT says the commit, where the checkout has no .git. --out (or $OUT) gets h200.jsonl, a
row a figure, written as each part ends, and a log of each part. A part has what is left of
--budget, so that one that hangs costs the others their time and never their rows. Exit code 1 when
a part failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SIZES = ("qwen3-0.6b", "qwen3-8b")
# What gpu/README.md's figures were taken with: 256 rows, contexts of 8192.
ENGINE = ("--device", "cuda", "--load", "dummy", "--max-rows", "256", "--prefill-tokens", "8192")
ENGINE += ("--max-context-tokens", "8192")
# The first three are all there is; generate is the other three with one start of each engine.
PARTS = ("generate", "serve", "start", "offline", "decode", "prefill")
CONCURRENCY = {"qwen3-0.6b": "64,256", "qwen3-8b": "1,64,256"}
# A part ends itself before its time is up, so that it can say what it was at.
MARGIN_S = 10.0
# Below this nothing can be started and measured.
LEAST_S = 45.0


def command(part: str, size: str, asked: argparse.Namespace, left_s: float) -> list[str]:
    """The words of one part."""
    model = str(asked.models / size)
    words = [sys.executable, "-m", "holdfast", "bench", part, model, *ENGINE, *asked.engine]
    words += ["--json", str(asked.out / "h200.jsonl")]
    words += ["--repeats", str(asked.repeats)]
    if part in ("generate", "offline"):
        words += ["--work", "peers"]
    if part == "serve":
        words += ["--concurrency", CONCURRENCY.get(size, "64")]
        words += ["--run-timeout-s", str(round(left_s))]
    if part in ("serve", "start"):
        words += ["--ready-timeout-s", str(round(left_s))]
    if asked.peer_path or asked.peer_python:
        words += ["--peer", "vllm", "--peer-timeout-s", str(round(left_s))]
        words += ["--peer-repeats", str(asked.peer_repeats)]
        for path in asked.peer_path or ():
            words += ["--peer-path", str(path)]
        if asked.peer_python:
            words += ["--peer-python", asked.peer_python]
    return words


def run(part: str, size: str, asked: argparse.Namespace, left_s: float) -> bool:
    """One part; whether it was measured. Its last words are printed when not."""
    log = asked.out / f"{part}-{size}.log"
    words = command(part, size, asked, left_s - MARGIN_S)
    started_s = time.monotonic()
    print(f"-- {part} {size}, at most {left_s:.0f} s", flush=True)
    with log.open("w") as said:
        # Interrupted, it ends its servers and its peer before itself.
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            code = process.wait(left_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            code = 124
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
    print(log.read_text(errors="replace")[-(6000 if code else 2500) :], flush=True)
    print(f"-- {part} {size}: code {code}, {time.monotonic() - started_s:.0f} s", flush=True)
    return code == 0


def main() -> int:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all parts")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS[:3])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--peer-path", type=Path, action="append")
    parser.add_argument("--peer-python")
    asked = parser.parse_args(words[:at])
    asked.engine = words[at + 1 :]
    asked.out = asked.out.resolve()
    asked.models = asked.models.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    if missing := [size for size in asked.sizes if not (asked.models / size).is_dir()]:
        parser.error(f"{asked.models} has no {missing[0]}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    end_s = time.monotonic() + asked.budget
    failed = []
    for part in asked.only:
        for size in asked.sizes:
            left_s = end_s - time.monotonic()
            if left_s < LEAST_S or not run(part, size, asked, left_s):
                failed.append(f"{part} {size}")
    _table(asked.out / "h200.jsonl")
    if failed:
        print(f"not measured: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _table(path: Path) -> None:
    from holdfast.bench import report

    if not path.exists():
        return
    columns = ("", "ours", "unit", "peer", "ratio", "floor")
    lines = []
    for row in report.newest(report.read(path)):
        place = report.place(row["batch"], row["concurrency"])
        name = " ".join(part for part in (row["bench"], row["model"], place, row["metric"]) if part)
        peer = row["peer"]
        shown = ["" if peer is None else report.short(peer["value"])]
        shown += ["" if row["ratio"] is None else f"{row['ratio']:.2f}"]
        shown += ["" if row["floor"] is None else report.short(row["floor"])]
        lines.append((name, report.short(row["value"]), row["unit"], *shown))
    print("\n" + report.table(columns, lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
