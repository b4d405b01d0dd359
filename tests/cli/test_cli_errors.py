"""What a wrong command says: one line on stderr that says what to do, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import __version__
from holdfast.__main__ import run
from holdfast.cuda_driver import Driver
from holdfast.errors import OptionError

COMMANDS = (
    (),
    ("serve",),
    ("chat",),
    ("generate",),
    ("plan",),
    ("ps",),
    ("faults",),
    ("replay",),
    ("bench",),
    ("bench", "offline"),
    ("bench", "decode"),
    ("bench", "prefill"),
    ("bench", "generate"),
    ("bench", "start"),
    ("bench", "core"),
    ("bench", "serve"),
)


# A share and a count of cores, and a name.
UNITLESS = ("--gpu-memory-utilization", "--threads", "--port", "--scrub")


def holdfast(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOLDFAST_")}
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "COLUMNS": "100", **env},
        check=False,
    )


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("holdfast: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_reads_and_needs_no_model(command: tuple[str, ...]) -> None:
    done = holdfast(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: holdfast" in done.stdout
    assert done.stderr == ""


def test_serve_help_groups_its_options_and_shows_their_defaults() -> None:
    text = holdfast("serve", "--help").stdout
    for panel in ("Model", "Batching and memory", "Network", "Deadlines", "Processes and journal"):
        assert f"─ {panel} ─" in text
    for option in ("--max-rows", "--kv-pages", "--page-tokens", "--prefill-tokens", "--host"):
        assert option in text
    assert "[default: 8000]" in text


def test_every_number_option_of_serve_names_its_unit() -> None:
    text = holdfast("serve", "--help", COLUMNS="200").stdout
    numbers = re.findall(r"(--[a-z-]+)\s+<(?:int|float)", text)
    assert len(numbers) > 12, text
    units = ("-rows", "-pages", "-tokens", "-gib", "-s", "-requests", "-ahead", "-processes")
    for option in numbers:
        assert option.endswith(units) or option in UNITLESS, option


def test_version_is_one_line() -> None:
    done = holdfast("--version")
    assert (done.returncode, done.stdout) == (0, f"holdfast {__version__}\n")


def test_an_unknown_option_is_named_with_the_nearest_one() -> None:
    assert_one_clear_line(holdfast("serve", "--max-row", "3"), "--max-row", "--max-rows")


def test_an_unknown_command_is_named() -> None:
    assert_one_clear_line(holdfast("serf"), "serf", "serve")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-rows", "0"), ("--max-rows",)),
        (("--max-rows", "many"), ("--max-rows",)),
        (("--max-rows", "5000"), ("--max-rows", "4096", "5000")),
        (("--kv-pages", "1"), ("--kv-pages",)),
        (("--kv-pages", "9", "--kv-memory-gib", "1"), ("--kv-memory-gib", "--kv-pages")),
        (("--kv-pages", "16000000"), ("--kv-pages", "GiB", "available")),
        (("--max-context-tokens", "999999"), ("--max-context-tokens", "999999")),
        (("--live-tokens", "5"), ("--live-tokens",)),
        (("--steps-ahead", "3"), ("--steps-ahead",)),
        (("--device", "tpu"), ("--device", "tpu", "cuda:N")),
        (("--device", "cuda:x"), ("--device", "cuda:x")),
        (("--gpu-memory-utilization", "1.5"), ("--gpu-memory-utilization",)),
        (("--dtype", "bfloat16"), ("--dtype", "float32")),
        (("--kernels", "triton"), ("--kernels",)),
        (("--kernels", "fast"), ("--kernels", "reference")),
        (("--load", "pickle"), ("--load",)),
        (("--journal-sync", "often"), ("--journal-sync",)),
        (("--port", "70000"), ("--port",)),
        (("--gpu-coredump", "dumps"), ("--gpu-coredump", "--device cuda")),
        (("--fault-tokens",), ("--fault-tokens", "--fault-dir")),
        (("--fault-dir", "/dev/null/faults"), ("--fault-dir",)),
        (("--api-key", ""), ("--api-key",)),
        (("--request-timeout-s", "0"), ("--request-timeout-s",)),
        (("/no/such/model",), ("/no/such/model",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_serve_refuses_what_it_cannot_do(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A user has not set it; tests/conftest.py has.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # In this process: the subprocess tests around show that the shell sees the same.
    code = run(["serve", *arguments])
    seen = capfd.readouterr()
    done = subprocess.CompletedProcess(arguments, code, seen.out, seen.err)
    assert_one_clear_line(done, *words)


def test_a_gpu_that_cannot_be_used_is_refused_before_any_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a driver, and with a torch that has no CUDA: each says what is missing."""
    monkeypatch.setattr("holdfast.proc.cuda_probe.torch_has_cuda", lambda: False)
    code = run(["serve", "--device", "cuda"])
    seen = capfd.readouterr()
    done = subprocess.CompletedProcess((), code, seen.out, seen.err)
    assert_one_clear_line(done, "--device", "built without CUDA")
    monkeypatch.setattr("holdfast.proc.cuda_probe.torch_has_cuda", lambda: True)
    monkeypatch.setattr("holdfast.cuda_driver.LIBRARY", "libnone.so")
    with pytest.raises(OptionError, match=r"--device: cuda needs an NVIDIA driver.*libnone\.so"):
        Driver()


@pytest.mark.parametrize("content", [None, "not JSON", "[]", '{"format": "another"}'])
def test_a_file_that_is_no_fault_report_is_named(
    content: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fault.json"
    if content is not None:
        path.write_text(content)
    code = run(["faults", str(path)])
    seen = capfd.readouterr()
    done = subprocess.CompletedProcess((), code, seen.out, seen.err)
    assert_one_clear_line(done, str(path))


def test_a_folder_without_fault_reports_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["faults", str(tmp_path)]) == 0
    assert "no fault reports" in capfd.readouterr().out


def test_a_host_that_is_none_is_named() -> None:
    done = holdfast("serve", "--host", "no.such.host.invalid", "--kv-pages", "300")
    assert_one_clear_line(done, "--host", "no.such.host.invalid")


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = holdfast("serve", "--port", port, "--kv-pages", "300")
    assert_one_clear_line(done, "--port", port, "in use")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, "config.json"),
        ({"config.json": "{"}, "JSON"),
        ({"config.json": "[]"}, "object"),
        ({"config.json": '{"architectures": ["MambaForCausalLM"]}'}, "MambaForCausalLM"),
    ],
    ids=["empty folder", "broken json", "no object", "unknown architecture"],
)
def test_an_unreadable_model_says_what_is_wrong(
    tmp_path: Path, files: dict[str, str], word: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for command in ("plan", "serve", "chat"):
        assert_one_clear_line(holdfast(command, str(tmp_path)), word)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--null", "--memory"), ("--null", "--memory")),
        (("serve", "--url", "here"), ("--url", "http://HOST:PORT", "'here'")),
        (("serve", "--url", "http://h:1", "--peer", "vllm"), ("--peer", "--url")),
        (("serve", "--served-name", "x"), ("--served-name", "--url")),
        (("serve", "--server-options", "'x"), ("--server-options", "'x")),
        (("serve", "--input", "4000"), ("--input", "4256", "4096")),
        (("serve", "--concurrency", "1,x"), ("--concurrency", "1,x")),
        (("core", "--rows", "1,x"), ("--rows", "1,x")),
        (("decode", "--batch", "0"), ("--batch", "'0'")),
        (("decode", "--batch", "65"), ("--batch", "65", "--max-rows", "64")),
        (("decode", "--context", "4000"), ("--context", "4264", "4096")),
        (("prefill", "--tokens", "4096"), ("--tokens", "4097", "4096")),
        (("prefill", "--max-context-tokens", "99", "--tokens", "99"), ("--tokens", "100", "99")),
        (("start", "--peer", "transformers"), ("--peer", "offline")),
        (("decode", "--peer", "sglang"), ("--peer", "sglang", "vllm")),
        (("decode", "--peer", "vllm", "--peer-python", "/no/python"), ("--peer-python",)),
        (
            ("offline", "--peer", "transformers", "--temperature", "0.5", "--requests", "2"),
            ("--temperature", "greedy"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bench_refuses_what_it_cannot_measure(
    arguments: tuple[str, ...], words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(["bench", *arguments, *(() if arguments[0] == "core" else ("--kv-pages", "300"))])
    seen = capfd.readouterr()
    done = subprocess.CompletedProcess(arguments, code, seen.out, seen.err)
    assert_one_clear_line(done, *words)


def test_chat_without_a_server_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = holdfast("chat", "--url", f"http://127.0.0.1:{port}")
    assert_one_clear_line(done, "--url", str(port), "holdfast serve")
    assert_one_clear_line(holdfast("chat", "--url", "ftp://x"), "--url", "ftp://x")


def test_plan_prints_json_that_adds_up() -> None:
    done = holdfast("plan", "--json", "--kv-pages", "300")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["limits"]["pages"] == 300
    assert facts["binds"] == "--kv-pages"
    assert facts["kv_bytes"] == 300 * facts["page_bytes"]
    parts = ("weights_bytes", "kv_bytes", "journal_bytes", "process_bytes")
    assert facts["needed_bytes"] == sum(facts[part] for part in parts)
    assert facts["left_bytes"] == facts["available_bytes"] - facts["needed_bytes"]


def test_plan_prints_a_table_without_loading_torch() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from holdfast.__main__ import run\n"
        "sys.exit(run(['plan']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("weights", "KV pages", "rows", "left"):
        assert word in done.stdout


def test_ps_without_servers_of_ours_is_no_error() -> None:
    done = holdfast("ps", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)
