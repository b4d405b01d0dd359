"""The simulator: one seed, one trace; a clean engine passes; every planted bug is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.sim import oracle
from holdfast.sim.mutations import Mutation, MutationStale, applied, hunt
from holdfast.sim.planted import MUTATIONS
from holdfast.sim.shrink import describe, shrink, signature
from holdfast.sim.simulator import Simulation, simulate
from holdfast.sim.world import PROFILES, TIER_RATES, draw

CLEAN_SEEDS = 60
HUNT_SEEDS = 150
# name of a mutation -> profile and seed that caught it last
CAUGHT_AT = json.loads((Path(__file__).parent / "caught_at.json").read_text())


def trace_of(seed: int) -> list[str]:
    lines: list[str] = []
    simulate(draw(seed, "faults"), lines.append)
    return lines


def test_the_same_seed_gives_the_same_trace_byte_for_byte():
    assert trace_of(7) == trace_of(7)
    assert trace_of(7) != trace_of(8)


def test_the_trace_does_not_depend_on_the_process_s_hash_seed():
    code = (
        "from holdfast.sim.world import draw; from holdfast.sim.simulator import simulate;"
        "lines = []; print(simulate(draw(41, 'faults'), lines.append)); print('\\n'.join(lines))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert "FAULT" in said[0]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_engine_holds_in_every_world_of_a_profile(profile):
    tokens = 0
    for seed in range(10_000, 10_000 + CLEAN_SEEDS):
        outcome = simulate(draw(seed, profile))
        assert outcome.violation is None, f"holdfast simulate --seed {seed} --profile {profile}"
        tokens += outcome.tokens
    assert tokens > CLEAN_SEEDS, "worlds in which nothing happens prove nothing"


@pytest.mark.parametrize(
    ("profile", "seed"),
    [
        ("faults", 399),  # more requests ended at one deadline than were remembered
        ("faults", 1096),  # a result was compared with a mirror that a refused one had moved
        ("pressure", 177),  # a restored request ended and was forgotten before its client asked
        ("pressure", 624),  # the only row held pages twice, its own and their shared twins
        ("pressure", 633),  # a twin stayed leased although nothing hung below it
        ("pressure", 2465),  # a twin was not leased although a retiring page hung below it
    ],
)
def test_a_seed_that_found_a_bug_stays_clean(profile, seed):
    outcome = simulate(draw(seed, profile))
    assert outcome.violation is None


def test_clients_meet_every_kind_of_end_somewhere():
    met: set[str] = set()
    for seed in range(60):
        for profile in ("faults", "pressure"):
            met.update(simulate(draw(seed, profile)).ends)
    assert met == {
        "stop",
        "length",
        "deadline",
        "disconnect",
        "slow_reader",
        "api died",
        "queue_full",
        "never_fits",
        "not_finite",
        "not_ready",
        "token_gap",
        "engine_fault",
    }


@pytest.mark.parametrize(
    ("tokens", "stop", "min_tokens", "text"),
    [
        ([b"a", b"b", b"c"], ("bc",), 0, "a"),
        ([b"ab", b"ab", b"c"], ("abc", "ba"), 0, "a"),  # complete first, though it begins later
        ([b"ab", b"c"], ("c", "abc"), 0, ""),  # complete at the same character: the longest
        ([b"ab", b"ab"], ("ab",), 2, "ab"),  # not before min_tokens
        ([b"a\xc3", b"\xa9b"], ("é",), 0, "a"),
        ([b"a\xe2\x82"], (), 0, "a"),  # never became a character
        ([b"a\xe2", b"b"], (), 0, "a\ufffdb"),
    ],
)
def test_the_oracle_says_what_a_reader_would_say(monkeypatch, tokens, stop, min_tokens, text):
    table = dict(enumerate(tokens))
    monkeypatch.setattr(oracle, "TABLE", table)
    monkeypatch.setattr(oracle, "expected_token", lambda history, *_: len(history) - 1)
    job = replace(
        draw(0, "calm").jobs[0],
        prompt=(0,),
        max_tokens=len(tokens),
        stop_ids=(),
        stop=stop,
        include_stop=False,
        min_tokens=min_tokens,
    )
    assert oracle.answer_to(job, 0, draw(0, "calm").limits).text == text


def test_every_kind_of_fault_strikes_somewhere():
    struck: set[str] = set()
    for seed in range(60):
        struck.update(simulate(draw(seed, "faults")).faults)
    # Those of tiers: test_copy_traffic.
    assert struck - set(TIER_RATES) == {
        "crash",
        "crash_after",
        "hang",
        "slow",
        "result_late",
        "result_lost",
        "result_twice",
        "result_old_epoch",
        "nan_row",
        "delta_lost",
        "delta_twice",
        "api_death",
        "core_death",
        "respawn_fault",
        "poison",
        "killed",
        "standby_death",
        "promote_fault",
        "weights_bad",
        "page_corrupt",
        "spawn_fails",
        "never_ready",
        "output_twice",
        "output_lost",
        "page_rot",
        "memory_lost",
        "keeper_death",
        "freeze",
        "keeper_lost",
        "weights_rot",
    }


def test_a_server_that_may_give_up_does_so_somewhere_and_every_client_is_told_why():
    """Where it may not, sim.processes raises; where it does, nobody is left running."""
    over, told = 0, 0
    for seed in range(60):
        simulation = Simulation(draw(seed, "faults"))
        outcome = simulation.run()
        assert outcome.violation is None
        if simulation.processes.gave_up:
            over += 1
            told += "engine_fault" in outcome.ends
            assert not simulation.world.immortal and not simulation.processes.running
    assert over >= 2 and told


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_caught(mutation):
    # Where it was caught last. Draws change: then it is hunted anew, and the file brought up to
    # date.
    profile, seed = CAUGHT_AT.get(mutation.name, ("short", 0))
    with applied(mutation):
        caught = simulate(draw(seed, profile)).violation is not None
    if not caught:
        found = hunt(mutation, HUNT_SEEDS)
        assert found is not None, f"nobody saw that it is untrue: {mutation.bug}"


def test_where_bugs_were_caught_names_no_bug_that_is_gone():
    assert set(CAUGHT_AT) <= {mutation.name for mutation in MUTATIONS}


def test_what_catches_a_planted_bug_is_clean_without_it():
    for profile, seed in sorted({tuple(place) for place in CAUGHT_AT.values()}):
        assert simulate(draw(seed, profile)).violation is None, (profile, seed)


def test_a_mutation_whose_place_has_moved_fails_loudly():
    moved = Mutation("moved", "", "holdfast.kv.ledger:Ledger.release", "no such text", "")
    with pytest.raises(MutationStale), applied(moved):
        pass


def test_a_mutation_is_gone_when_its_context_ends():
    world = draw(4, "faults")
    clean = simulate(world)
    with applied(MUTATIONS[0]):
        pass
    assert simulate(world) == clean


def test_a_failing_world_shrinks_to_a_smaller_one_that_fails_alike():
    bug = next(m for m in MUTATIONS if m.name == "page-boundary")
    with applied(bug):
        worlds = (draw(seed, "pressure") for seed in range(20))
        world = next(one for one in worlds if simulate(one).violation is not None)
        before = simulate(world)
        small, after = shrink(world, runs_max=120)
    assert before.violation is not None and after.violation is not None
    assert signature(after.violation) == signature(before.violation)
    assert len(small.jobs) < len(world.jobs)
    assert "client" in describe(small)
    with pytest.raises(ValueError, match="does not fail"):
        shrink(draw(0, "short"))
