"""The state table of the processes, walked: every reachable state, and every event in it.

What the walk asserts is in lifecycle_world (`Violation`). Its sabotages break the table in one
place and must be found, so that a walk that finds nothing means something.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lifecycle_world import NOW_S, Violation, Walk, walk

from holdfast.errors import LinkError
from holdfast.proc.lifecycle.actions import (
    Action,
    Count,
    Happened,
    Kill,
    Lost,
    Promote,
    Spawn,
    Tell,
)
from holdfast.proc.lifecycle.document import document
from holdfast.proc.lifecycle.joints import JOINTS, Joint
from holdfast.proc.lifecycle.machine import Lifecycle
from holdfast.proc.lifecycle.policy import RESTART_WINDOW_S, STANDBY_PAUSE_S, Policy
from holdfast.proc.lifecycle.states import EVENTS, STATES, Event, Phase, Role, Standby, State, Turn
from holdfast.proc.lifecycle.table import ROWS, TABLE, Step, table
from holdfast.proc.lifecycle.turns import TURNS
from holdfast.wire.messages import Memory

DOCS = Path(__file__).parents[2] / "docs" / "processes.md"
WALKS: dict[str, dict[str, Any]] = {
    "none": {"policy": Policy(apis=0, standby=Standby.NONE)},
    "warm": {"policy": Policy(apis=0, standby=Standby.WARM)},
    "cold": {"policy": Policy(apis=0, standby=Standby.COLD)},
    # An api process meets only the core, so the workers do what they should here.
    "api": {
        "policy": Policy(apis=1, standby=Standby.NONE),
        "sound": (Role.WORKER, Role.STANDBY),
    },
}


@pytest.fixture(scope="module")
def walks() -> dict[str, Walk]:
    return {name: walk(**options) for name, options in WALKS.items()}


def test_every_reachable_state_holds_what_must_hold_and_heals(walks: dict[str, Walk]) -> None:
    """No violation was raised; and the walks are as large as they were when they were trusted."""
    assert walks["none"].states > 4_000
    assert walks["cold"].states > 12_000
    assert walks["warm"].states > 12_000
    assert walks["api"].states > 4_000


def test_every_cell_that_can_be_is_reached_by_a_walk_and_no_other(walks: dict[str, Walk]) -> None:
    can_be = {cell for cell, rule in TABLE.items() if not rule.never}
    assert set().union(*(found.cells for found in walks.values())) == can_be


def test_the_tables_say_something_of_every_combination() -> None:
    expected = {(r, s, e) for r in Role for s in STATES[r] for e in EVENTS[r]}
    assert set(TABLE) == expected
    assert set(TURNS) == {(phase, turn) for phase in Phase for turn in Turn}
    assert all(rule.why for rule in TABLE.values() if rule.never)
    # What changes nothing says why, so that nothing is ignored in silence.
    assert all(rule.why or rule.then or rule.do for rule in TABLE.values())
    assert all(change.why or change.then or change.do for change in TURNS.values())


# --- the table broken on purpose ---


def without(name: str) -> dict[str, Any]:
    assert any(joint.name == name for joint in JOINTS)
    return {"joints": tuple(joint for joint in JOINTS if joint.name != name)}


def joint(name: str, **fields: Any) -> dict[str, Any]:
    assert any(one.name == name for one in JOINTS)

    def broken(one: Joint) -> Joint:
        return replace(one, **fields) if one.name == name else one

    return {"joints": tuple(broken(one) for one in JOINTS)}


def cell(role: Role, state: State, event: Event, **fields: Any) -> dict[str, Any]:
    rule = TABLE[role, state, event]
    return {"table": {**TABLE, (role, state, event): replace(rule, **fields)}}


SABOTAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "the place of a dying worker is taken before the fence": (
        "summed for a promotion before the fence|are forgotten",
        joint("take the place", also={Role.WORKER: (State.GONE, State.PAUSED, State.KILLED)}),
    ),
    "a worker is promoted without being verified": (
        "before the weights were found good",
        joint("promote", states=(State.PREPARED, State.VERIFIED)),
    ),
    "weights are loaded beside a standby": (
        "loaded while another process maps them",
        joint("start a worker", facts=()),
    ),
    "a killed process has no deadline": (
        "without a deadline",
        cell(Role.WORKER, State.VERIFYING, Event.DEADLINE, within=None),
    ),
    "a dead core is not replaced": (
        "started again without a pause",
        cell(Role.CORE, State.READY, Event.EXITED, do=(Step.LOSE, Step.LOSE_CORE)),
    ),
    "a worker outlives the core that it served": (
        "kept whose core is gone",
        cell(Role.CORE, State.READY, Event.EXITED, do=(Step.LOSE, Step.REPLACE)),
    ),
    "nobody verifies a standby that took the place": (
        "is prepared without a deadline",
        without("verify"),
    ),
    "an end beyond the limit is like any other": (
        "replaced beyond the limit",
        {"policy": Policy(apis=0, restarts_per_minute=9, standby=Standby.NONE)},
    ),
    "new memory is made while the old one is mapped": (
        "processes map the old one",
        joint("start the keeper", also={}),
    ),
    "a worker goes on over memory that nobody keeps": (
        "no keeper, none is planned",
        cell(Role.KEEPER, State.READY, Event.EXITED, do=(Step.LOSE, Step.REPLACE)),
    ),
    "a word that comes late was forgotten": (
        "KeyError",
        {"table": {k: r for k, r in TABLE.items() if k != (Role.WORKER, State.KILLED, Event.SUM)}},
    ),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_walk_finds_a_broken_table(name: str) -> None:
    says, tables = SABOTAGES[name]
    with pytest.raises(Violation, match=says):
        walk(**{**WALKS["warm"], **tables})


def test_two_rules_for_one_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="two rules for keeper, starting, ready"):
        table((*ROWS, ROWS[0]))


# --- scripts of what the walk leaves abstract: numbers, times, words ---


class Script:
    """A machine with its clock; `who` are processes by title."""

    def __init__(self, **policy: Any) -> None:
        self.machine = Lifecycle(Policy(**policy))
        self.now_s = NOW_S
        self.actions: list[Action] = self.machine.begin(self.now_s)

    def happens(self, role: Role, event: Event, **facts: Any) -> list[Action]:
        slot = next(s for s in self.machine.slots if s.role is role)
        assert slot.process is not None
        self.actions = self.machine.handle(Happened(event, slot.process, **facts), self.now_s)
        return self.actions

    def wait(self, seconds: float) -> list[Action]:
        self.now_s += seconds
        self.actions = self.machine.tick(self.now_s)
        return self.actions

    def kinds(self, kind: type) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]

    def told(self) -> list[str]:
        return [action.message["type"] for action in self.kinds(Tell)]

    def promoted(self) -> Script:
        """Verify and promote the worker that is prepared."""
        self.happens(Role.WORKER, Event.SUM, weights_sum=7)
        self.happens(Role.WORKER, Event.GOOD)
        return self

    def serving(self) -> Script:
        for role in (Role.KEEPER, Role.CORE, Role.API, Role.WORKER):
            self.happens(role, Event.READY)
        return self.promoted()

    def with_standby(self) -> Script:
        self.wait(STANDBY_PAUSE_S)
        assert [spawn.role for spawn in self.kinds(Spawn)] == [Role.STANDBY]
        self.happens(Role.STANDBY, Event.READY)
        return self


def test_a_warm_standby_is_promoted_right_after_the_fence_and_the_next_one_waits_a_pause() -> None:
    script = Script().serving().with_standby()
    machine = script.machine
    standby = machine.standby.process
    script.happens(Role.WORKER, Event.EOF)
    # Before the fence it is not even asked for its sum.
    assert (machine.standby.process, script.told()) == (standby, [])
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    assert (machine.worker.process, machine.standby.process) == (standby, None)
    assert script.told() == ["worker_lost", "verify"]
    script.happens(Role.WORKER, Event.SUM, weights_sum=7)
    assert script.told() == ["weights_sum"]
    script.happens(Role.WORKER, Event.GOOD)
    assert script.kinds(Promote) == [Promote(standby, 2, machine.core.process, Memory.KEPT)]
    assert not script.kinds(Spawn)
    assert machine.next_s == NOW_S + 2 * STANDBY_PAUSE_S
    assert [s.role for s in script.with_standby().machine.slots if s.process is None] == []


def test_a_standby_that_is_still_starting_takes_the_place_and_goes_on_from_there() -> None:
    script = Script().serving()
    script.wait(STANDBY_PAUSE_S)
    script.happens(Role.WORKER, Event.EXITED, code=-11)
    assert (script.machine.worker.state, script.kinds(Spawn)) == (State.STARTING, [])
    assert script.happens(Role.WORKER, Event.READY) and script.told() == ["verify"]
    assert script.promoted().machine.epoch == 2


def test_a_cold_standby_is_started_beside_the_fence_and_none_after_it() -> None:
    cold = Script(standby=Standby.COLD).serving()
    cold.happens(Role.WORKER, Event.EOF)
    assert [(s.role, s.loaded) for s in cold.kinds(Spawn)] == [(Role.STANDBY, True)]
    none = Script(standby=Standby.NONE).serving()
    none.happens(Role.WORKER, Event.EOF)
    assert not none.kinds(Spawn)
    none.happens(Role.WORKER, Event.EXITED)
    none.wait(0)
    assert [(s.role, s.loaded) for s in none.kinds(Spawn)] == [(Role.WORKER, True)]


def test_a_standby_over_bad_weights_is_ended_before_they_are_loaded_anew() -> None:
    script = Script(standby=Standby.COLD).serving()
    script.happens(Role.WORKER, Event.EOF)
    script.happens(Role.WORKER, Event.EXITED)
    script.happens(Role.WORKER, Event.READY)
    script.happens(Role.WORKER, Event.SUM, weights_sum=8)
    script.happens(Role.WORKER, Event.BAD)
    assert script.kinds(Kill) and script.told() == ["weights_forget"]
    script.happens(Role.WORKER, Event.EXITED)
    # The second end within a minute costs a pause.
    assert not script.wait(0)
    script.wait(0.1)
    assert [(s.role, s.loaded) for s in script.kinds(Spawn)] == [(Role.WORKER, False)]


def test_a_standby_that_cannot_live_costs_a_start_a_minute_and_never_the_server() -> None:
    script = Script(restarts_per_minute=1).serving()
    script.wait(STANDBY_PAUSE_S)
    for _ in range(2):
        script.happens(Role.STANDBY, Event.EXITED, code=1)
        assert script.machine.phase is Phase.SERVING
        script.wait(STANDBY_PAUSE_S)
    assert script.machine.standby.state is State.PAUSED
    assert not script.wait(RESTART_WINDOW_S - 2 * STANDBY_PAUSE_S)
    script.wait(2 * STANDBY_PAUSE_S)
    assert [spawn.role for spawn in script.kinds(Spawn)] == [Role.STANDBY]


def test_a_standby_that_sigkill_does_not_end_costs_nothing_but_its_place() -> None:
    script = Script().serving().with_standby()
    script.happens(Role.STANDBY, Event.BROKEN, detail="nonsense")
    for _ in range(3):
        script.wait(20)
        assert script.machine.phase is Phase.SERVING
    worker = Script(standby=Standby.NONE).serving()
    worker.happens(Role.WORKER, Event.ACCUSED, detail="digest")
    worker.wait(20)
    assert (worker.machine.phase, worker.machine.exit_code) == (Phase.OVER, 70)


def test_restarts_pause_longer_and_longer_and_end_in_one_clear_line() -> None:
    script = Script(standby=Standby.NONE, restarts_per_minute=3).serving()
    pauses = []
    for _ in range(3):
        script.happens(Role.WORKER, Event.EXITED, code=70)
        assert script.kinds(Count) == [Count(Role.WORKER)]
        pauses.append(round(script.machine.next_s - script.now_s, 3))
        script.wait(pauses[-1])
        script.happens(Role.WORKER, Event.READY)
        script.promoted()
    assert pauses == [0, 0.1, 0.2]
    script.happens(Role.WORKER, Event.EXITED, code=70)
    assert script.machine.phase is Phase.ENDING
    failed = [a.message for a in script.actions if getattr(a, "kind", "") == "failed"]
    assert failed == ["holdfast worker 0 ended 4 times in a minute; last: exit code 70"]


def test_ends_are_forgotten_after_a_minute() -> None:
    script = Script(standby=Standby.NONE, restarts_per_minute=1).serving()
    for _ in range(4):
        script.happens(Role.WORKER, Event.EXITED, code=70)
        script.wait(0)
        script.happens(Role.WORKER, Event.READY)
        script.promoted().wait(RESTART_WINDOW_S + 1)
    assert (script.machine.phase, script.machine.epoch) == (Phase.SERVING, 5)


@pytest.mark.parametrize(
    ("events", "code", "implicates"),
    [
        ([], -11, True),  # crashed
        ([], 70, True),
        ([(Event.FAULT, {"detail": "illegal access"})], -9, True),  # said so, and did not end
        ([(Event.ACCUSED, {"detail": "no result", "hung": True})], -9, True),
        ([(Event.ACCUSED, {"detail": "peer closed the link"})], -11, True),  # the core saw it first
        ([], -9, False),  # killed from outside
        ([(Event.ACCUSED, {"detail": "digest"})], -9, False),
        ([(Event.ACCUSED, {"detail": "digest"})], 0, False),  # its link was closed
        ([(Event.BROKEN, {"detail": "nonsense"})], -9, False),
    ],
)
def test_the_core_is_told_whether_a_lost_worker_ended_by_its_own_fault(
    events: list[tuple[Event, dict[str, Any]]], code: int, implicates: bool
) -> None:
    script = Script(standby=Standby.NONE).serving()
    for event, facts in events:
        script.happens(Role.WORKER, event, **facts)
    script.happens(Role.WORKER, Event.EXITED, code=code)
    lost = [tell.message for tell in script.kinds(Tell) if tell.message["type"] == "worker_lost"]
    assert [(one["epoch"], one["implicates"]) for one in lost] == [(1, implicates)]
    # What was said of one is said of no other.
    script.wait(0)
    script.happens(Role.WORKER, Event.READY)
    script.promoted().happens(Role.WORKER, Event.EXITED, code=-9)
    assert [
        tell.message["implicates"] for tell in script.kinds(Tell) if "epoch" in tell.message
    ] == [False]


def test_a_worker_that_was_killed_with_its_core_is_not_blamed() -> None:
    script = Script(standby=Standby.NONE).serving()
    script.happens(Role.CORE, Event.EXITED, code=70)
    script.wait(0)
    script.happens(Role.CORE, Event.READY)
    script.happens(Role.WORKER, Event.EXITED, code=-11)
    lost = [tell.message for tell in script.kinds(Tell) if tell.message["type"] == "worker_lost"]
    assert [one["implicates"] for one in lost] == [False]


def test_a_stuck_keeper_is_found_by_its_deadline_and_not_taken_for_a_bad_worker() -> None:
    script = Script().serving()
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    script.wait(0)
    script.happens(Role.WORKER, Event.READY)
    script.happens(Role.WORKER, Event.SUM, weights_sum=7)
    script.wait(10)
    assert [kill.process for kill in script.kinds(Kill)] == [script.machine.keeper.process]
    script.happens(Role.KEEPER, Event.EXITED, code=-9)
    assert [kill.process for kill in script.kinds(Kill)] == [script.machine.worker.process]


def test_a_dead_keeper_costs_the_memory_and_no_stream() -> None:
    """Whoever maps the old memory is gone before new memory is made; the core hears that the pages
    are void, and hears it of this promotion alone."""
    script = Script().serving().with_standby()
    machine, epoch = script.machine, script.machine.epoch
    core, api = machine.core.process, machine.apis[0].process
    script.happens(Role.KEEPER, Event.EXITED, code=-9)
    assert sorted(kill.process for kill in script.kinds(Kill)) == sorted(
        slot.process for slot in (machine.worker, machine.standby)
    )
    assert [lost.kind for lost in script.kinds(Lost)] == ["keeper"]
    script.wait(0)
    script.happens(Role.STANDBY, Event.EXITED, code=-9)
    assert not script.kinds(Spawn), "the old worker still maps what the keeper left"
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    assert [tell["implicates"] for tell in lost_of(script)] == [False]
    assert [spawn.role for spawn in script.kinds(Spawn)] == [Role.KEEPER]
    script.wait(0)
    script.happens(Role.KEEPER, Event.READY)
    assert [(s.role, s.loaded) for s in script.kinds(Spawn)] == [(Role.WORKER, False)]
    script.happens(Role.WORKER, Event.READY)
    script.promoted()
    assert [(p.epoch, p.memory) for p in script.kinds(Promote)] == [(epoch + 1, Memory.LOST)]
    assert (machine.core.process, machine.apis[0].process) == (core, api)
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    script.wait(0)
    script.happens(Role.WORKER, Event.READY)
    script.promoted()
    assert [p.memory for p in script.kinds(Promote)] == [Memory.KEPT]


def test_a_keeper_that_keeps_dying_is_given_up() -> None:
    script = Script(standby=Standby.NONE, restarts_per_minute=1).serving()
    script.happens(Role.KEEPER, Event.EXITED, code=-9)
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    script.wait(0)
    script.happens(Role.KEEPER, Event.UNSTARTED, detail="no memory")
    assert script.machine.phase is Phase.ENDING
    failed = [a.message for a in script.actions if getattr(a, "kind", "") == "failed"]
    assert failed == [
        "holdfast keeper 0 ended 2 times in a minute; last: cannot be started: no memory"
    ]


@pytest.mark.parametrize("role", [Role.CORE, Role.API, Role.WORKER, Role.KEEPER])
def test_a_process_that_cannot_be_made_is_tried_again(role: Role) -> None:
    script = Script(standby=Standby.NONE).serving()
    script.happens(role, Event.EXITED, code=-9)
    if role is Role.KEEPER:
        script.happens(Role.WORKER, Event.EXITED, code=-9)
    script.wait(0)
    script.happens(role, Event.UNSTARTED, detail="no memory")
    assert [lost.kind for lost in script.kinds(Lost)] == ["unstarted"]
    assert role is not Role.CORE or "core_lost" in script.told()
    assert not script.kinds(Spawn), "not without a pause"
    script.wait(0.1)
    assert [spawn.role for spawn in script.kinds(Spawn)] == [role]


def test_weights_that_a_scrub_finds_bad_end_the_worker_and_are_loaded_anew() -> None:
    script = Script(standby=Standby.NONE).serving()
    script.happens(Role.WORKER, Event.SUM, weights_sum=7)
    assert script.told() == ["weights_sum"]
    script.happens(Role.WORKER, Event.GOOD)
    assert script.told() == ["weights_good"]
    script.happens(Role.WORKER, Event.SUM, weights_sum=8)
    script.happens(Role.WORKER, Event.BAD)
    assert script.kinds(Kill) and script.told() == ["weights_forget"]
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    assert [lost.kind for lost in script.kinds(Lost)] == ["weights"]
    script.wait(0)
    assert [spawn.loaded for spawn in script.kinds(Spawn)] == [False]
    script.happens(Role.WORKER, Event.READY)
    script.promoted()
    assert [p.memory for p in script.kinds(Promote)] == [Memory.RELOADED]


@pytest.mark.parametrize("role", [Role.CORE, Role.API, Role.KEEPER, Role.STANDBY])
def test_a_process_that_answers_nothing_is_killed_for_it(role: Role) -> None:
    script = Script(heartbeat_timeout_s=7).serving().with_standby()
    slot = next(slot for slot in script.machine.slots if slot.role is role)
    script.happens(role, Event.SILENT)
    assert [kill.process for kill in script.kinds(Kill)] == [slot.process]
    assert slot.reason == "it answered nothing for 7 s"


@pytest.mark.parametrize(
    ("events", "code", "kind"),
    [
        ([], -11, "worker_crash"),
        ([], 70, "worker_crash"),
        ([], -9, "worker_killed"),
        ([(Event.EOF, {})], -9, "worker_killed"),
        ([(Event.FAULT, {"detail": "illegal access"})], 70, "worker_fault"),
        ([(Event.ACCUSED, {"detail": "no result", "hung": True})], -9, "worker_hang"),
        ([(Event.ACCUSED, {"detail": "digest"})], -9, "worker_rejected"),
        (
            [(Event.ACCUSED, {"detail": "peer closed the link", "closed": True})],
            -11,
            "worker_crash",
        ),
        (
            [(Event.ACCUSED, {"detail": "peer closed the link", "closed": True})],
            -9,
            "worker_killed",
        ),
        ([(Event.BROKEN, {"detail": "nonsense"})], -9, "worker_stuck"),
    ],
)
def test_a_lost_worker_is_counted_by_how_it_was_lost(
    events: list[tuple[Event, dict[str, Any]]], code: int, kind: str
) -> None:
    script = Script(standby=Standby.NONE).serving()
    for event, facts in events:
        script.happens(Role.WORKER, event, **facts)
    script.happens(Role.WORKER, Event.EXITED, code=code)
    assert [lost.kind for lost in script.kinds(Lost)] == [kind]


def test_a_lost_worker_tells_its_clocks() -> None:
    script = Script(standby=Standby.NONE).serving()
    hung = {"detail": "no result", "hung": True, "since_s": NOW_S - 2}
    script.happens(Role.WORKER, Event.ACCUSED, **hung)
    script.now_s += 0.5
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    [lost] = script.kinds(Lost)
    assert (lost.noticed_at_s, lost.noticed_s, lost.fenced_s) == (NOW_S, 2, 0.5)
    # What was ended for another's sake is no fault of its own.
    script = Script(standby=Standby.NONE).serving()
    script.happens(Role.CORE, Event.EXITED, code=-9)
    script.happens(Role.WORKER, Event.EXITED, code=-9)
    assert not script.kinds(Lost)


def lost_of(script: Script) -> list[dict[str, Any]]:
    return [dict(t.message) for t in script.kinds(Tell) if t.message["type"] == "worker_lost"]


def test_progress_extends_a_deadline_and_silence_does_not() -> None:
    script = Script(start_timeout_s=10)
    script.happens(Role.KEEPER, Event.READY)
    for _ in range(3):
        script.wait(9)
        for role in (Role.CORE, Role.API, Role.WORKER):
            script.happens(role, Event.PROGRESS)
    script.wait(10)
    assert len(script.kinds(Kill)) == 3
    assert script.machine.worker.reason == "it said nothing for 10 s while starting"


def test_a_word_out_of_turn_is_its_speakers_fault_and_changes_nothing() -> None:
    script = Script().serving()
    with pytest.raises(LinkError, match="it is said once"):
        script.happens(Role.CORE, Event.READY)
    assert script.machine.core.state is State.READY
    script.happens(Role.CORE, Event.DRAINED)
    assert script.machine.core.state is State.KILLED
    assert not script.machine.handle(Happened(Event.EXITED, 12345), script.now_s)


def test_docs_show_the_table_as_it_is() -> None:
    shown = DOCS.read_text()
    assert shown.count(document()) == 1, "run: python -m holdfast.proc.lifecycle.document"
