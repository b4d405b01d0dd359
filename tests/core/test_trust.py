"""Up to when the weights are known to have been right."""

from __future__ import annotations

from holdfast.core.trust import MOMENTS_MAX, Moment, Trust


def test_what_was_computed_before_a_proof_is_right() -> None:
    trust = Trust()
    trust.proved(Moment(7, 70))
    assert trust.until == Moment(7, 70)


def test_a_pass_of_the_scrub_vouches_for_what_was_there_when_it_began() -> None:
    trust = Trust()
    trust.proved(Moment(1, 10))
    for step in (8, 16, 24):
        trust.taken(step, Moment(1 + step, 10 * step))
    trust.found_good(7)
    assert trust.until == Moment(1, 10)
    trust.found_good(16)
    assert trust.until == Moment(17, 160)
    trust.found_good(20)
    assert trust.until == Moment(17, 160)


def test_steps_of_an_epoch_before_say_nothing() -> None:
    trust = Trust()
    trust.taken(8, Moment(8, 80))
    trust.proved(Moment(11, 110))
    trust.found_good(30)
    assert trust.until == Moment(11, 110)


def test_what_it_remembers_is_bounded_and_what_was_forgotten_proves_less() -> None:
    trust = Trust()
    for step in range(MOMENTS_MAX + 5):
        trust.taken(step, Moment(step, step))
    trust.found_good(4)
    assert trust.until == Moment(0, 0)
    trust.found_good(5)
    assert trust.until == Moment(5, 5)
