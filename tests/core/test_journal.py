"""The journal: what it says is whole, bounded and enough to go on from."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.config import Limits
from holdfast.core.journal import Admission, Journal, JournalTail, records_of, recover, replay
from holdfast.errors import InvariantError
from holdfast.wire.messages import End, Sampling

LIMITS = Limits(
    vocab_size=100, context_tokens=64, rows_max=2, queue_requests=4, live_tokens=256, bias_entries=8
)


def admission(request: int, prompt_len: int = 8) -> Admission:
    return Admission(
        id=request,
        api=0,
        tenant="t",
        priority=0,
        prompt=np.arange(prompt_len, dtype=np.int32).tobytes(),
        max_tokens=10,
        seed=request,
        deadline_ns=0,
        sampling=Sampling(),
    )


def fresh() -> tuple[memoryview, Journal]:
    buffer = memoryview(bytearray(Journal.size(LIMITS)))
    return buffer, Journal(buffer, LIMITS)


def say(journal: Journal, ids: list[int], tokens: list[int]) -> bool:
    return journal.tokens(0, np.array(ids, np.uint64), np.array(tokens, np.int32))


def test_recovery_folds_admissions_tokens_and_ends():
    buffer, journal = fresh()
    journal.submit(admission(1))
    journal.submit(admission(2))
    say(journal, [1, 2], [10, 20])
    say(journal, [2, 1], [21, 11])
    journal.end(2, End.STOP, 1)
    found = recover(buffer)
    assert found[1].tokens == [10, 11] and found[1].end == End.NONE
    assert found[2].tokens == [20] and found[2].end == End.STOP
    assert found[1].admission == admission(1)


def test_an_untouched_buffer_holds_nothing():
    assert recover(memoryview(bytearray(Journal.size(LIMITS)))) == {}


def test_a_record_torn_anywhere_is_not_believed_and_hides_nothing_before_it():
    buffer, journal = fresh()
    journal.submit(admission(1))
    say(journal, [1], [10])
    whole = bytes(buffer)
    before = journal._at
    say(journal, [1], [11])
    first = whole.index(admission(1).prompt) - 200
    for at in range(first, len(whole)):
        if at % 97 == 0 and whole[at] == 0:
            torn = bytearray(buffer)
            torn[at] ^= 0xFF
            found = recover(memoryview(torn))
            got = found[1].tokens if 1 in found else []
            assert got in ([], [10], [10, 11]), "a token that was never said"
    assert before < journal._at


def test_a_reopened_journal_goes_on_where_it_was():
    buffer, journal = fresh()
    journal.submit(admission(1))
    say(journal, [1], [10])
    again = Journal(buffer, LIMITS)
    say(again, [1], [11])
    assert recover(buffer)[1].tokens == [10, 11]


def test_compaction_keeps_the_live_requests_and_forgets_the_ended():
    buffer, journal = fresh()
    for request in range(4):
        journal.submit(admission(request))
        say(journal, [request], [request])
    journal.compact([(admission(3), np.array([3, 4], np.int32), 0)])
    say(journal, [3], [5])
    found = recover(buffer)
    assert set(found) == {3}
    assert found[3].tokens == [3, 4, 5]


def test_a_core_that_dies_during_compaction_leaves_the_old_half_in_force():
    buffer, journal = fresh()
    journal.submit(admission(1))
    say(journal, [1], [10])

    def dying():
        yield admission(1), np.array([10], np.int32), 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.compact(dying())
    assert recover(buffer)[1].tokens == [10]


def test_the_proved_size_holds_every_live_request_at_its_largest():
    buffer, journal = fresh()
    bias = tuple((at, 1.0) for at in range(LIMITS.bias_entries))
    stops = tuple(range(LIMITS.stop_ids))
    share = LIMITS.live_tokens // LIMITS.live_requests
    live = []
    for request in range(LIMITS.live_requests):
        record = Admission(
            id=2**63 + request,
            api=7,
            tenant="k" * 32,
            priority=-5,
            prompt=np.arange(share - 2, dtype=np.int32).tobytes(),
            max_tokens=2,
            seed=2**64 - 1,
            deadline_ns=2**62,
            sampling=Sampling(bias=bias, stop_ids=stops),
        )
        live.append((record, np.zeros(2, np.int32), 0))
    journal.compact(live)
    assert journal._at <= LIMITS.journal_bytes // 2, "no room for the ended ones and what comes"
    assert len(recover(buffer)) == LIMITS.live_requests


def test_more_than_the_bound_is_an_invariant_error_and_the_old_half_stays():
    buffer, journal = fresh()
    journal.submit(admission(1))
    too_many = ((admission(r, 60), np.zeros(4, np.int32), 0) for r in range(10_000))
    with pytest.raises(InvariantError):
        journal.compact(too_many)
    assert set(recover(buffer)) == {1}
    say(journal, [1], [10])
    assert recover(buffer)[1].tokens == [10]


def test_the_tail_sees_every_record_once_and_live_requests_again_after_a_compaction():
    buffer, journal = fresh()
    tail = JournalTail(buffer)
    journal.submit(admission(1))
    copy = tail.read()
    assert tail.read() == b""
    say(journal, [1], [10])
    copy += tail.read()
    journal.compact([(admission(1), np.array([10], np.int32), 0)])
    say(journal, [1], [11])
    copy += tail.read()
    assert replay(records_of(memoryview(copy)))[1].tokens == [10, 11]
