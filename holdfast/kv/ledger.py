"""The KV ledger: who may count on which page, until when.

Verbs, in the life of a page: `reserve` (a row gets it), `launch` (a step will write it), `seal`
(its bytes are final and summed), `acquire` (another row shares it), `release` (a holder gives it up
at a step: the page is *retired*, never freed), `acknowledge` (that step's result came: only now
leases drop, and a page without any becomes free, or stays cached when the prefix index knows it).
Copies between tiers: `load` and `loaded` or `not_loaded` (a copy fills a page; nobody else knows it
until then), `lend` and `repay` (a copy reads a sealed page). When a worker has ended, `survive`
says what is kept; with `read` and `judge` a step sums sealed pages again, and `drop` gives up what
is not as it was sealed, with all that was computed from it.

Invariants, of which this file is the home: a lease is released exactly once; a stale generation is
refused; a page gets no new owner while a launched step may touch it; nothing is found or handed out
while a page that outlived its worker is not verified. `verify` recounts all of it.

Called by core.scheduler and core.commit; integers only; no request, no text, no device.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.errors import InvariantError, require
from holdfast.kv.pages import PagePool, PageState
from holdfast.kv.prefix import PrefixIndex
from holdfast.kv.soil import Soil
from holdfast.kv.window import WindowCache
from holdfast.wire.plan import handle_groups, handle_pages

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
# Of so many steps before a worker's end nothing is believed, their sums included: what faults may
# have gone wrong before it says so, and the sum be of bytes that were wrong already.
RECENT_STEPS = 2


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
        self._lent_pages = 0
        self.windows = [
            WindowCache(pages, window, limits.page_tokens)
            for pages, window in zip(limits.pages_by_group[1:], limits.windows[1:], strict=True)
        ]
        self._cached = [0] * limits.groups  # sealed, indexed, without a lease: free on demand
        self._retiring = [0] * limits.groups  # leases waiting for a step's result
        self._soil = Soil(limits.pages_by_group)
        self.evicted = 0
        # Pages that outlived their worker and were not summed since.
        self._unverified = [np.zeros(pages, np.bool_) for pages in limits.pages_by_group]
        self.unverified = 0
        self.kept = self.dropped = 0  # of the sealed pages, at workers' ends and by wrong sums
        self._acknowledged = 0
        self._clock = 0
        # step -> (group, handles) whose leases drop with its result. A handful of steps at most.
        self._retired: dict[int, list[tuple[int, np.ndarray]]] = {}
        # step -> the same of leases that a step has for its sums alone (`read`).
        self._read: dict[int, list[tuple[int, np.ndarray]]] = {}

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
        require(self.unverified == 0, "pages are given out before all that were kept are verified")
        handles = np.empty((len(self.pools), count), np.uint64)
        for group, pool in enumerate(self.pools):
            if count > pool.free:
                self._evict(group, count - pool.free)
            handles[group] = pool.take(count)
        return handles

    def soiled(self, handles: np.ndarray) -> np.ndarray:
        """uint64[k]: those of these newly reserved handles whose pages must be zeroed before they
        are used. Each is told once: the plan that first uses the page zeroes it."""
        if self._soil.count == 0:
            return handles[:0].reshape(-1)
        return np.concatenate(
            [
                mine[self._soil.wipe(group, self.pools[group].pages_of(mine))]
                for group, mine in enumerate(handles)
            ]
        )

    def soil(self, group: int, pages: np.ndarray) -> None:
        """These distinct pages int[k] hold what is not finite, unless they are sealed (then it
        was written to another page of the row) or the trash page."""
        state = self.pools[group].state[pages]
        self._soil.mark(group, pages[(state != _SEALED) & (state != _TRASH)])

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
        require(self.unverified == 0, "a prefix is looked for before all that was kept is verified")
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
        if self._retired:
            for due in sorted(at for at in self._retired if at <= step):
                for group, handles in self._retired.pop(due):
                    self._retiring[group] -= handles.size
                    self._drop(group, self.pools[group].pages_of(handles))
        if self._read:
            for due in sorted(at for at in self._read if at <= step):
                for group, handles in self._read.pop(due):
                    self._finish_read(group, handles)

    def _drop(self, group: int, pages: np.ndarray, *, used: bool = True) -> None:
        """One lease fewer on each of these pages. used: whether that was a use of them."""
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
            self._drop_beside(group, idle, used=used)
            return
        known = self.index.indexed[idle]
        pool.give_back(idle[~known])
        kept = idle[known]
        self._cached[0] += kept.size
        if used:
            self.index.used[kept] = self._clock
        for page in kept[self.index.children[kept] == 0]:
            self.index.offer(self._handle(int(page)), int(page))
        self._offer_lent(pages)
        if self.index.offered() > 4 * self.limits.pages:
            self._compact_leaves()

    def _drop_beside(self, group: int, idle: np.ndarray, *, used: bool) -> None:
        """Pages int64[k] of a window group have lost their last lease."""
        pool, cache = self.pools[group], self.windows[group - 1]
        known = cache.indexed[idle]
        pool.give_back(idle[~known])
        kept = idle[known]
        self._cached[group] += kept.size
        if used:
            cache.used[kept] = self._clock
        for page in kept.tolist():
            cache.offer(int(pool.current[page]), page)
        if cache.offered() > 4 * pool.pages:
            self._compact_beside(group)

    def _compact_beside(self, group: int) -> None:
        pool, cache = self.pools[group], self.windows[group - 1]
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
        pool.sealed_at[pages] = self._clock

    def share(self, handle: int, parent: int, tokens: bytes) -> int | None:
        """Put a sealed page into the prefix index under `parent`, a handle or a root.

        Returns the handle that stands for these tokens from now on, the parent of the next page,
        or None when the chain cannot be indexed further (see PrefixIndex.insert).
        """
        page = handle & 0xFF_FFFF
        if not self._sealed(handle, page):
            raise InvariantError(f"page {page} is shared before it is sealed")
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

    def loaded(self, handle: int, checksum: int, sealed_at: int) -> None:
        """The copy is over and the page's bytes have this sum, the one they were sealed with
        then."""
        page = self._turn(np.array([handle], np.uint64), _LOADING, _SEALED)
        self.pools[0].sums[page] = checksum
        self.pools[0].sealed_at[page] = sealed_at

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
        self._lent_pages += 1

    def repay(self, handle: int) -> None:
        """The copy is over."""
        self.lent[handle & 0xFF_FFFF] = False
        self._lent_pages -= 1
        self.release(np.array([handle], np.uint64), 0)

    def _offer_lent(self, pages: np.ndarray) -> None:
        """Of pages that lost a lease: those whose last one is lent may leave the trie."""
        if self._lent_pages == 0:
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
            pool.give_back(np.array([page]))
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
                pool.give_back(np.array([page]))
                self._cached[0] -= 1
                self.evicted += 1
                count -= 1
            for group, cache in enumerate(self.windows, start=1):
                if (beside := cache.beside(handle)) is not None:
                    self._free_beside(group, beside)
            if parent >= 0:
                self._offer_parent(parent)

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

    # --- what outlives a worker, and what is found to have changed ---

    @property
    def clock(self) -> int:
        """Results taken so far, in all epochs: the moment at which a page was sealed."""
        return self._clock

    @property
    def reading(self) -> int:
        """Pages of group 0 that steps in flight sum again."""
        return sum(mine.size for reads in self._read.values() for of, mine in reads if of == 0)

    def reset(self) -> None:
        """The device's memory is void: every page is free again.

        What a process leaves that was ended in the middle of a step, or by a fault, may be anything
        anywhere, a NaN row's values among it; and what a dead core knew of that is gone with it.
        """
        self.index.clear()
        for cache in self.windows:
            cache.clear()
        self._start_over([np.empty(0, np.uint64)] * len(self.pools))

    def survive(self, sealed_until: int | None) -> np.ndarray:
        """The worker has ended and the memory is the same: uint64[k] handles of what is kept, which
        is sealed, can be found, was not sealed in the last steps nor after `sealed_until`, and
        whose prefix is kept too. Parents come first. All else is free and soiled.

        None of it may be used before `judge` has found all of it unchanged.
        """
        newest = self._clock - RECENT_STEPS
        if sealed_until is not None:
            newest = min(newest, sealed_until)
        trusted = [(pool.state == _SEALED) & (pool.sealed_at <= newest) for pool in self.pools]
        trie = self.index.retain(trusted[0])
        kept = [np.array(trie, np.uint64)]
        for cache, mine in zip(self.windows, trusted[1:], strict=True):
            kept.append(cache.retain(set(trie), mine))
        self._start_over(kept)
        return np.concatenate(kept)

    def _start_over(self, kept: list[np.ndarray]) -> None:
        """No lease, no step in flight; pages but for the handles kept in each group are free."""
        for group, (pool, handles) in enumerate(zip(self.pools, kept, strict=True)):
            stays = self._unverified[group]
            stays[:] = False
            stays[handle_pages(handles)] = True
            self.kept += handles.size
            self.dropped += np.count_nonzero(pool.state == _SEALED) - handles.size
            pool.leases[:] = 0
            gone = ~stays & (pool.state != _FREE) & (pool.state != _TRASH)
            pool.give_back(np.flatnonzero(gone))
            self._soil.mark_all_but(group, stays)
        self.unverified = sum(handles.size for handles in kept)
        self._cached = [handles.size for handles in kept]
        self._retiring = [0] * len(self.pools)
        self.lent[:] = False
        self._lent_pages = 0
        self._retired.clear()
        self._read.clear()
        self._acknowledged = 0
        self._compact_leaves()
        for group in range(1, len(self.pools)):
            self._compact_beside(group)

    def sealed_from(self, group: int, page: int, count: int) -> np.ndarray:
        """uint64[k <= count] handles of sealed pages from `page` on that no copy or step reads for
        its sum yet."""
        pool = self.pools[group]
        sealed = pool.state[page:] == _SEALED
        if group == 0:
            sealed &= ~self.lent[page:]
        return pool.current[page + np.flatnonzero(sealed)[:count]]

    def read(self, handles: np.ndarray, step: int) -> None:
        """The step that is launched now sums these sealed pages: each has one more lease until its
        result is in, of the kind that keeps no page in the trie."""
        groups = handle_groups(handles)
        for group, pool in enumerate(self.pools):
            mine = handles[groups == group]
            if mine.size == 0:
                continue
            pages = pool.pages_of(mine)
            sealed = np.count_nonzero(pool.state[pages] == _SEALED)
            require(sealed == pages.size, "a page is read again that is not sealed")
            self.acquire(mine, group)
            self._retiring[group] += mine.size
            self._read.setdefault(step, []).append((group, mine))
            if group == 0:
                require(not self.lent[pages].any(), "a page is read again while a copy reads it")
                self.lent[pages] = True
                self._lent_pages += pages.size

    def _finish_read(self, group: int, handles: np.ndarray) -> None:
        pages = self.pools[group].pages_of(handles)
        self._retiring[group] -= pages.size
        if group == 0:
            self.lent[pages] = False
            self._lent_pages -= pages.size
        self._drop(group, pages, used=False)

    def judge(self, handles: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """uint64[k]: which of these pages are not what was sealed, their sums being uint64 `sums`.
        One that was given up meanwhile is nobody's any more."""
        groups, held = handle_groups(handles), self.are_sealed(handles)
        wrong = np.zeros(handles.size, np.bool_)
        for group, pool in enumerate(self.pools):
            at = held & (groups == group)
            pages = handle_pages(handles[at])
            same = pool.sums[pages] == sums[at]
            self._unverified[group][pages[same]] = False
            wrong[at] = ~same
        self._recount_unverified()
        return handles[wrong]

    def _recount_unverified(self) -> None:
        if self.unverified:
            self.unverified = sum(np.count_nonzero(one) for one in self._unverified)

    def is_sealed(self, handle: int) -> bool:
        """Whether this handle is not stale and its page still counts as sealed."""
        return bool(self.are_sealed(np.array([handle], np.uint64))[0])

    def are_sealed(self, handles: np.ndarray) -> np.ndarray:
        """bool[k]: `is_sealed` of each of uint64[k] handles."""
        groups, sealed = handle_groups(handles), np.zeros(handles.size, np.bool_)
        for group, pool in enumerate(self.pools):
            at = groups == group
            pages = handle_pages(handles[at])
            sealed[at] = (pool.current[pages] == handles[at]) & (pool.state[pages] == _SEALED)
        return sealed

    def drop(self, handles: set[int]) -> set[int]:
        """These sealed pages are not what they were: they are given up with all that hangs below
        them and beside that, and soiled. Returns the handles of all that was.

        Of a window group's page that is what hangs below the trie's page it is beside: the tokens
        behind may have seen it.
        """
        over = {
            beside
            for handle in handles
            if handle >> 56 and (beside := self.windows[(handle >> 56) - 1].of(handle)) is not None
        }
        trie = self.index.below(handles, over)
        doomed = handles | set(trie)
        for handle in reversed(trie):
            parent = self.index.remove(handle, handle & 0xFF_FFFF)
            if parent >= 0 and parent not in doomed:
                self._offer_parent(parent)
        for group, cache in enumerate(self.windows, start=1):
            doomed |= {one for handle in trie if (one := cache.beside(handle)) is not None}
            for handle in sorted(doomed):
                if handle >> 56 == group and cache.of(handle) is not None:
                    cache.remove(handle, handle & 0xFF_FFFF)
        self._give_up(doomed)
        return doomed

    def _offer_parent(self, parent: int) -> None:
        if self._evictable(parent, parent & 0xFF_FFFF):
            self.index.offer(parent, parent & 0xFF_FFFF)

    def _give_up(self, doomed: set[int]) -> None:
        """These pages have left trie and caches: free, or retiring while they have leases."""
        handles = np.array(sorted(doomed), np.uint64)
        groups = handle_groups(handles)
        for group, pool in enumerate(self.pools):
            pages = pool.pages_of(handles[groups == group])
            sealed = pages[pool.state[pages] == _SEALED]
            self.dropped += sealed.size
            self._unverified[group][pages] = False
            self._soil.mark(group, pages)
            leased = pool.leases[sealed] > 0
            pool.state[sealed[leased]] = _RETIRING
            self._cached[group] -= np.count_nonzero(~leased)
            pool.give_back(sealed[~leased])
        self._recount_unverified()

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
        self._soil.verify()
        unverified = sum(np.count_nonzero(one) for one in self._unverified)
        require(unverified == self.unverified, f"{self.unverified} unverified, found {unverified}")
        handles = np.array(self.index.handles(), np.uint64)
        self.pools[0].pages_of(handles)  # raises on a stale one
        late = [step for step in self._retired if step <= self._acknowledged]
        require(not late, f"leases of steps {late} wait though {self._acknowledged} is over")
        for group, told in enumerate(self._retiring):
            leaving = (*self._retired.values(), *self._read.values())
            retired = [entry for entries in leaving for entry in entries]
            waiting = sum(handles.size for of, handles in retired if of == group)
            require(waiting == told, f"retiring count of group {group} is {told}, found {waiting}")
        require(int(self.lent.sum()) == self._lent_pages, "lent pages miscounted")
        held = (pool.state == _SEALED) | (pool.state == _RETIRING)
        astray = self.lent & ((pool.leases == 0) | ~held)
        if np.count_nonzero(astray):
            raise InvariantError(f"pages lent but not held: {np.flatnonzero(astray)}")
