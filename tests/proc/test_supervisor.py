"""The supervisor with fake roles: every kind of death, drain, and nothing left behind."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, gone, until

from holdfast.proc.pace import FREE_S

Serve = Callable[..., Server]
ROLES = ("holdfast api 0", "holdfast api 1", "holdfast core", "holdfast keeper 0")


def start_real_core(serve: Serve) -> Server:
    modules = {"api": "fake_role", "worker": "sim_worker"}
    return serve(api_processes=1, modules=modules, extra={"step_s": 0})


def test_every_process_gets_its_descriptors_and_is_titled(serve: Serve) -> None:
    server = serve().wait_ready()
    pids = server.pids()
    assert set(pids) == {*ROLES, "holdfast worker 0"}
    for title, pid in pids.items():
        assert Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0") == title.encode()
    assert server.log("core", "boot")[0]["fds"] == ["control", "journal", "metrics"]
    assert server.log("api", "boot")[0]["fds"] == ["control", "core", "listen", "metrics"]
    assert server.log("worker", "boot")[0]["fds"] == ["control", "pool", "weights"]
    assert server.log("keeper", "boot")[0]["fds"] == ["control"]
    # Both api processes and the worker were introduced to the core, each with a descriptor.
    assert [m["message"]["index"] for m in server.messages("core", "api", fds=1)] == [0, 1]
    assert server.messages("core", "worker", epoch=1, fds=1)


def test_a_dead_worker_is_fenced_and_replaced_over_weights_that_are_held(serve: Serve) -> None:
    server = serve().wait_ready()
    before = server.pids()
    # It notes its promotion a moment after it has it; killed before that, it never would.
    until("noted", lambda: server.messages("worker", "promote"))
    os.kill(before["holdfast worker 0"], signal.SIGKILL)
    until("new worker at the core", lambda: server.messages("core", "worker", epoch=2, fds=1))
    assert server.messages("core", "worker_lost", epoch=1)
    assert [boot["loaded"] for boot in server.log("worker", "boot")] == [False, True]
    # A worker notes its promotion a moment after the core does.
    until("promoted", lambda: len(server.messages("worker", "promote", fds=1)) == 2)
    assert [m["message"]["epoch"] for m in server.messages("worker", "promote")] == [1, 2]
    assert server.messages("keeper", "weights_sum", loaded=True)
    until("restarted", lambda: server.event("restarted", "worker"))
    assert "SIGKILL" in server.event("lost", "worker")[2]
    after = server.pids()
    assert {t for t in before if before[t] != after[t]} == {"holdfast worker 0"}


def test_a_worker_that_finds_other_weights_never_serves_and_they_are_loaded_anew(
    serve: Serve,
) -> None:
    server = serve(act={"worker": "damaged"}).wait_ready()
    # It notes its promotion a moment after it has it; killed before that, it never would.
    until("noted", lambda: server.messages("worker", "promote"))
    os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)
    until("second epoch", lambda: server.messages("core", "worker", epoch=2))
    assert server.messages("keeper", "weights_forget")
    boots = server.log("worker", "boot")
    assert [boot["loaded"] for boot in boots] == [False, True, False]
    # The damaged one never had an epoch. A worker notes its promotion a moment after the core does.
    until("promoted", lambda: len(server.messages("worker", "promote")) == 2)
    promoted = [message["pid"] for message in server.messages("worker", "promote")]
    assert promoted == [boots[0]["pid"], boots[2]["pid"]]


def test_where_memory_cannot_be_shared_each_worker_loads_its_own_and_there_is_no_standby(
    serve: Serve,
) -> None:
    server = serve(act={"keeper": "unshared"}, standby="warm").wait_ready()
    assert "CUDA_ERROR" in server.event("warning", "keeper")[2]
    os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)
    until("second epoch", lambda: server.messages("core", "worker", epoch=2))
    boots = server.log("worker", "boot")
    assert [boot["loaded"] for boot in boots] == [False, False]
    assert all(boot["fds"] == ["control"] for boot in boots)
    # What it loaded is compared with what the first one did.
    until("compared", lambda: server.messages("keeper", "weights_sum", loaded=True))
    assert not server.log("standby", "boot")


def test_a_dead_core_is_replaced_by_one_that_recovers_and_both_sides_are_linked_anew(
    serve: Serve,
) -> None:
    server = serve().wait_ready()
    before = server.pids()
    os.kill(before["holdfast core"], signal.SIGKILL)
    until("worker of epoch 2", lambda: server.messages("core", "worker", epoch=2))
    assert [boot["recover"] for boot in server.log("core", "boot")] == [False, True]
    for index in (0, 1):
        until("eof", lambda i=index: server.log("api", "eof", index=i, link="core"))
        assert server.messages("api", "core_lost", index=index)
        assert server.messages("api", "core", index=index, fds=1)
    new_core = server.log("core", "boot")[1]["pid"]
    linked = server.messages("core", "api", pid=new_core, fds=1)
    # Their processes are the old ones: what they asked for before is still theirs.
    first = {
        m["message"]["index"]: m["message"]["first_id"] for m in server.messages("core", "api")
    }
    assert {m["message"]["index"]: m["message"]["first_id"] for m in linked} == first
    after = server.pids()
    replaced = {"holdfast core", "holdfast worker 0"}
    assert {t for t in before if before[t] != after[t]} == replaced


def test_a_dead_api_process_is_replaced_and_its_port_never_closes(serve: Serve) -> None:
    server = serve(api_processes=1).wait_ready()
    port = server.event("ready")[3]["port"]
    os.kill(server.pids()["holdfast api 0"], signal.SIGKILL)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        until("new api at the core", lambda: len(server.messages("core", "api", index=0)) == 2)
    assert server.messages("core", "api_lost", index=0)
    # And what its predecessor asked for is not.
    before, after = (m["message"]["first_id"] for m in server.messages("core", "api"))
    assert after > before


def test_a_late_accusation_of_a_dead_api_process_does_not_hit_the_next_one(serve: Serve) -> None:
    """The core sees a link's end on its own clock; by then another process is up."""
    server = serve(api_processes=1, act={"core": "accuse"}).wait_ready()
    os.kill(server.pids()["holdfast api 0"], signal.SIGKILL)
    until("restarted", lambda: server.event("restarted", "api"))
    lost = [event[2] for event in server.events() if event[0] == "lost"]
    assert len(lost) == 1 and "late" not in lost[0]


def test_a_dead_keeper_is_replaced_with_new_memory_and_the_core_hears_that_it_is_new(
    serve: Serve,
) -> None:
    server = serve(standby="warm").wait_ready()
    until("a standby", lambda: server.event("prepared", "standby"))
    before = server.pids()
    os.kill(before["holdfast keeper 0"], signal.SIGKILL)
    until("new worker at the core", lambda: server.messages("core", "worker", epoch=2, fds=1))
    assert [boot["loaded"] for boot in server.log("worker", "boot")] == [False, False]
    told = [m["message"]["memory"] for m in server.messages("core", "worker")]
    assert told == ["lost", "lost"]
    assert gone(before["holdfast worker 0"]) and gone(before["holdfast standby 0"])
    after = server.pids()
    kept = {"holdfast core", "holdfast api 0", "holdfast api 1"}
    assert {title for title in before if before[title] == after.get(title)} == kept
    # A worker that is lost now leaves its memory.
    os.kill(after["holdfast worker 0"], signal.SIGKILL)
    until("epoch 3", lambda: server.messages("core", "worker", epoch=3, memory="kept"))


def test_the_descriptors_of_a_dead_keeper_are_closed(serve: Serve) -> None:
    server = serve().wait_ready()

    def held() -> list[str]:
        folder = Path(f"/proc/{server.pid}/fd")
        links = [os.readlink(fd) for fd in folder.iterdir() if fd.exists() or fd.is_symlink()]
        return sorted(
            link
            for link in links
            if link.startswith("/memfd:holdfast-")
            and "journal" not in link
            and "metrics" not in link
        )

    assert len(held()) == 2
    os.kill(server.pids()["holdfast keeper 0"], signal.SIGKILL)
    until("new worker at the core", lambda: server.messages("core", "worker", epoch=2, fds=1))
    assert len(held()) == 2


@pytest.mark.parametrize(
    "title", ["holdfast core", "holdfast api 0", "holdfast keeper 0", "holdfast standby 0"]
)
def test_a_process_that_hangs_without_a_deadline_is_found_by_its_silence(
    serve: Serve, title: str
) -> None:
    server = serve(standby="warm", heartbeat_timeout_s=2.0).wait_ready()
    until("a standby", lambda: server.event("prepared", "standby"))
    pid = server.pids()[title]
    os.kill(pid, signal.SIGSTOP)
    lost = until("lost", lambda: server.event("lost", title))
    assert "it answered nothing for 2 s" in lost[2]
    until("replaced", lambda: server.pids()[title] not in (pid, None))


def test_a_fault_is_told_with_its_three_clocks(serve: Serve) -> None:
    server = start_real_core(serve).wait_ready()
    os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)
    told = until("resumed", lambda: server.event("resumed", "worker"))
    assert re.fullmatch(
        r"killed by SIGKILL; noticed by end of file, fenced [0-9.]+ m?s, resumed [0-9.]+ m?s, "
        r"0 streams",
        told[2],
    )


@pytest.mark.parametrize(
    "role", ["holdfast core", "holdfast worker 0", "holdfast api 0", "holdfast keeper 0"]
)
def test_a_process_that_keeps_dying_is_given_up_with_one_clear_line(
    serve: Serve, role: str
) -> None:
    server = serve(restarts_per_minute=1).wait_ready()
    first = server.pids()[role]
    os.kill(first, signal.SIGKILL)
    second = until("second", lambda: (p := server.pids()[role]) != first and p)
    until("restarted", lambda: server.event("restarted", role))
    until("a worker", lambda: server.status()["ready"])
    os.kill(second, signal.SIGKILL)
    assert server.wait_exit() == 70
    assert f"{role} ended 2 times in a minute; last: killed by SIGKILL" in server.event("failed")[2]


@pytest.mark.parametrize("role", ["keeper", "worker", "core", "api"])
def test_an_operator_fault_at_start_is_one_line_and_exit_code_2(serve: Serve, role: str) -> None:
    server = serve(act={role: "operator"})
    assert server.wait_exit() == 2
    assert server.event("operator")[2] == "no such model"
    assert server.stderr() == ""


def test_a_process_that_crashes_at_every_start_does_not_loop_for_ever(serve: Serve) -> None:
    server = serve(act={"core": "crash"}, restarts_per_minute=2)
    assert server.wait_exit() == 70
    assert "exit code 3" in server.event("failed")[2]
    assert len(server.log("core", "boot")) == 3


def test_a_process_that_never_gets_ready_is_ended_at_its_deadline(serve: Serve) -> None:
    server = serve(act={"worker": "mute"}, start_timeout_s=0.5, restarts_per_minute=0)
    assert server.wait_exit() == 70
    assert "it said nothing for 0.5 s while starting" in server.event("failed")[2]


def test_sigterm_drains_and_exits_0(serve: Serve) -> None:
    server = serve().wait_ready()
    pids = server.pids()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert server.messages("api", "drain", index=0) and server.messages("core", "drain")
    # Nothing was live: nothing was ended, and everybody stopped by being told.
    assert not server.messages("core", "end_all")
    for role in ("api", "core", "worker", "keeper"):
        assert server.messages(role, "stop")
    assert all(gone(pid) for pid in pids.values())


def test_streams_that_outlast_the_drain_deadline_are_ended_with_shutdown(serve: Serve) -> None:
    server = serve(act={"core": "busy"}, drain_timeout_s=0.2).wait_ready()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit() == 0
    assert server.messages("core", "end_all", end=7)


def test_a_second_signal_ends_everything_at_once(serve: Serve) -> None:
    server = serve(act={"core": "busy"}, drain_timeout_s=600).wait_ready()
    pids = server.pids()
    server.process.send_signal(signal.SIGTERM)
    until("draining", lambda: server.event("draining"))
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 128 + signal.SIGTERM
    assert all(gone(pid) for pid in pids.values())


def test_a_worker_that_dies_while_draining_is_still_replaced(serve: Serve) -> None:
    server = serve(act={"core": "busy"}, drain_timeout_s=600).wait_ready()
    server.process.send_signal(signal.SIGTERM)
    until("draining", lambda: server.event("draining"))
    os.kill(server.pids()["holdfast worker 0"], signal.SIGKILL)
    until("new worker", lambda: server.messages("core", "worker", epoch=2))


def test_after_sigkill_of_the_supervisor_nothing_is_left(serve: Serve) -> None:
    server = serve().wait_ready()
    pids = server.pids()
    shm = set(os.listdir("/dev/shm"))
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(5)
    for title, pid in pids.items():
        until(f"{title} gone", lambda pid=pid: gone(pid), 5)
    assert f"@holdfast-{server.pid}\n" not in Path("/proc/net/unix").read_text()
    assert {name for name in os.listdir("/dev/shm") if name not in shm} == set()


def test_a_signal_to_the_whole_group_still_drains(serve: Serve) -> None:
    """systemd and a terminal's Ctrl-C signal every process; only the supervisor may act on it."""
    server = serve(act={"core": "busy"}, drain_timeout_s=600).wait_ready()
    pids = server.pids()
    for pid in pids.values():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    server.process.send_signal(signal.SIGTERM)
    until("drain at the api", lambda: server.messages("api", "drain", index=1))
    assert server.pids() == pids


def test_a_port_in_use_is_one_line_even_when_the_other_server_shares_its_port(
    serve: Serve,
) -> None:
    server = serve().wait_ready()
    port = server.event("ready")[3]["port"]
    second = serve(port=port)
    assert second.wait_exit() == 2
    assert second.event("operator")[2] == f"--port: {port} is in use; choose another"
    assert second.stderr() == ""
    assert not second.log("keeper", "boot")


@pytest.mark.parametrize(("device", "told"), [("cuda:0", True), ("cpu", False)])
def test_a_gpus_standby_is_told_again_and_again_that_nobody_streams(
    serve: Serve, device: str, told: bool
) -> None:
    act = {"standby": "preparing"}
    server = serve(act=act, standby="warm", device=device).wait_ready()
    if told:
        until("told", lambda: len(server.messages("standby", "unwatched")) >= 3)
        ends_s = [m["message"]["until_s"] for m in server.messages("standby", "unwatched")]
        gaps = [after - before for before, after in itertools.pairwise(ends_s)]
        # Before the last word was past, and not without end.
        assert all(gap >= FREE_S / 2 for gap in gaps) and min(gaps) <= 1.5 * FREE_S
    else:
        until("there", lambda: server.log("standby", "boot"))
        until("pinged", lambda: server.messages("core", "worker"))
        assert not server.messages("standby", "unwatched")
