"""What the ledger keeps when a worker has ended, and what goes with a page that has changed."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.config import Limits
from holdfast.errors import InvariantError
from holdfast.kv.ledger import Ledger
from holdfast.kv.pages import PageState
from holdfast.wire.plan import handle_generations, handle_pages

SIZE = 2


def ledger_of(windows: tuple[int, ...] = (0,), pages: int = 17) -> Ledger:
    limits = Limits(vocab_size=9, context_tokens=32, page_tokens=SIZE, pages=pages, windows=windows)
    return Ledger(limits)


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def ids_of(pages: int) -> np.ndarray:
    return np.arange(pages * SIZE, dtype=np.int32)


def sealed(ledger: Ledger, root: int, tokens: np.ndarray) -> np.ndarray:
    """uint64[groups, k]: a row's pages for `tokens`, sealed, shared, and still leased by it."""
    handles = ledger.reserve(tokens.size // SIZE)
    assert handles is not None
    ledger.launch(handles)
    ledger.seal(handles.reshape(-1), handles.reshape(-1) * np.uint64(3))
    parent: int | None = root
    for at, handle in enumerate(handles[0].tolist()):
        assert parent is not None
        parent = ledger.share(handle, parent, tokens[SIZE * at : SIZE * at + SIZE].tobytes())
        for beside in handles[1:, at].tolist():
            assert parent is not None
            ledger.share_beside(parent, beside)
    return handles


def let_go(ledger: Ledger, handles: np.ndarray) -> None:
    for group, mine in enumerate(handles):
        ledger.release(mine, 0, group)


def pass_steps(ledger: Ledger, count: int = 2, first: int = 1) -> None:
    for step in range(first, first + count):
        ledger.acknowledge(step)


def sums_of(handles: np.ndarray) -> np.ndarray:
    """What `sealed` has said of these."""
    return handles * np.uint64(3)


def verify_all(ledger: Ledger, kept: np.ndarray) -> None:
    ledger.read(kept, 1)
    assert ledger.judge(kept, sums_of(kept)).size == 0
    ledger.acknowledge(1)
    ledger.verify()


def test_sealed_and_indexed_pages_outlive_their_worker_with_their_generation() -> None:
    ledger = ledger_of()
    root = ledger.index.root(b"")
    mine = sealed(ledger, root, ids_of(3))
    pass_steps(ledger)
    kept = ledger.survive(None)
    assert kept.tolist() == mine[0].tolist()
    verify_all(ledger, kept)
    assert ledger.find(root, ids_of(3), 3)[0].tolist() == mine[0].tolist()
    assert ledger.cached == 3 and ledger.held() == 0


def test_nothing_is_found_or_handed_out_before_everything_kept_is_verified() -> None:
    ledger = ledger_of()
    root = ledger.index.root(b"")
    sealed(ledger, root, ids_of(3))
    pass_steps(ledger)
    kept = ledger.survive(None)
    ledger.read(kept, 1)
    ledger.judge(kept[:2], sums_of(kept[:2]))
    assert ledger.unverified == 1
    with pytest.raises(InvariantError, match="before all that was kept is verified"):
        ledger.find(root, ids_of(3), 3)
    with pytest.raises(InvariantError, match="before all that were kept are verified"):
        ledger.reserve(1)
    ledger.judge(kept[2:], sums_of(kept[2:]))
    assert ledger.find(root, ids_of(3), 3)[0].size == 3


@pytest.mark.parametrize(("steps", "kept"), [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_what_the_last_two_steps_sealed_is_not_believed(steps: int, kept: int) -> None:
    ledger = ledger_of()
    ledger.acknowledge(1)
    sealed(ledger, ledger.index.root(b""), ids_of(2))
    pass_steps(ledger, steps, first=2)
    assert ledger.survive(None).size == kept
    ledger.verify()


def test_what_is_not_kept_is_free_under_a_new_generation_and_soiled() -> None:
    ledger = ledger_of()
    root = ledger.index.root(b"")
    kept = sealed(ledger, root, ids_of(2))
    pass_steps(ledger)
    young = sealed(ledger, root, tokens_of(7, 7))
    private = sealed(ledger, root, ids_of(1))  # another stands for these tokens
    writing = ledger.reserve(2)
    assert writing is not None
    ledger.launch(writing)
    ledger.reserve(1)
    assert ledger.survive(None).tolist() == kept[0].tolist()
    pool = ledger.pools[0]
    assert pool.counts()[PageState.SEALED] == 2
    for gone in (young, private, writing):
        page = handle_pages(gone[0])
        assert (pool.state[page] == PageState.FREE).all()
        assert (handle_generations(pool.current[page]) == handle_generations(gone[0]) + 1).all()
    ledger.verify()
    verify_all(ledger, kept[0])
    rest = ledger.reserve(pool.free)
    assert rest is not None
    assert sorted(ledger.soiled(rest).tolist()) == sorted(rest[0].tolist())


def test_a_page_below_one_that_is_not_kept_is_not_kept() -> None:
    ledger = ledger_of()
    root = ledger.index.root(b"")
    first = sealed(ledger, root, ids_of(3))
    pass_steps(ledger)
    ledger.pools[0].sealed_at[handle_pages(first[0, 1:2])] = ledger.clock  # as if it were young
    assert ledger.survive(None).tolist() == first[0, :1].tolist()
    ledger.verify()


def test_what_was_sealed_after_a_moment_goes_with_the_weights_of_that_moment() -> None:
    ledger = ledger_of()
    root = ledger.index.root(b"")
    old = sealed(ledger, root, ids_of(1))
    pass_steps(ledger, 5)
    moment = ledger.clock
    pass_steps(ledger, 1, first=6)
    sealed(ledger, root, tokens_of(7, 7))
    pass_steps(ledger, 5, first=7)
    assert ledger.survive(moment).tolist() == old[0].tolist()


def test_a_window_page_is_kept_beside_a_kept_page_and_not_otherwise() -> None:
    ledger = ledger_of(windows=(0, 4))
    root = ledger.index.root(b"")
    mine = sealed(ledger, root, ids_of(3))
    pass_steps(ledger)
    ledger.pools[0].sealed_at[handle_pages(mine[0, 2:])] = ledger.clock
    kept = ledger.survive(None)
    assert sorted(kept.tolist()) == sorted(mine[:, :2].reshape(-1).tolist())
    ledger.verify()
    verify_all(ledger, kept)
    assert [one.size for one in ledger.find(root, ids_of(3), 3)] == [2, 2]


def test_a_second_fault_while_verifying_has_everything_verified_again() -> None:
    ledger = ledger_of()
    sealed(ledger, ledger.index.root(b""), ids_of(3))
    pass_steps(ledger)
    kept = ledger.survive(None)
    ledger.read(kept, 1)
    ledger.judge(kept[:2], sums_of(kept[:2]))
    again = ledger.survive(None)
    assert again.tolist() == kept.tolist()
    assert ledger.unverified == 3
    ledger.verify()


def test_a_changed_page_goes_with_all_that_hangs_below_and_beside_it() -> None:
    ledger = ledger_of(windows=(0, 4), pages=33)
    root = ledger.index.root(b"")
    mine = sealed(ledger, root, ids_of(4))
    other = sealed(ledger, root, tokens_of(8, 8))
    for one in (mine, other):
        let_go(ledger, one)
    void = ledger.drop({int(mine[0, 1])})
    assert void == set(mine[:, 1:].reshape(-1).tolist())
    ledger.verify()
    assert ledger.find(root, ids_of(4), 4)[0].tolist() == mine[0, :1].tolist()
    assert ledger.find(root, tokens_of(8, 8), 1)[0].tolist() == other[0].tolist()


def test_a_changed_page_of_a_window_takes_what_its_readers_computed() -> None:
    ledger = ledger_of(windows=(0, 4), pages=33)
    root = ledger.index.root(b"")
    mine = sealed(ledger, root, ids_of(4))
    let_go(ledger, mine)
    void = ledger.drop({int(mine[1, 1])})
    assert void == {int(mine[1, 1]), *mine[:, 2:].reshape(-1).tolist()}
    ledger.verify()


def test_a_changed_page_is_free_only_when_nobody_may_touch_it_any_more_and_then_zeroed() -> None:
    ledger = ledger_of(pages=3)
    mine = sealed(ledger, ledger.index.root(b""), ids_of(2))
    ledger.drop({int(mine[0, 0])})
    assert ledger.pools[0].counts()[PageState.RETIRING] == 2
    assert ledger.reserve(1) is None
    ledger.release(mine[0], 1)
    assert ledger.reserve(1) is None
    ledger.acknowledge(1)
    ledger.verify()
    again = ledger.reserve(2)
    assert again is not None
    assert sorted(ledger.soiled(again).tolist()) == sorted(again[0].tolist())


def test_a_page_that_is_read_again_has_no_new_owner_before_the_result() -> None:
    ledger = ledger_of(pages=3)
    root = ledger.index.root(b"")
    mine = sealed(ledger, root, ids_of(2))
    let_go(ledger, mine)
    ledger.read(mine[0, 1:], 1)
    assert ledger.available() == 1  # its parent, once it is out of the trie itself
    taken = ledger.reserve(1)
    assert taken is not None and handle_pages(taken[0])[0] == handle_pages(mine[0, :1])[0]
    ledger.verify()
    assert ledger.available() == 0
    ledger.acknowledge(1)
    ledger.verify()
    assert ledger.available() == 1


def test_reading_a_page_again_is_no_use_of_it() -> None:
    ledger = ledger_of(pages=4)
    root = ledger.index.root(b"")
    old = sealed(ledger, root, tokens_of(1, 1))
    let_go(ledger, old)
    ledger.acknowledge(1)
    young = sealed(ledger, root, tokens_of(2, 2))
    ledger.release(young[0], 1)
    ledger.read(old[0], 2)
    ledger.acknowledge(2)
    ledger.reserve(2)  # one was free
    ledger.verify()
    assert ledger.find(root, tokens_of(2, 2), 1)[0].size == 1
    assert ledger.find(root, tokens_of(1, 1), 1)[0].size == 0


def test_the_sum_of_a_page_that_was_given_up_meanwhile_says_nothing() -> None:
    ledger = ledger_of()
    mine = sealed(ledger, ledger.index.root(b""), ids_of(2))
    let_go(ledger, mine)
    ledger.read(mine[0], 1)
    ledger.drop({int(mine[0, 1])})
    wrong = sums_of(mine[0]) + np.uint64(1)
    assert ledger.judge(mine[0], wrong).tolist() == mine[0, :1].tolist()
    ledger.acknowledge(1)
    ledger.verify()


def test_a_page_that_is_not_sealed_cannot_be_read_again() -> None:
    ledger = ledger_of()
    handles = ledger.reserve(1)
    assert handles is not None
    with pytest.raises(InvariantError, match="not sealed"):
        ledger.read(handles[0], 1)
