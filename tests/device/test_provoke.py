"""How a worker breaks itself on a drill's order: each kind is real, and hits what it shall."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from devicekit import Hand, Request, make_runner

from holdfast.device.provoke import FAULTS, ORDERS_MAX, Provocations
from holdfast.errors import LinkError

SIGNALS = {
    "address": signal.SIGSEGV,
    "instruction": signal.SIGILL,
    "assert": signal.SIGABRT,
    "misaligned": signal.SIGBUS,
    "dma": signal.SIGSEGV,
}


class Provoked:
    """A runner with provocations around each step, as proc.worker has them."""

    def __init__(self, spec: Any) -> None:
        self.runner = make_runner(spec)
        self.limits, self.epoch = self.runner.limits, self.runner.epoch
        self.said: list[dict[str, Any]] = []
        self.provocations = Provocations("cpu", self.said.append)

    def run(self, plan: Any) -> Any:
        self.provocations.before(self.runner, plan)
        result = self.runner.run(plan)
        self.provocations.after(self.runner, plan)
        return result


@pytest.mark.parametrize("kind", sorted(set(FAULTS) - {"spin"}))
def test_a_fault_is_the_signal_that_the_kernel_sends(kind: str) -> None:
    script = (
        "from holdfast.device.provoke import Provocations\n"
        "provocations = Provocations('cpu', lambda said: print(said['kind'], flush=True))\n"
        f"provocations.take({{'type': 'provoke', 'kind': {kind!r}, 'phase': 'verify'}})\n"
        "provocations.at('capture')\n"
        "provocations.at('verify')\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -SIGNALS[kind], done.stderr
    assert done.stdout.split() == [kind]


def test_a_planted_page_moves_the_answer_of_its_row_alone(spec) -> None:
    victim, other = Request(list(range(20))), Request(list(range(30, 50)))
    clean = Hand(make_runner(spec))
    expected = clean.generate(1, victim, 8, chunk=7), clean.generate(2, other, 8, chunk=7)
    provoked = Provoked(spec)
    order = {"kind": "plant-page", "phase": "prefill", "tokens": list(range(20))}
    provoked.provocations.take({"type": "provoke", **order})
    hand = Hand(provoked)
    assert hand.generate(2, other, 8, chunk=7) == expected[1]
    assert hand.generate(1, victim, 8, chunk=7) != expected[0]
    assert [said["kind"] for said in provoked.said] == ["plant-page"]


def test_a_nan_fails_the_row_in_its_next_step(spec) -> None:
    provoked = Provoked(spec)
    provoked.provocations.take({"type": "provoke", "kind": "nan", "phase": "decode"})
    Hand(provoked).generate(1, Request(list(range(9))), 8)
    assert provoked.runner.stats.rows_not_finite > 0


def test_a_corrupt_page_is_one_of_a_prompt_that_was_sealed_long_ago(spec) -> None:
    provoked = Provoked(spec)
    provoked.provocations.take({"type": "provoke", "kind": "corrupt-page", "phase": "decode"})
    hand, clean = Hand(provoked), Hand(make_runner(spec))
    for each in (hand, clean):
        each.generate(1, Request(list(range(9))), 5)
    assert provoked.said == [], "too early: it may not be sealed yet"
    for each in (hand, clean):
        each.generate(2, Request(list(range(9))), 12)
    assert len(provoked.said) == 1
    page = int(provoked.runner.rows.table.page_table[0, 2, 0])
    ours, theirs = (r.memory.page_words[page].numpy() for r in (provoked.runner, clean.runner))
    assert np.flatnonzero(ours != theirs).tolist() == [0], "one bit of it"


def test_orders_that_make_no_sense_are_refused_and_their_number_is_bounded() -> None:
    provocations = Provocations("cpu", lambda said: None)
    for order in (
        {"kind": "meteor", "phase": "decode"},
        {"kind": "nan", "phase": "tea"},
        {"kind": "nan"},
        {"kind": "nan", "phase": "decode", "where": "there"},
    ):
        with pytest.raises(LinkError, match="provoke"):
            provocations.take({"type": "provoke", **order})
    for _ in range(ORDERS_MAX):
        provocations.take({"type": "provoke", "kind": "nan", "phase": "decode"})
    with pytest.raises(LinkError, match="armed already"):
        provocations.take({"type": "provoke", "kind": "nan", "phase": "decode"})
