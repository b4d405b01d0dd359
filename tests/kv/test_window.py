"""Window groups: what a window can see, which prefixes can be continued, whose pages come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.config import Limits
from holdfast.errors import InvariantError, OptionError
from holdfast.kv.ledger import Ledger
from holdfast.kv.window import WindowCache
from holdfast.wire.rows import first_column


def limits_of(**overrides) -> Limits:
    base = {"vocab_size": 9, "context_tokens": 64, "page_tokens": 2, "pages": 20, "windows": (0, 4)}
    return Limits(**(base | overrides))


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 17))
def test_the_first_column_is_that_of_the_first_position_in_sight(tokens, window, page_tokens):
    in_sight = [p for p in range(tokens + 1) if tokens - p < window]
    assert first_column(tokens, window, page_tokens) == in_sight[0] // page_tokens


@given(st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 11)))
def test_a_prefix_is_usable_exactly_where_every_page_in_sight_is_cached(window, page_tokens, held):
    cache = WindowCache(64, window, page_tokens)
    trie = list(range(1000, 1012))
    for column in held:
        cache.insert(trie[column], 2000 + column, 1 + column)
    wanted = []
    for depth in range(len(trie), -1, -1):
        # The next token's position is depth * page_tokens.
        sight = range(max(0, depth * page_tokens - window + 1), depth * page_tokens)
        if all(position // page_tokens in held for position in sight):
            wanted.append(depth)
    assert cache.usable(trie) == wanted


def sealed(ledger: Ledger, tokens: list[int], root: int) -> np.ndarray:
    """A row has computed these tokens; its pages of both groups are sealed and shared."""
    count = len(tokens) // 2
    handles = ledger.reserve(count)
    assert handles is not None
    ledger.launch(handles)
    ledger.seal(handles.reshape(-1), np.arange(2 * count, dtype=np.uint64))
    parent: int | None = root
    for at in range(count):
        text = np.array(tokens[2 * at : 2 * at + 2], np.int32).tobytes()
        assert parent is not None
        parent = ledger.share(int(handles[0, at]), parent, text)
        assert parent is not None
        ledger.share_beside(parent, int(handles[1, at]))
    return handles


def release(ledger: Ledger, handles: np.ndarray) -> None:
    for group, mine in enumerate(handles):
        ledger.release(mine, 0, group)


def test_a_prefix_hit_brings_the_window_pages_that_its_next_token_can_see():
    ledger = Ledger(limits_of())
    root = ledger.index.root(b"")
    tokens = [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    handles = sealed(ledger, tokens, root)
    full, beside = ledger.find(root, np.array(tokens, np.int32), 4)
    assert full.tolist() == handles[0, :4].tolist()
    # Position 8 sees 5 to 8: pages 2 and 3.
    assert beside.tolist() == handles[1, 2:4].tolist()


def test_a_hit_ends_where_a_window_page_is_missing():
    ledger = Ledger(limits_of(pages=8, window_pages=20))
    root = ledger.index.root(b"")
    handles = sealed(ledger, [1, 2, 3, 4, 5, 6], root)
    release(ledger, handles)
    ledger._free_beside(1, int(handles[1, 1]))
    full, beside = ledger.find(root, np.array([1, 2, 3, 4, 5, 6, 7], np.int32), 3)
    assert full.tolist() == handles[0, :1].tolist()
    assert beside.tolist() == handles[1, :1].tolist()
    ledger.verify()


def test_a_page_that_leaves_the_trie_takes_the_pages_beside_it_along():
    ledger = Ledger(limits_of(pages=6))
    root = ledger.index.root(b"")
    release(ledger, sealed(ledger, [1, 2, 3, 4, 5, 6], root))
    assert ledger.available() == 5
    ledger.verify()
    taken = ledger.reserve(5)
    assert taken is not None
    assert len(ledger.index) == 0
    ledger.verify()
    release(ledger, taken)
    ledger.verify()


def test_a_leased_window_page_outlives_its_place_in_the_cache():
    ledger = Ledger(limits_of(pages=6, window_pages=20))
    root = ledger.index.root(b"")
    handles = sealed(ledger, [1, 2], root)
    ledger.release(handles[0], 0, 0)  # its row still leases the window page
    assert ledger.reserve(5) is not None
    ledger.verify()
    assert ledger.held(1) == 1 + 5
    ledger.release(handles[1], 0, 1)
    assert ledger.held(1) == 5
    ledger.verify()
    with pytest.raises(InvariantError, match="stale"):
        ledger.acquire(handles[1], 1)


def test_the_smaller_pool_says_how_many_sets_there_are():
    ledger = Ledger(limits_of(pages=20, window_pages=6))
    assert ledger.available() == 5
    assert ledger.reserve(6) is None
    assert ledger.reserve(5) is not None
    assert (ledger.held(0), ledger.held(1)) == (5, 5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"windows": (4,)}, "--windows"),
        ({"windows": ()}, "--windows"),
        ({"windows": (0, 0)}, "--windows"),
        ({"windows": (0, 8), "window_pages": 5}, "--window-pages"),
    ],
)
def test_windows_that_cannot_be_are_refused_by_name(options, name):
    with pytest.raises(OptionError, match=name):
        limits_of(**options)
    assert limits_of(windows=[0, 8], window_pages=6).windows == (0, 8)
