"""Prefix index: which sealed page holds the KV of which tokens after which prefix.

A trie in one dict: (parent, the page's token bytes) -> handle, where parent is the handle of the
page before, generation and all, or a root that stands for the tag (model, weights epoch, adapter,
layout, dtype, rope, tenant salt). Tokens are compared, not hashed down: two contents never share a
key. A page is indexed only once it is sealed, and leaves the trie before it is freed. Eviction
takes leaves first, least recently used first; a page with leases or children stays.

Only kv.ledger may call this. It knows handles and bytes, not requests or steps.
"""

from __future__ import annotations

import hashlib
import heapq

import numpy as np

from holdfast.errors import InvariantError, require

# A chain key names a page's tokens and everything before them, in memory and beyond: 128 bits.
CHAIN_KEY_BYTES = 16


class PrefixIndex:
    """The trie over one pool of `pages` pages. `chained`: keep the chain key of every page, for the
    tiers below the device to go on from."""

    def __init__(self, pages: int, *, chained: bool = False) -> None:
        self.chains: dict[int, bytes] | None = {} if chained else None  # handle or root -> key
        self._roots: dict[bytes, int] = {}
        self._handles: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}  # handle -> its key, for removal
        self.children = np.zeros(pages, np.int32)
        self.used = np.zeros(pages, np.int64)  # last use, on the ledger's clock
        self.indexed = np.zeros(pages, np.bool_)
        self._leaves: list[
            tuple[int, int]
        ] = []  # heap of (used, handle); stale entries are skipped

    def __len__(self) -> int:
        return len(self._handles)

    def root(self, tag: bytes) -> int:
        """The parent of first pages under `tag`: a negative number, so it is never a handle."""
        root = self._roots.setdefault(tag, -1 - len(self._roots))
        if self.chains is not None and root not in self.chains:
            self.chains[root] = self.chain_key(b"", tag)
        return root

    def chain_key(self, parent: bytes, content: bytes) -> bytes:
        """The key of `content`: a page's tokens behind `parent`, or a tag behind nothing."""
        return hashlib.blake2b(content, digest_size=CHAIN_KEY_BYTES, key=parent).digest()

    def walk(self, root: int, tokens: np.ndarray, page_tokens: int, pages_max: int) -> list[int]:
        """Handles of the longest indexed prefix of `tokens` int32[k], at most `pages_max` pages."""
        data = tokens[: pages_max * page_tokens].tobytes()
        step = page_tokens * tokens.itemsize
        found: list[int] = []
        parent = root
        for at in range(0, len(data) - step + 1, step):
            handle = self._handles.get((parent, data[at : at + step]))
            if handle is None:
                break
            found.append(handle)
            parent = handle
        return found

    def insert(self, parent: int, tokens: bytes, handle: int, page: int) -> int | None:
        """Index a sealed page. Returns the handle that now stands for these tokens.

        That is another page's when the same tokens were indexed before (ours stays private), and
        None when the parent has left the trie, so that nothing could ever reach the page.
        """
        if parent >= 0 and parent not in self._keys:
            return None
        key = (parent, tokens)
        known = self._handles.setdefault(key, handle)
        if known != handle:
            return known
        if handle in self._keys:
            raise InvariantError(f"handle {handle:#x} is indexed twice")
        self._keys[handle] = key
        self.indexed[page] = True
        if self.chains is not None:
            self.chains[handle] = self.chain_key(self.chains[parent], tokens)
        if parent >= 0:
            self.children[parent & 0xFF_FFFF] += 1
        return handle

    def remove(self, handle: int, page: int) -> int:
        """Take a leaf out of the trie; returns its parent's handle, or a negative root."""
        require(self.children[page] == 0, f"page {page} leaves the trie before its children")
        key = self._keys.pop(handle)
        del self._handles[key]
        if self.chains is not None:
            del self.chains[handle]
        self.indexed[page] = False
        if key[0] >= 0:
            self.children[key[0] & 0xFF_FFFF] -= 1
        return key[0]

    def offer(self, handle: int, page: int) -> None:
        """An unleased leaf may be evicted from now on."""
        heapq.heappush(self._leaves, (int(self.used[page]), handle))

    def oldest(self) -> tuple[int, int] | None:
        """Pop the (used, handle) offered with the oldest use; the caller checks that it holds."""
        return heapq.heappop(self._leaves) if self._leaves else None

    def offered(self) -> int:
        """Entries of the eviction heap, stale ones included."""
        return len(self._leaves)

    def rebuild_leaves(self, live: list[tuple[int, int]]) -> None:
        """Replace the heap, when stale entries outnumber the live ones."""
        heapq.heapify(live)
        self._leaves = live

    def handles(self) -> list[int]:
        """Every indexed handle."""
        return list(self._keys)

    def below(self, doomed: set[int], over: set[int]) -> list[int]:
        """Handles that are in `doomed` or below one of those or of `over`, parents first."""
        found: dict[int, None] = {}
        for handle, (parent, _) in self._keys.items():  # in the order of insertion: parents first
            if handle in doomed or parent in found or parent in over:
                found[handle] = None
        return list(found)

    def retain(self, trusted: np.ndarray) -> list[int]:
        """Forget every page but those of bool[pages] `trusted` whose parents stay as well; returns
        the handles that stay, parents first. Whoever calls offers the leaves anew."""
        kept: dict[int, tuple[int, bytes]] = {}
        for handle, key in self._keys.items():  # in the order of insertion: parents first
            if trusted[handle & 0xFF_FFFF] and (key[0] < 0 or key[0] in kept):
                kept[handle] = key
        self._keys = kept
        self._handles = {key: handle for handle, key in kept.items()}
        self._leaves.clear()
        if self.chains is not None:
            self.chains = {of: key for of, key in self.chains.items() if of < 0 or of in kept}
        self.children[:] = 0
        self.indexed[:] = False
        for handle, key in kept.items():
            self.indexed[handle & 0xFF_FFFF] = True
            if key[0] >= 0:
                self.children[key[0] & 0xFF_FFFF] += 1
        return list(kept)

    def clear(self) -> None:
        """Forget everything but the roots: the pool's contents are void."""
        self._handles.clear()
        self._keys.clear()
        self._leaves.clear()
        if self.chains is not None:
            self.chains = {parent: key for parent, key in self.chains.items() if parent < 0}
        self.children[:] = 0
        self.indexed[:] = False

    def verify(self) -> None:
        """Recount children and the two dicts against each other. Raises InvariantError."""
        require(len(self._keys) == len(self._handles), "trie: keys and handles differ in number")
        parents, before = [], set()
        for handle, key in self._keys.items():
            if self._handles.get(key) != handle:
                raise InvariantError(f"trie: {handle:#x} is not under its key")
            before.add(handle)
            if key[0] >= 0:
                if key[0] not in before:
                    raise InvariantError(f"trie: the parent of {handle:#x} is gone or came later")
                parents.append(key[0] & 0xFF_FFFF)
        children = np.bincount(np.array(parents, np.int64), minlength=self.children.size)
        require((children == self.children).all(), "trie: children counts differ")
        require(int(self.indexed.sum()) == len(self._keys), "trie: indexed flags differ")
