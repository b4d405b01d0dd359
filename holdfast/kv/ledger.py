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
from holdfast.errors import InvariantError, require
from holdfast.kv.pages import PagePool, PageState
from holdfast.kv.prefix import PrefixIndex
from holdfast.kv.window import WindowCache
from holdfast.wire.plan import TRASH_PAGE, handle_groups

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
    """All pools of one engine. Group 0 (full attention) is the one the prefix index stands on; the
    pages of a window group hang beside its pages (kv.window).

    Pages are given to rows as sets: one of each group, for the same column of their page tables.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pools = [PagePool(group, pages) for group, pages in enumerate(limits.pages_by_group)]
        self.index = PrefixIndex(limits.pages, chained=limits.host_pages > 0)
        # Of each page, whether one of its leases is lent. Such a lease keeps the page from being
        # free, but not in the trie: or a copy of a leaf would hold back the pages above it.
        self.lent = np.zeros(limits.pages, np.bool_)
        self.windows = [
            WindowCache(pages, window, limits.page_tokens)
            for pages, window in zip(limits.pages_by_group[1:], limits.windows[1:], strict=True)
        ]
        self._cached = [0] * limits.groups  # sealed, indexed, without a lease: free on demand
        self._retiring = [0] * limits.groups  # leases waiting for a step's result
        # Pages whose bytes may be anything (0 * NaN is NaN): zeroed before their next use.
        self._dirty = [np.zeros(pages, np.bool_) for pages in limits.pages_by_group]
        self._dirty_pages = 0
        self.evicted = 0
        self._acknowledged = 0
        self._clock = 0
        # step -> (group, handles) whose leases drop with its result. A handful of steps at most.
        self._retired: dict[int, list[tuple[int, np.ndarray]]] = {}

    # --- room ---

    @property
    def cached(self) -> int:
        """Pages of group 0 that are sealed, indexed and without a lease."""
        return self._cached[0]

    @property
    def retiring(self) -> int:
        """Leases that wait for a step's result, of all groups."""
        return sum(self._retiring)

    def available(self) -> int:
        """Sets of pages, one of each group, that `reserve` can hand out now."""
        if not self.windows:
            return self.pools[0].free + self._cached[0]
        return min(self.available_in(group) for group in range(len(self.pools)))

    def available_in(self, group: int) -> int:
        """Pages of one group that can be handed out now."""
        return self.pools[group].free + self._cached[group]

    def coming(self, count: int) -> bool:
        """Whether `count` sets may be there once what is retiring has come back."""
        return all(
            count - self.available_in(group) <= self._retiring[group]
            for group in range(len(self.pools))
        )

    def held(self, group: int = 0) -> int:
        """Pages that somebody has a lease on."""
        return self.limits.pages_by_group[group] - 1 - self.available_in(group)

    def reserve(self, count: int) -> np.ndarray | None:
        """uint64[groups, count] handles, each with one lease, or None when there are not that
        many sets."""
        if count > self.available():
            return None
        handles = np.empty((len(self.pools), count), np.uint64)
        for group, pool in enumerate(self.pools):
            if count > pool.free:
                self._evict(group, count - pool.free)
            handles[group] = pool.take(count)
        return handles

    def soiled(self, handles: np.ndarray) -> np.ndarray:
        """uint64[k]: those of these newly reserved handles whose pages must be zeroed before they
        are used. Each is told once: the plan that first uses the page zeroes it."""
        if self._dirty_pages == 0:
            return handles[:0].reshape(-1)
        found = []
        for group, mine in enumerate(handles):
            pages = self.pools[group].pages_of(mine)
            dirty = self._dirty[group][pages]
            found.append(mine[dirty])
            self._dirty[group][pages[dirty]] = False
            self._dirty_pages -= np.count_nonzero(dirty)
        return np.concatenate(found)

    def soil(self, group: int, pages: np.ndarray) -> None:
        """These distinct pages int32[k] hold what is not finite, unless they are sealed (then it
        was written to another page of the row) or the trash page."""
        state = self.pools[group].state[pages]
        pages = pages[(state != _SEALED) & (state != _TRASH)]
        dirty = self._dirty[group]
        self._dirty_pages += pages.size - np.count_nonzero(dirty[pages])
        dirty[pages] = True

    def _soil_all(self) -> None:
        """Nobody knows what the pages hold."""
        for dirty in self._dirty:
            dirty[TRASH_PAGE + 1 :] = True
        self._dirty_pages = sum(self.limits.pages_by_group) - len(self.pools)

    def launch(self, handles: np.ndarray) -> None:
        """The next step writes these reserved pages, uint64[groups, k]."""
        for pool, mine in zip(self.pools, handles, strict=True):
            pages = pool.pages_of(mine)
            reserved = np.count_nonzero(pool.state[pages] == _RESERVED)
            require(reserved == pages.size, "a launched page is not reserved")
            pool.state[pages] = _WRITING

    # --- sharing ---

    def find(self, root: int, tokens: np.ndarray, pages_max: int) -> list[np.ndarray]:
        """Handles of the longest cached prefix, for each group: uint64[k] of group 0, and of a
        window group those that the token behind the k pages can see. No lease yet, so `acquire`
        comes next."""
        found = self.index.walk(root, tokens, self.limits.page_tokens, pages_max)
        if self.windows and found:
            depths = [set(cache.usable(found)) for cache in self.windows]
            found = found[: max(set.intersection(*depths))]
        return [np.array(found, np.uint64), *(cache.pages_at(found) for cache in self.windows)]

    def acquire(self, handles: np.ndarray, group: int = 0) -> None:
        """One more lease on each of these distinct pages."""
        pool = self.pools[group]
        pages = pool.pages_of(handles)
        require(not np.count_nonzero(pool.state[pages] == _FREE), "a lease on a free page")
        leases = pool.leases[pages]
        self._cached[group] -= leases.size - np.count_nonzero(leases)
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
        self._retiring[group] += handles.size

    def acknowledge(self, step: int) -> None:
        """The result of `step` is in: leases released at or before it drop. Called every step."""
        self._clock += 1
        self._acknowledged = step
        for due in sorted(at for at in self._retired if at <= step):
            for group, handles in self._retired.pop(due):
                self._retiring[group] -= handles.size
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
            self._drop_beside(group, idle)
            return
        known = self.index.indexed[idle]
        pool.give_back(idle[~known])
        kept = idle[known]
        self._cached[0] += kept.size
        self.index.used[kept] = self._clock
        for page in kept[self.index.children[kept] == 0]:
            self.index.offer(self._handle(int(page)), int(page))
        self._offer_lent(pages)
        if self.index.offered() > 4 * self.limits.pages:
            self._compact_leaves()

    def _drop_beside(self, group: int, idle: np.ndarray) -> None:
        """Pages int32[k] of a window group have lost their last lease."""
        pool, cache = self.pools[group], self.windows[group - 1]
        known = cache.indexed[idle]
        pool.give_back(idle[~known])
        kept = idle[known]
        self._cached[group] += kept.size
        cache.used[kept] = self._clock
        for page in kept.tolist():
            cache.offer(int(pool.current[page]), page)
        if cache.offered() > 4 * pool.pages:
            unleased = np.flatnonzero((pool.leases == 0) & cache.indexed).tolist()
            cache.rebuild([(int(cache.used[p]), int(pool.current[p])) for p in unleased])

    # --- sealing ---

    def seal(self, handles: np.ndarray, checksums: np.ndarray) -> None:
        """The sums uint64[k] of these full pages are in. The caller still holds its leases."""
        if not self.windows:
            self._seal(0, handles, checksums)
            return
        groups = handle_groups(handles)
        for group in range(len(self.pools)):
            mine = groups == group
            self._seal(group, handles[mine], checksums[mine])

    def _seal(self, group: int, handles: np.ndarray, checksums: np.ndarray) -> None:
        pool = self.pools[group]
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

    def share_beside(self, trie_handle: int, handle: int) -> None:
        """A sealed page of a window group goes beside the trie's page for the same tokens."""
        group, page = handle >> 56, handle & 0xFF_FFFF
        pool = self.pools[group]
        sealed = bool(pool.state[page] == _SEALED) and int(pool.current[page]) == handle
        require(sealed, f"page {page} of group {group} is shared before it is sealed")
        self.windows[group - 1].insert(trie_handle, handle, page)

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

    def _evict(self, group: int, count: int) -> None:
        if group:
            self._evict_beside(group, count)
        else:
            self._evict_leaves(count)

    def _evict_beside(self, group: int, count: int) -> None:
        pool, cache = self.pools[group], self.windows[group - 1]
        while count > 0:
            entry = cache.oldest()
            require(entry is not None, f"{self._cached[group]} pages cached, none can be evicted")
            used, handle = entry
            page = handle & 0xFF_FFFF
            held = pool.leases[page] or int(pool.current[page]) != handle
            if held or not cache.indexed[page] or cache.used[page] != used:
                continue
            self._free_beside(group, handle)
            count -= 1

    def _free_beside(self, group: int, handle: int) -> None:
        """A window group's page leaves the cache; without a lease it is free."""
        pool, page = self.pools[group], handle & 0xFF_FFFF
        self.windows[group - 1].remove(handle, page)
        if pool.leases[page] == 0:
            pool.give_back(np.array([page], np.int32))
            self._cached[group] -= 1
            self.evicted += 1

    def _evict_leaves(self, count: int) -> None:
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
                self._cached[0] -= 1
                self.evicted += 1
                count -= 1
            for group, cache in enumerate(self.windows, start=1):
                if (beside := cache.beside(handle)) is not None:
                    self._free_beside(group, beside)
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
        """The device's memory is void (a new epoch, nothing verified): every page is free again.

        What a process leaves that was ended in the middle of a step, or by a fault, may be anything
        anywhere, a NaN row's values among it; and what a dead core knew of that is gone with it.
        """
        for pool in self.pools:
            pool.leases[:] = 0
            held = np.flatnonzero((pool.state != _FREE) & (pool.state != _TRASH))
            pool.give_back(held.astype(np.int32))
        self._soil_all()
        self.index.clear()
        for cache in self.windows:
            cache.clear()
        self.lent[:] = False
        self._retired.clear()
        self._cached = [0] * len(self.pools)
        self._retiring = [0] * len(self.pools)
        self._acknowledged = 0

    def verify(self) -> None:
        """Recount everything. Raises InvariantError naming what does not add up."""
        for pool in self.pools:
            pool.verify()
        self.index.verify()
        pool = self.pools[0]
        unsealed = self.index.indexed & (pool.state != _SEALED)
        if np.count_nonzero(unsealed):
            raise InvariantError(f"pages indexed but not sealed: {np.flatnonzero(unsealed)}")
        indexed = [self.index.indexed, *(cache.indexed for cache in self.windows)]
        for group, known in enumerate(indexed):
            cached = int((known & (self.pools[group].leases == 0)).sum())
            told = self._cached[group]
            require(cached == told, f"cached count of group {group} is {told}, found {cached}")
        known_handles = set(self.index.handles()) if self.windows else set()
        for cache in self.windows:
            cache.verify(known_handles)
        dirty = sum(np.count_nonzero(one) for one in self._dirty)
        require(dirty == self._dirty_pages, f"{self._dirty_pages} dirty pages, found {dirty}")
        handles = np.array(self.index.handles(), np.uint64)
        self.pools[0].pages_of(handles)  # raises on a stale one
        late = [step for step in self._retired if step <= self._acknowledged]
        require(not late, f"leases of steps {late} wait though {self._acknowledged} is over")
        for group, told in enumerate(self._retiring):
            retired = [entry for entries in self._retired.values() for entry in entries]
            waiting = sum(handles.size for of, handles in retired if of == group)
            require(waiting == told, f"retiring count of group {group} is {told}, found {waiting}")
        astray = self.lent & ((pool.leases == 0) | (pool.state != _SEALED))
        if np.count_nonzero(astray):
            raise InvariantError(f"pages lent but not held: {np.flatnonzero(astray)}")
