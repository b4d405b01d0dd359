"""The README's two commands from a fresh clone: what a newcomer types first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP_TIMEOUT_S = 900


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone of HEAD with the uncommitted changes of tracked files on top."""
    folder = tmp_path_factory.mktemp("fresh") / "holdfast"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True, timeout=120)
    listed = ["git", "-C", str(ROOT), "ls-files", "-m", "-o", "--exclude-standard", "-z"]
    changed = subprocess.run(listed, check=True, capture_output=True, timeout=60)
    for name in filter(None, changed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(folder)


def environment() -> dict[str, str]:
    """Ours, without what the outer make or pytest says of itself."""
    dropped = ("MAKE", "MFLAGS", "PYTEST", "VIRTUAL_ENV", "HOLDFAST_")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def ready_within(url: str, seconds: float) -> bool:
    """Whether it answers 200. The line on the terminal is the supervisor's: each api process hears
    from the core that it can step a moment later, and says 503 until then."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status == 200
        except urllib.error.HTTPError as error:
            assert error.code == 503
            time.sleep(0.05)
    return False


@pytest.mark.slow
def test_make_test_and_make_serve_work_from_a_fresh_clone(clone: Path) -> None:
    tested = subprocess.run(
        ["make", "test", "ARGS=tests/kv tests/wire/test_link.py"],
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SETUP_TIMEOUT_S,
    )
    assert tested.returncode == 0, tested.stdout[-3000:] + tested.stderr[-3000:]
    assert " passed" in tested.stdout

    serve = subprocess.Popen(
        ["make", "serve", "PORT=0", "ARGS=--kv-pages 400 --max-rows 4 --threads 1"],
        cwd=clone,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    try:
        assert serve.stdout is not None
        deadline_s = time.monotonic() + 120
        for line in serve.stdout:
            said.append(line)
            assert time.monotonic() < deadline_s, "".join(said)
            if "curl" in line:
                break
        address = next(line for line in said if "http://" in line).split("http://")[1].split()[0]
        assert ready_within(f"http://{address.strip()}/ready", 5.0)
    finally:
        os.killpg(serve.pid, signal.SIGINT)
        serve.wait(60)
        serve.stdout.close()
    assert (clone / ".venv" / ".installed").exists()
