"""The KV ledger: who may count on which page, until when.

Verbs, in the life of a page: `reserve` (a row gets it), `launch` (a step will write it), `seal`
(its bytes are final and summed), `acquire` (another row shares it), `release` (a holder gives it up
at a step: the page is *retired*, never freed), `acknowledge` (that step's result came: only now
leases drop, and a page without any becomes free, or stays cached when the prefix index knows it).
Copies between tiers: `load` and `loaded` or `not_loaded` (a copy fills a page; nobody else knows it
until then), `lend` and `repay` (a copy reads a sealed page).

Invariants, of which this file is the home: a lease is released exactly once; a stale generation is
refused; a page gets no new owner while a launched step may touch it. `verify` recounts all of it.

Called by core.scheduler and core.commit; integers only; no request, no text, no device.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.errors import require
from holdfast.kv.pages import PagePool, PageState
from holdfast.kv.prefix import PrefixIndex

# Plain integers: reading a member of an IntEnum costs a microsecond in Python 3.11.
_FREE, _RESERVED, _WRITING, _SEALED, _LOADING, _RETIRING, _TRASH = (
    int(state)
    for state in (
        PageState.FREE,
        PageState.RESERVED,
        PageState.WRITING,
        PageState.SEALED,
        PageState.LOADING,
        PageState.RETIRING,
        PageState.TRASH,
    )
)


class Ledger:
    """All pools of one engine. Group 0 (full attention) is the one the prefix index covers."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pools = [PagePool(group, limits.pages) for group in range(limits.groups)]
        self.index = PrefixIndex(limits.pages, chained=limits.host_pages > 0)
        # Of each page, whether one of its leases is lent. Such a lease keeps the page from being
        # free, but not in the trie: or a copy of a leaf would hold back the pages above it.
        self.lent = np.zeros(limits.pages, np.bool_)
        self.cached = 0  # sealed, indexed, without a lease: free on demand
        self.retiring = 0  # leases waiting for a step's result
        self.evicted = 0
        self._acknowledged = 0
        self._clock = 0
        # step -> (group, handles) whose leases drop with its result. A handful of steps at most.
        self._retired: dict[int, list[tuple[int, np.ndarray]]] = {}

    # --- room ---

    def available(self, group: int = 0) -> int:
        """Pages that `reserve` can hand out now."""
        return self.pools[group].free + (self.cached if group == 0 else 0)

    def held(self, group: int = 0) -> int:
        """Pages that somebody has a lease on."""
        return self.limits.pages_usable - self.available(group)

    def reserve(self, count: int, group: int = 0) -> np.ndarray | None:
        """uint64[count] handles, each with one lease, or None when there are not that many."""
        pool = self.pools[group]
        if count > pool.free:
            if count > self.available(group):
                return None
            self._evict(count - pool.free)
        return pool.take(count)

    def launch(self, handles: np.ndarray, group: int = 0) -> None:
        """The next step writes these reserved pages."""
        pool = self.pools[group]
        pages = pool.pages_of(handles)
        reserved = np.count_nonzero(pool.state[pages] == _RESERVED)
        require(reserved == pages.size, "a launched page is not reserved")
        pool.state[pages] = _WRITING

    # --- sharing ---

    def find(self, root: int, tokens: np.ndarray, pages_max: int) -> np.ndarray:
        """uint64[k] handles of the longest cached prefix; no lease yet, so `acquire` comes next."""
        found = self.index.walk(root, tokens, self.limits.page_tokens, pages_max)
        return np.array(found, np.uint64)

    def acquire(self, handles: np.ndarray, group: int = 0) -> None:
        """One more lease on each of these distinct pages."""
        pool = self.pools[group]
        pages = pool.pages_of(handles)
        require(not np.count_nonzero(pool.state[pages] == _FREE), "a lease on a free page")
        leases = pool.leases[pages]
        if group == 0:
            self.cached -= leases.size - np.count_nonzero(leases)
        pool.leases[pages] = leases + 1

    def release(self, handles: np.ndarray, step: int, group: int = 0) -> None:
        """Give up one lease on each of these distinct handles, once the result of `step` is in.

        `step` is the last launched one (0 for a page that no launched step was told of).
        """
        if handles.size == 0:
            return
        pool = self.pools[group]
        pages = pool.pages_of(handles)
        leases = pool.leases[pages]
        require(np.count_nonzero(leases > 0) == leases.size, "a lease was released twice")
        if step <= self._acknowledged:
            self._drop(group, pages)
            return
        last = leases == 1
        state = pool.state[pages]
        unsealed = (state == _RESERVED) | (state == _WRITING)
        pool.state[pages[last & unsealed]] = _RETIRING
        self._retired.setdefault(step, []).append((group, handles))
        self.retiring += handles.size

    def acknowledge(self, step: int) -> None:
        """The result of `step` is in: leases released at or before it drop. Called every step."""
        self._clock += 1
        self._acknowledged = step
        for due in sorted(at for at in self._retired if at <= step):
            for group, handles in self._retired.pop(due):
                self.retiring -= handles.size
                self._drop(group, self.pools[group].pages_of(handles))

    def _drop(self, group: int, pages: np.ndarray) -> None:
        pool = self.pools[group]
        left = pool.leases[pages] - 1
        require(np.count_nonzero(left < 0) == 0, "a lease was dropped twice")
        pool.leases[pages] = left
        if np.count_nonzero(left) == left.size:
            if group == 0:
                self._offer_lent(pages)
            return
        idle = pages[left == 0]
        if group != 0:
            pool.give_back(idle)
            return
        known = self.index.indexed[idle]
        pool.give_back(idle[~known])
        kept = idle[known]
        self.cached += kept.size
        self.index.used[kept] = self._clock
        for page in kept[self.index.children[kept] == 0]:
            self.index.offer(self._handle(int(page)), int(page))
        self._offer_lent(pages)
        if self.index.offered() > 4 * self.limits.pages:
            self._compact_leaves()

    # --- sealing ---

    def seal(self, handles: np.ndarray, checksums: np.ndarray) -> None:
        """The sums uint64[k] of these full pages are in. The caller still holds its leases."""
        pool = self.pools[0]
        pages = pool.pages_of(handles)
        state = pool.state[pages]
        writing = (state == _WRITING) | (state == _RETIRING)
        require(
            np.count_nonzero(writing) == pages.size, "a page was sealed that was not being written"
        )
        pool.state[pages] = _SEALED
        pool.sums[pages] = checksums

    def share(self, handle: int, parent: int, tokens: bytes) -> int | None:
        """Put a sealed page into the prefix index under `parent`, a handle or a root.

        Returns the handle that stands for these tokens from now on, the parent of the next page,
        or None when the chain cannot be indexed further (see PrefixIndex.insert).
        """
        page = handle & 0xFF_FFFF
        require(self._sealed(handle, page), f"page {page} is shared before it is sealed")
        return self.index.insert(parent, tokens, handle, page)

    def _sealed(self, handle: int, page: int) -> bool:
        pool = self.pools[0]
        return bool(pool.state[page] == _SEALED) and self._handle(page) == handle

    # --- copies between tiers ---

    def load(self, handles: np.ndarray) -> None:
        """A copy will fill these reserved pages."""
        self._turn(handles, _RESERVED, _LOADING)

    def loaded(self, handle: int, checksum: int) -> None:
        """The copy is over and the page's bytes have this sum, the one they were sealed with."""
        page = self._turn(np.array([handle], np.uint64), _LOADING, _SEALED)
        self.pools[0].sums[page] = checksum

    def not_loaded(self, handle: int) -> None:
        """The copy is over and the page's bytes are not what they should be."""
        self._turn(np.array([handle], np.uint64), _LOADING, _RESERVED)

    def _turn(self, handles: np.ndarray, before: int, after: int) -> np.ndarray:
        pool = self.pools[0]
        pages = pool.pages_of(handles)
        wrong = pages[pool.state[pages] != before]
        require(wrong.size == 0, f"pages {wrong} are not {PageState(before).name}")
        pool.state[pages] = after
        return pages

    def lend(self, handle: int) -> None:
        """One lease of a sealed page for the copy that reads it."""
        page = handle & 0xFF_FFFF
        require(self._sealed(handle, page), f"page {page} is copied before it is sealed")
        require(not self.lent[page], f"page {page} is lent twice")
        self.acquire(np.array([handle], np.uint64))
        self.lent[page] = True

    def repay(self, handle: int) -> None:
        """The copy is over."""
        self.lent[handle & 0xFF_FFFF] = False
        self.release(np.array([handle], np.uint64), 0)

    def _offer_lent(self, pages: np.ndarray) -> None:
        """Of pages that lost a lease: those whose last one is lent may leave the trie."""
        if self.index.chains is None:
            return
        for page in pages[self.lent[pages]].tolist():
            if self._evictable(self._handle(page), page):
                self.index.used[page] = self._clock
                self.index.offer(self._handle(page), page)

    # --- eviction, reset, checks ---

    def _evict(self, count: int) -> None:
        pool = self.pools[0]
        while count > 0:
            entry = self.index.oldest()
            require(entry is not None, f"{self.cached} pages cached but none can be evicted")
            used, handle = entry
            page = handle & 0xFF_FFFF
            if not self._evictable(handle, page) or self.index.used[page] != used:
                continue
            parent = self.index.remove(handle, page)
            if not self.lent[page]:  # else it is free when it is repaid
                pool.give_back(np.array([page], np.int32))
                self.cached -= 1
                self.evicted += 1
                count -= 1
            if parent >= 0:
                parent_page = parent & 0xFF_FFFF
                if self._evictable(parent, parent_page):
                    self.index.offer(parent, parent_page)

    def _evictable(self, handle: int, page: int) -> bool:
        pool = self.pools[0]
        return bool(
            pool.leases[page] == self.lent[page]
            and self.index.indexed[page]
            and self.index.children[page] == 0
            and self._handle(page) == handle
        )

    def _compact_leaves(self) -> None:
        pool = self.pools[0]
        idle = (pool.leases == self.lent) & self.index.indexed & (self.index.children == 0)
        pages = np.flatnonzero(idle)
        self.index.rebuild_leaves([(int(self.index.used[p]), self._handle(int(p))) for p in pages])

    def _handle(self, page: int) -> int:
        return int(self.pools[0].current[page])

    def reset(self) -> None:
        """The device's memory is void (a new epoch, nothing verified): every page is free again."""
        for pool in self.pools:
            pool.leases[:] = 0
            held = np.flatnonzero((pool.state != _FREE) & (pool.state != _TRASH))
            pool.give_back(held.astype(np.int32))
        self.index.clear()
        self.lent[:] = False
        self._retired.clear()
        self.cached = self.retiring = self._acknowledged = 0

    def verify(self) -> None:
        """Recount everything. Raises InvariantError naming what does not add up."""
        for pool in self.pools:
            pool.verify()
        self.index.verify()
        pool = self.pools[0]
        unsealed = self.index.indexed & (pool.state != _SEALED)
        require(not unsealed.any(), f"pages indexed but not sealed: {np.flatnonzero(unsealed)}")
        cached = int((self.index.indexed & (pool.leases == 0)).sum())
        require(cached == self.cached, f"cached count {self.cached}, found {cached}")
        astray = self.lent & ((pool.leases == 0) | (pool.state != _SEALED))
        require(not astray.any(), f"pages lent but not held: {np.flatnonzero(astray)}")
        for handle in self.index.handles():
            require(self._handle(handle & 0xFF_FFFF) == handle, f"stale handle {handle:#x} indexed")
        waiting = sum(h.size for retired in self._retired.values() for _, h in retired)
        require(waiting == self.retiring, f"retiring count {self.retiring}, found {waiting}")
