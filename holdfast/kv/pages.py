"""The pages of one layer group as a table: state, generation, leases; the counts always add up.

    FREE ──take──> RESERVED ──launch──> WRITING ──seal──> SEALED ──last lease, evict──> FREE
                       ├──────last lease──┴─(via RETIRING while a step may touch it)──> FREE
                       └load─> LOADING ──loaded──> SEALED, or not ──> RESERVED

Page 0 is TRASH for ever. A page has as many leases as there are holders that count on its bytes:
the row that fills it, rows that share it, a seal or a zeroing in flight. A generation rises when a
page becomes free, so that a handle taken before is stale after.

Only kv.ledger may call this. It knows pages, not requests, tokens or steps.
"""

from __future__ import annotations

import enum

import numpy as np

from holdfast.errors import InvariantError, require
from holdfast.wire.plan import NEXT_GENERATION, TRASH_PAGE, handle_pages, handles_of


class PageState(enum.IntEnum):
    FREE = 0
    RESERVED = 1  # has an owner, nothing launched writes it yet
    WRITING = 2  # a launched step writes or wrote it; not all of its tokens are summed
    SEALED = 3  # full, committed, checksummed; never written again
    LOADING = 4  # a copy fills it
    RETIRING = 5  # given up by its owner; a launched step may still touch it
    QUARANTINED = 6  # an old epoch may still write it; unused while promotion follows the fence
    TRASH = 7


_FREE, _RESERVED, _TRASH = int(PageState.FREE), int(PageState.RESERVED), int(PageState.TRASH)
# bool[states]: those that nobody may lease, and those that somebody must.
_IDLE = np.isin(np.arange(len(PageState)), (PageState.FREE, PageState.TRASH))
_NEEDS_LEASE = np.isin(
    np.arange(len(PageState)),
    (PageState.RESERVED, PageState.WRITING, PageState.LOADING, PageState.RETIRING),
)


class PagePool:
    """One group's pages. P = pages of the pool, the trash page included.

    state: uint8[P]; leases: int32[P]; sums: uint64[P], sealed_at: int64[P] on the ledger's clock
    (both valid when SEALED). current: uint64[P], the one handle of each page that is not stale, its
    generation included.
    """

    def __init__(self, group: int, pages: int) -> None:
        self.group = group
        self.pages = pages
        self.state = np.zeros(pages, np.uint8)
        self.current = handles_of(group, np.arange(pages), np.ones(pages, np.uint32))
        self.leases = np.zeros(pages, np.int32)
        self.sums = np.zeros(pages, np.uint64)
        self.sealed_at = np.zeros(pages, np.int64)
        self.state[TRASH_PAGE] = PageState.TRASH
        # A stack; low pages on top, so that short runs stay in few pages. Pages are int64 wherever
        # they are indexes: numpy converts others at each access, at six times its price.
        self._free = np.arange(pages - 1, 0, -1, dtype=np.int64)
        self.free = pages - 1

    def take(self, count: int) -> np.ndarray:
        """uint64[count] handles of pages that become RESERVED with one lease each."""
        require(0 <= count <= self.free, f"take {count} of {self.free} free pages")
        pages = self._free[self.free - count : self.free][::-1].copy()
        self.free -= count
        self.state[pages] = _RESERVED
        self.leases[pages] = 1
        return self.current[pages]

    def give_back(self, pages: np.ndarray) -> None:
        """Pages int[k] without leases become FREE; their handles are stale from here on."""
        count = pages.size
        if count == 0:
            return
        require(not self.leases[pages].any(), "a page with leases cannot be free")
        require((self.state[pages] != _FREE).all(), "a page was freed twice")
        self.state[pages] = _FREE
        self.current[pages] += NEXT_GENERATION
        self._free[self.free : self.free + count] = pages
        self.free += count

    def pages_of(self, handles: np.ndarray) -> np.ndarray:
        """int64[k] pages of uint64[k] handles. Raises InvariantError when one is stale."""
        pages = handle_pages(handles).astype(np.int64)
        stale = self.current[pages] != handles
        if np.count_nonzero(stale):
            at = int(stale.argmax())
            raise InvariantError(
                f"stale or foreign handle {int(handles[at]):#x}: page {pages[at]} of group "
                f"{self.group} is {int(self.current[pages[at]]):#x}"
            )
        return pages

    def counts(self) -> dict[PageState, int]:
        found = np.bincount(self.state, minlength=len(PageState))
        return {state: int(found[state]) for state in PageState}

    def verify(self) -> None:
        """Recount everything from the arrays. Raises InvariantError naming what does not add up."""
        # Called after every event of a simulation: no message is put together before it is needed.
        counts = np.bincount(self.state, minlength=len(PageState))
        if counts[_FREE] != self.free or counts[_TRASH] != 1 or counts.sum() != self.pages:
            raise InvariantError(f"{self.free} free of {self.pages} pages, but {self.counts()}")
        listed = self._free[: self.free]
        once = np.bincount(listed, minlength=self.pages)
        require(np.count_nonzero(once > 1) == 0, "a page is twice in the free list")
        strays = np.count_nonzero(self.state[listed] != _FREE)
        require(strays == 0, "a held page is in the free list")
        require(np.count_nonzero(self.leases < 0) == 0, "a page has negative leases")
        leased = self.state[self.leases > 0]
        idle = np.count_nonzero(_IDLE[leased])
        require(idle == 0, "a free or trash page has leases")
        unleased = self.state[self.leases == 0]
        lost = np.count_nonzero(_NEEDS_LEASE[unleased])
        require(lost == 0, "an unsealed held page has no lease")
