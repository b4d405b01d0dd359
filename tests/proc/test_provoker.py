"""Breaking a server on purpose: only with --drills, only over its status socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, until

from holdfast.config import Limits
from holdfast.errors import OptionError
from holdfast.proc import status
from holdfast.proc.options import ServeOptions
from holdfast.proc.provoker import REFUSAL

Serve = Callable[..., Server]
KILL = {"do": "signal", "signal": "SIGKILL", "roles": ["worker 0"]}


def provoke(server: Server, order: Any) -> dict[str, Any]:
    answer = status.ask(server.pid, {"provoke": order})
    assert answer is not None
    return answer


def test_a_server_without_drills_refuses_every_order_and_lives_on(serve: Serve) -> None:
    server = serve().wait_ready()
    pids = server.pids()
    assert provoke(server, KILL) == {"error": REFUSAL}
    assert "drills" not in server.status()
    assert status.ask(server.pid, {"stop": 1}) == {"error": "unknown request: stop"}
    assert server.pids() == pids


def test_with_drills_a_role_is_killed_and_the_moments_are_kept(serve: Serve) -> None:
    server = serve(drills=True).wait_ready()
    assert "--drills" in server.event("warning")[2]
    answer = provoke(server, KILL)
    until("restarted", lambda: server.event("restarted", "worker"))
    moments = [m for m in server.status()["drills"] if m["at_s"] >= answer["at_s"] - 0.1]
    assert [m["event"] for m in moments if "worker" in m["title"]][-2:] == ["exited", "promoted"]
    assert sorted(m["at_s"] for m in moments) == [m["at_s"] for m in moments]


def test_a_standby_is_told_to_hurry_as_when_it_is_needed(serve: Serve) -> None:
    server = serve(drills=True, standby="warm").wait_ready()
    assert "no process is" in provoke(serve(drills=True).wait_ready(), {"do": "hurry"})["error"]
    until("a standby", lambda: server.pids().get("holdfast standby 0"))
    assert "at_s" in provoke(server, {"do": "hurry"})
    until("its word", lambda: server.messages("standby", "hurry"))
    until("rest", lambda: status.at_rest(server.status()))


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ({"do": "tea"}, "nothing is called 'tea'"),
        ({"do": "signal", "signal": "SIGHUP", "roles": ["core"]}, "'SIGHUP' is none of"),
        ({"do": "signal", "signal": "SIGKILL", "roles": ["worker 9"]}, "no process is 'worker 9'"),
        ({"do": "signal"}, "KeyError"),
        ("tea", "TypeError"),
    ],
)
def test_an_order_that_makes_no_sense_is_told_so(serve: Serve, order: Any, why: str) -> None:
    server = serve(drills=True).wait_ready()
    answer = provoke(server, order)
    assert why in answer.get("error", "")


def test_drills_are_for_this_machine_alone(tmp_path: Path) -> None:
    class Spec:
        path = tmp_path

        def weights_bytes(self, dtype: str) -> int:
            return 1

        kv_token_bytes = weights_bytes

    with pytest.raises(OptionError, match=r"--drills: only on 127\.0\.0\.1"):
        limits = Limits(vocab_size=8, context_tokens=64, pages=8, live_tokens=1024)
        ServeOptions(spec=Spec(), limits=limits, served_name="x", host="0.0.0.0", drills=True)
