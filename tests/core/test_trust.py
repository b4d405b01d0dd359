"""Up to when the weights are known to have been right."""

from __future__ import annotations

from holdfast.core.trust import Moment, Trust


def test_what_was_computed_before_a_proof_is_right() -> None:
    trust = Trust()
    trust.proved(Moment(7, 70))
    assert trust.until == Moment(7, 70)


def test_a_pass_of_the_scrub_vouches_for_nothing_since_it_began() -> None:
    trust = Trust()
    trust.proved(Moment(1, 10))
    # A pass may have begun before the word of the one before it was heard.
    trust.found_good(Moment(5, 50))
    assert trust.until == Moment(1, 10)
    trust.found_good(Moment(9, 90))
    assert trust.until == Moment(1, 10)
    trust.found_good(Moment(13, 130))
    assert trust.until == Moment(5, 50)


def test_words_of_an_ended_worker_s_scrub_are_over_with_it() -> None:
    trust = Trust()
    trust.found_good(Moment(5, 50))
    trust.found_good(Moment(9, 90))
    trust.proved(Moment(11, 110))
    trust.found_good(Moment(13, 130))
    assert trust.until == Moment(11, 110)
