"""Starting a child: what it is given, how it learns of its parent's death, what does not end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import gone, until

from holdfast.config import Limits
from holdfast.errors import LinkClosed
from holdfast.proc.child import Child, limits_config, spawn

Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start a child that runs `body` after boot, with `start` and `control` at hand."""
    monkeypatch.syspath_prepend(str(tmp_path))
    children: list[Child] = []

    def run(body: str, **options: object) -> Child:
        module = f"child_{len(children)}"
        head = "import os\nfrom holdfast.proc.child import boot\nstart = boot()\n"
        text = head + "control = start.control()\n" + textwrap.dedent(body)
        (tmp_path / f"{module}.py").write_text(text)
        options = {"config": {}, "fds": {}, **options}
        children.append(spawn("api", 3, module=module, **options))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        assert child.wait(10) is not None
        child.close()


def test_a_child_reads_its_config_limits_and_descriptors(start: Start) -> None:
    limits = Limits(vocab_size=10, context_tokens=64)
    read, write = os.pipe()
    config = {"limits": limits_config(limits), "key": b"\x00\xff", "keys": ["a"]}
    body = """
    os.write(start.fds["pipe"], b"here")
    control.ready(
        role=start.role, index=start.index, context=start.limits.context_tokens,
        key=start.config["key"], boot=os.environ.get("HOLDFAST_BOOT_FD"),
        open=sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
        inheritable=[os.get_inheritable(fd) for fd in start.fds.values()],
    )
    """
    # A descriptor that is inheritable here must not reach the child all the same.
    other = os.dup(read)
    os.set_inheritable(other, True)
    child = start(body, config=config, fds={"pipe": write})
    message, _ = child.control.wait(10)
    assert os.read(read, 4) == b"here"
    assert (message["role"], message["index"], message["context"]) == ("api", 3, 64)
    assert message["key"] == b"\x00\xff" and message["boot"] is None
    assert message["inheritable"] == [False, False]
    assert other not in message["open"] and read not in message["open"]
    assert child.wait(10) == 0
    for fd in (read, write, other):
        os.close(fd)


def test_death_is_end_of_file_on_control_and_a_readable_pidfd(start: Start) -> None:
    child = start("control.ready()\nimport time; time.sleep(600)")
    assert child.control.wait(10)[0]["type"] == "ready"
    assert child.wait(0) is None
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    with pytest.raises(LinkClosed):
        child.control.wait(10)
    child.kill()  # Harmless after the end.


def test_a_child_in_the_background_dies_at_once_on_a_machine_without_time_to_spare(
    start: Start,
) -> None:
    body = """
    import threading
    held = bytearray(256 << 20)
    held[::4096] = b"x" * (len(held) // 4096)

    def work():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        control.ready()
        while True:
            pass

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    threading.Thread(target=work, daemon=True).start()
    while True:
        pass
    """
    child = start(body)
    assert child.control.wait(30)
    try:
        os.sched_setscheduler(child.pid, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        pytest.skip("an ordinary user takes no thread out of the background")
    busy = [
        start(f"os.sched_setaffinity(0, {{{core}}})\ncontrol.ready()\nwhile True: pass")
        for core in [min(os.sched_getaffinity(0))] * 3
    ]
    for other in busy:
        assert other.control.wait(30)
    child.kill()
    assert child.wait(2.0) == -signal.SIGKILL


def test_signals_that_arrive_before_boot_do_not_end_a_child(start: Start) -> None:
    child = start("control.ready()\ncontrol.wait(600)")
    # The interpreter has hardly begun: the signals were blocked before the process was made.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.pid, number)
    assert child.control.wait(10)[0]["type"] == "ready"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.pid, number)
    child.control.send({"type": "stop"})
    assert child.wait(10) == 0


def test_spawn_leaves_the_parents_signal_mask_and_descriptors_as_they_were(start: Start) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    before = set(os.listdir("/proc/self/fd"))
    child = start("pass")
    assert child.wait(10) == 0
    child.control.close()
    os.close(child.pidfd)
    child.pidfd = -1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_child_finds_the_modules_of_its_parent_and_not_those_of_its_directory(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "elsewhere"
    trap.mkdir()
    (trap / "msgspec.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(trap)
    child = start("control.ready()")
    assert child.control.wait(10)[0]["type"] == "ready"


PARENT = """
import sys, time
from holdfast.proc.child import spawn
child = spawn("api", 0, module=sys.argv[1], config={}, fds={})
print(child.pid, flush=True)
time.sleep(600)
"""


def parent_of(tmp_path: Path, module: str, body: str) -> tuple[subprocess.Popen, int]:
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(body))
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, module],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout is not None
    with process.stdout as out:
        return process, int(out.readline())


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    body = f"""
    import os, time
    from holdfast.proc.child import boot
    boot()
    open({str(tmp_path / "up")!r}, "w").close()
    time.sleep(600)
    """
    process, pid = parent_of(tmp_path, "sleeper", body)
    until("child up", (tmp_path / "up").exists)
    process.kill()
    process.wait(10)
    until("child gone", lambda: gone(pid))


def test_a_child_whose_parent_died_before_boot_ends_at_boot(tmp_path: Path) -> None:
    """PR_SET_PDEATHSIG says nothing of a parent that was dead when it was set."""
    body = f"""
    import os, time
    deadline = time.monotonic() + 20
    while not os.path.exists({str(tmp_path / "orphan")!r}) and time.monotonic() < deadline:
        time.sleep(0.001)
    from holdfast.proc.child import boot
    boot()
    open({str(tmp_path / "after")!r}, "w").close()
    """
    process, pid = parent_of(tmp_path, "orphan", body)
    process.kill()
    process.wait(10)
    (tmp_path / "orphan").touch()
    until("child gone", lambda: gone(pid))
    assert not (tmp_path / "after").exists()
