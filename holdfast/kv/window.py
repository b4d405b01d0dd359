"""WindowCache: which sealed page of a window group holds the KV of the same tokens as a page of
group 0, so that a prefix can be shared by models with windows too.

The trie (kv.prefix) stands on pages of group 0. A page of a window group hangs beside the trie's
page of the same column: it is found by that page's handle, generation and all, and is forgotten
with it. Unlike the trie it has no order of its own: a prefix of k pages is a hit when the columns
that the next token can see have a page here (`first_column`), whatever became of those before. So
any unleased page may be evicted, least recently used first.

Only kv.ledger may call this. It knows handles, not requests or steps.
"""

from __future__ import annotations

import heapq

import numpy as np

from holdfast.errors import require
from holdfast.wire.plan import handle_pages
from holdfast.wire.rows import first_column


class WindowCache:
    """The cached pages of one window group's pool of `pages` pages."""

    def __init__(self, pages: int, window: int, page_tokens: int) -> None:
        self.window = window
        self.page_tokens = page_tokens
        self.used = np.zeros(pages, np.int64)  # last use, on the ledger's clock
        self.indexed = np.zeros(pages, np.bool_)
        self._beside: dict[int, int] = {}  # handle of group 0 -> ours
        self._of: dict[int, int] = {}  # ours -> handle of group 0
        self._idle: list[tuple[int, int]] = []  # heap of (used, handle); stale ones are skipped

    def insert(self, trie_handle: int, handle: int, page: int) -> bool:
        """Index a sealed page beside the trie's; False when another stands there: ours stays
        private."""
        if self._beside.setdefault(trie_handle, handle) != handle:
            return False
        require(handle not in self._of, f"handle {handle:#x} is indexed twice")
        self._of[handle] = trie_handle
        self.indexed[page] = True
        return True

    def remove(self, handle: int, page: int) -> None:
        """The page is about to be free."""
        del self._beside[self._of.pop(handle)]
        self.indexed[page] = False

    def beside(self, trie_handle: int) -> int | None:
        return self._beside.get(trie_handle)

    def of(self, handle: int) -> int | None:
        """The trie's handle that this page of ours hangs beside."""
        return self._of.get(handle)

    def retain(self, trie: set[int], trusted: np.ndarray) -> np.ndarray:
        """Forget every page but those of bool[pages] `trusted` beside one of `trie`; returns the
        uint64[k] handles that stay. Whoever calls offers them anew."""
        kept = {
            ours: beside
            for ours, beside in self._of.items()
            if beside in trie and trusted[ours & 0xFF_FFFF]
        }
        self._of = kept
        self._beside = {beside: ours for ours, beside in kept.items()}
        self._idle.clear()
        handles = np.array(list(kept), np.uint64)
        self.indexed[:] = False
        self.indexed[handle_pages(handles)] = True
        return handles

    def usable(self, trie_handles: list[int]) -> list[int]:
        """Depths 0 .. len(trie_handles) at which a prefix can be continued, deepest first."""
        held = [handle in self._beside for handle in trie_handles]
        depths = [0]
        run = 0  # columns in a row that have a page, up to the one looked at
        for depth, has in enumerate(held, start=1):
            run = run + 1 if has else 0
            first = first_column(depth * self.page_tokens, self.window, self.page_tokens)
            if run >= depth - first:
                depths.append(depth)
        return depths[::-1]

    def pages_at(self, trie_handles: list[int]) -> np.ndarray:
        """uint64[k] handles of the columns that the token after these pages can see."""
        depth = len(trie_handles)
        first = first_column(depth * self.page_tokens, self.window, self.page_tokens)
        return np.array([self._beside[handle] for handle in trie_handles[first:]], np.uint64)

    def offer(self, handle: int, page: int) -> None:
        """An unleased page may be evicted from now on."""
        heapq.heappush(self._idle, (int(self.used[page]), handle))

    def oldest(self) -> tuple[int, int] | None:
        """Pop the (used, handle) with the oldest use; the caller checks that it holds."""
        return heapq.heappop(self._idle) if self._idle else None

    def offered(self) -> int:
        """Entries of the eviction heap, stale ones included."""
        return len(self._idle)

    def rebuild(self, live: list[tuple[int, int]]) -> None:
        """Replace the heap, when stale entries outnumber the live ones."""
        heapq.heapify(live)
        self._idle = live

    def clear(self) -> None:
        """The pool's contents are void."""
        self._beside.clear()
        self._of.clear()
        self._idle.clear()
        self.indexed[:] = False

    def verify(self, trie: set[int]) -> None:
        """Recount. `trie`: every handle that the prefix index knows. Raises InvariantError."""
        require(len(self._beside) == len(self._of), "window cache: the two dicts differ in number")
        for trie_handle, handle in self._beside.items():
            require(self._of.get(handle) == trie_handle, f"{handle:#x} is not beside its page")
            require(trie_handle in trie, f"{handle:#x} is beside a page that left the trie")
        require(int(self.indexed.sum()) == len(self._of), "window cache: indexed flags differ")
