"""The page-order checker: does anything order two conflicting accesses to one page?

It owns vector clocks over streams and, per page, who wrote it last and who read it last; nothing
else. It never derives a fence: it is told, in the order of the submitting host thread, what the
stream API was really told, and answers before each launch whether an earlier operation may still be
running on a page that the new one touches. The code that places fences must not be its source.

    on one stream        each operation is after the one submitted before it
    record, then wait    what the waiting stream runs next is after what the event recorded
    host wait, fence     every later submission, on any stream, is after what was waited for
    nothing else         streams are non-blocking; a blocking copy is told as copy + host wait

Clocks are stamps: sequence << 12 | stream << 4 | kind, in an int64. Numbers are drawn from one
counter, so a stamp is at once a clock of its stream and the name of the operation that a finding
blames. At 10,000 operations a second the 51 bits of the sequence last for 7,000 years: no
renormalising, and state is bounded by pages x streams, `events_max` and `labels_max`.

Invariants: an operation with findings leaves no trace but its number. So every recorded pair of
conflicting accesses is ordered, and one last write a page and one last read a page and stream say
all: who is after the last is after the earlier ones.

Who may call it: the simulator always, the device with `--check pages`; one thread an instance. It
must not know plans, requests, torch or CUDA. tests/wire/test_order.py holds it against a graph
search. Measured with tools/bench_order.py, numpy 2.4, one of 2 shared cores, the same tables every
step: 256 rows x 128 pages read and 256 written in 0.15 to 0.18 ms, 180 to 215 million accesses a
second (110 to 155 with generations checked); a step of 64 accesses in 31 us, 2 million a second.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.errors import require
from holdfast.wire.plan import TRASH_PAGE

_KIND_BITS = 4
_STREAM_BITS = 8
_KIND_MASK = (1 << _KIND_BITS) - 1
_STREAM_MASK = (1 << _STREAM_BITS) - 1
_SEQUENCE_SHIFT = _KIND_BITS + _STREAM_BITS

HOST = "host"  # the stream that findings name for what the host itself does


class Kind(enum.IntEnum):
    """What was submitted. At most 16 kinds: a stamp has four bits for them."""

    LAUNCH = 1
    COPY = 2
    REPLAY = 3
    ACCESS = 4  # the host thread itself reads or writes pages; over when the call is told
    WAIT = 5


class Fault(enum.StrEnum):
    """What is wrong with an operation; `operation` is the new one, `other` the earlier one."""

    WRITE_WRITE = "write after unordered write"
    WRITE_READ = "write after unordered read"
    READ_WRITE = "read after unordered write"
    STALE = "a generation of the page that is over"
    UNTOLD = "a generation of the page that has not begun"
    OUTSIDE = "a page outside its pool"
    UNRECORDED = "a wait for an event that was never recorded"


@dataclass(frozen=True, slots=True)
class Operation:
    """`label` is the caller's; empty when not given, or forgotten `labels_max` operations later."""

    kind: Kind
    stream: str
    sequence: int
    label: str = ""

    def __str__(self) -> str:
        name = f"{self.kind.name.lower()}#{self.sequence}"
        return f"{name} ({self.label})" if self.label else name


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Pages of one pool, in any order, repeats allowed.

    pages: int[k] page ids. generations: int[k] of the handles that the caller holds, or None when
    it holds none (a device table names bare pages): then staleness is not checked.
    """

    pool: str
    pages: np.ndarray
    generations: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with `operation`, which must not be launched.

    Conflicts are told once per pool, fault and earlier stream, with the latest `other` there: an
    edge from it orders all of them. `page` is one of the `pages` distinct pages concerned;
    `generation` is the one it has now. For UNRECORDED, page and generation are 0 and pool is "".
    """

    fault: Fault
    pool: str
    page: int
    generation: int
    pages: int
    operation: Operation
    other: Operation | None
    edge: str

    def __str__(self) -> str:
        mine = self.operation
        text = f"{mine} on stream {mine.stream}"
        if self.fault is Fault.UNRECORDED:
            return f"{text} waits for nothing: {self.edge}"
        verb = "reads" if self.fault is Fault.READ_WRITE else "writes"
        if self.other is None:
            verb = "names"
        text += f" {verb} page {self.page} (gen {self.generation}) of pool {self.pool}"
        if self.other is None:
            text += f", {self.fault}"
        else:
            theirs = "read" if self.fault is Fault.WRITE_READ else "write"
            text += f" while {self.other} on stream {self.other.stream} may still {theirs} it"
        if self.pages > 1:
            text += f" (and {self.pages - 1} more pages)"
        return f"{text}: {self.edge}"


@dataclass(slots=True)
class _Pool:
    """P pages, S streams. Stamps of 0 are before everything.

    written: int64[P], stamp of the last write. read: int64[S, P], stamp of each stream's last read;
    a stream's row is contiguous, because most accesses are reads and store one row.
    generation: int64[P], 1 at first, as in kv.pages.
    """

    name: str
    pages: int
    has_trash: bool
    written: np.ndarray
    read: np.ndarray
    generation: np.ndarray


@dataclass(slots=True)
class _Event:
    stream: int
    clock: np.ndarray  # int64[S], the recording stream's clock when it was recorded last


@dataclass(slots=True)
class _Touch:
    """Accesses of one operation to one pool. index: intp[k]."""

    pool: _Pool
    index: np.ndarray
    generations: np.ndarray | None
    write: bool


class OrderChecker:
    """Vector clocks over `streams` and the pages of `pools` (name -> page count).

    `trash` names the pools whose TRASH_PAGE belongs to nobody: padding reads and writes it from
    everywhere on purpose, so its accesses are not recorded.
    """

    def __init__(
        self,
        pools: Mapping[str, int],
        streams: Sequence[str],
        *,
        trash: Collection[str] = (),
        events_max: int = 4096,
        labels_max: int = 4096,
    ) -> None:
        count = len(streams)
        require(0 < count <= _STREAM_MASK + 1, f"{count} streams")
        require(len({HOST, *streams}) == count + 1, f"streams share a name: {list(streams)}")
        require(set(trash) <= set(pools), f"trash of unknown pools: {sorted(trash)}")
        require(labels_max > 0, f"labels_max {labels_max}")
        self.streams = tuple(streams)
        self.events_max = events_max
        self._stream_index = {name: index for index, name in enumerate(streams)}
        self._pools = {
            name: _Pool(
                name=name,
                pages=pages,
                has_trash=name in trash,
                written=np.zeros(pages, np.int64),
                read=np.zeros((count, pages), np.int64),
                generation=np.ones(pages, np.int64),
            )
            for name, pages in pools.items()
        }
        # int64[S + 1, S]: clock[s, t] is the last stamp of stream t that the next operation on s is
        # after. The last row is the host's: what is over as far as any later submission goes.
        self._clock = np.zeros((count + 1, count), np.int64)
        self._events: dict[Hashable, _Event] = {}
        self._labels: list[tuple[int, str]] = [(0, "")] * labels_max
        self.sequence = 0  # of the operation told last, refused ones included

    # --- operations that touch pages ---

    def launch(
        self, stream: str, reads: Sequence[Pages], writes: Sequence[Pages], label: str = ""
    ) -> list[Finding]:
        """A kernel, or several that count as one. Not to be launched if anything is found."""
        return self._submit(Kind.LAUNCH, stream, reads, writes, label)

    def replay(
        self, stream: str, reads: Sequence[Pages], writes: Sequence[Pages], label: str = ""
    ) -> list[Finding]:
        """A graph with the accesses of all its nodes: one operation, whatever it holds inside."""
        return self._submit(Kind.REPLAY, stream, reads, writes, label)

    def copy(self, stream: str, source: Pages, target: Pages, label: str = "") -> list[Finding]:
        """Page source[i] to target[i]; both sides count, in whatever pools they lie."""
        sizes = len(source.pages), len(target.pages)
        require(sizes[0] == sizes[1], f"copy of {sizes[0]} pages to {sizes[1]}")
        return self._submit(Kind.COPY, stream, (source,), (target,), label)

    def access(
        self, reads: Sequence[Pages], writes: Sequence[Pages], label: str = ""
    ) -> list[Finding]:
        """The host thread itself touches pages (a staging buffer, a page from disk).

        It is over when this returns, so nothing is recorded: later submissions are after it.
        """
        operation = self._operation(Kind.ACCESS, HOST, label)
        touches = self._touches(reads, writes)
        return self._check(operation, self._clock[-1], touches)

    # --- what orders them ---

    def record(self, stream: str, event: Hashable) -> None:
        """The event now stands for all that was submitted to `stream` so far."""
        at = self._index_of(stream)
        known = self._events.get(event)
        if known is not None:
            known.stream = at
            known.clock[:] = self._clock[at]
            return
        require(len(self._events) < self.events_max, f"more than {self.events_max} events")
        self._events[event] = _Event(at, self._clock[at].copy())

    def wait(self, stream: str, event: Hashable) -> list[Finding]:
        """`stream` waits for the event's last record; for one never recorded CUDA waits not."""
        at = self._index_of(stream)
        known = self._events.get(event)
        if known is None:
            return [self._unrecorded(stream, event)]
        np.maximum(self._clock[at], known.clock, out=self._clock[at])
        return []

    def host_wait(
        self, *, event: Hashable | None = None, stream: str | None = None
    ) -> list[Finding]:
        """The host waited for an event, or for all of a stream (exactly one of them)."""
        require((event is None) != (stream is None), "host_wait: either an event or a stream")
        if stream is not None:
            self._pass(self._clock[self._index_of(stream)].copy())
            return []
        known = self._events.get(event)
        if known is None:
            return [self._unrecorded(HOST, event)]
        self._pass(known.clock)
        return []

    def fence(self, streams: Sequence[str] | None = None) -> None:
        """All of `streams` (None: of every stream) is over, and the events recorded there exist no
        more: the processes that owned them are gone.

        A killed stream proves nothing about a survivor that it was still waiting for, so a stream
        must not wait for one that is fenced apart from it, unless the host has waited too.
        """
        names = self.streams if streams is None else streams
        over = np.zeros(len(self.streams), bool)
        over[[self._index_of(name) for name in names]] = True
        clock = self._clock[:-1][over]
        require(
            (clock[:, ~over] <= self._clock[-1, ~over]).all(),
            f"fence of {list(names)}: one of them waited for a stream outside the fence",
        )
        if clock.size:
            self._pass(clock.max(axis=0))
        self._events = {
            name: event for name, event in self._events.items() if not over[event.stream]
        }

    def free(self, freed: Pages) -> None:
        """Pages get a new generation: `freed.generations`, or the next one when None.

        Freeing needs no order of its own: the next owner's first access does, and is checked.
        """
        (touch,) = self._touches((), (freed,))
        pool, pages = touch.pool, touch.index
        inside = ((pages >= 0) & (pages < pool.pages)).all()
        require(inside, f"free of a page outside pool {pool.name}")
        require(np.unique(pages).size == pages.size, f"a page of pool {pool.name} is freed twice")
        current = pool.generation[pages]
        rises = touch.generations is None or (touch.generations > current).all()
        require(rises, f"a generation of pool {pool.name} falls")
        pool.generation[pages] = current + 1 if touch.generations is None else touch.generations

    def destroy(self, event: Hashable) -> None:
        """The event object is gone; one that was never recorded may be destroyed too."""
        self._events.pop(event, None)

    # --- checking and recording ---

    def _submit(
        self,
        kind: Kind,
        stream: str,
        reads: Sequence[Pages],
        writes: Sequence[Pages],
        label: str,
    ) -> list[Finding]:
        at = self._index_of(stream)
        operation = self._operation(kind, stream, label)
        touches = self._touches(reads, writes)
        findings = self._check(operation, self._clock[at], touches)
        if findings:
            return findings
        stamp = operation.sequence << _SEQUENCE_SHIFT | at << _KIND_BITS | kind
        for touch in touches:
            table = touch.pool.written if touch.write else touch.pool.read[at]
            table[touch.index] = stamp
            if touch.pool.has_trash:
                table[TRASH_PAGE] = 0
        self._clock[at, at] = stamp
        if label:
            self._labels[operation.sequence % len(self._labels)] = (operation.sequence, label)
        return findings

    def _check(
        self, operation: Operation, clock: np.ndarray, touches: list[_Touch]
    ) -> list[Finding]:
        """All findings of an operation whose past is `clock` int64[S]."""
        findings: list[Finding] = []
        for touch in touches:
            if touch.index.size == 0:
                continue
            # As unsigned numbers negative pages are large: one pass finds both ends.
            if np.maximum.reduce(touch.index.view(np.uint64)) >= touch.pool.pages:
                findings.append(_outside(operation, touch))
                continue
            if touch.generations is not None:
                current = touch.pool.generation.take(touch.index)
                if np.count_nonzero(current != touch.generations):
                    findings.extend(_misnamed(operation, touch, current))
            written = touch.pool.written.take(touch.index)
            late = written > clock.take((written >> _KIND_BITS) & _STREAM_MASK)
            if np.count_nonzero(late):
                fault = Fault.WRITE_WRITE if touch.write else Fault.READ_WRITE
                pages = touch.index[late]
                findings.extend(self._unordered(fault, operation, touch, pages, written[late]))
            if touch.write:
                read = touch.pool.read.take(touch.index, axis=1)
                late = read > clock[:, None]
                if np.count_nonzero(late):
                    pages = np.broadcast_to(touch.index, read.shape)[late]
                    findings.extend(
                        self._unordered(Fault.WRITE_READ, operation, touch, pages, read[late])
                    )
        return findings

    def _unordered(
        self,
        fault: Fault,
        operation: Operation,
        touch: _Touch,
        pages: np.ndarray,
        stamps: np.ndarray,
    ) -> list[Finding]:
        """One finding a stream: of its stamps int64[k] on pages intp[k], the latest is blamed."""
        findings = []
        streams = (stamps >> _KIND_BITS) & _STREAM_MASK
        for stream in np.unique(streams):
            held = np.flatnonzero(streams == stream)
            latest = held[stamps[held].argmax()]
            page = int(pages[latest])
            other = self._named(int(stamps[latest]))
            waiter = "the host" if operation.kind is Kind.ACCESS else operation.stream
            findings.append(
                Finding(
                    fault=fault,
                    pool=touch.pool.name,
                    page=page,
                    generation=int(touch.pool.generation[page]),
                    pages=np.unique(pages[held]).size,
                    operation=operation,
                    other=other,
                    edge=f"{waiter} must wait for an event recorded on {other.stream} "
                    f"after {other} before {operation}",
                )
            )
        return findings

    def _unrecorded(self, stream: str, event: Hashable) -> Finding:
        operation = self._operation(Kind.WAIT, stream, "")
        edge = f"event {event!r} must be recorded before {operation}"
        return Finding(Fault.UNRECORDED, "", 0, 0, 0, operation, None, edge)

    def _pass(self, clock: np.ndarray) -> None:
        """What `clock` int64[S] holds is over: before all that is submitted from now on."""
        np.maximum(self._clock, clock, out=self._clock)

    def _operation(self, kind: Kind, stream: str, label: str) -> Operation:
        self.sequence += 1
        return Operation(kind, stream, self.sequence, label)

    def _named(self, stamp: int) -> Operation:
        sequence = stamp >> _SEQUENCE_SHIFT
        held, label = self._labels[sequence % len(self._labels)]
        return Operation(
            kind=Kind(stamp & _KIND_MASK),
            stream=self.streams[(stamp >> _KIND_BITS) & _STREAM_MASK],
            sequence=sequence,
            label=label if held == sequence else "",
        )

    def _touches(self, reads: Sequence[Pages], writes: Sequence[Pages]) -> list[_Touch]:
        touches = []
        for accesses, write in ((reads, False), (writes, True)):
            for access in accesses:
                index = np.ascontiguousarray(access.pages, np.intp).reshape(-1)
                generations = access.generations
                if generations is not None:
                    generations = np.asarray(generations).reshape(-1)
                    require(
                        generations.size == index.size,
                        f"{generations.size} generations of {index.size} pages",
                    )
                touches.append(_Touch(self._pool_of(access.pool), index, generations, write))
        return touches

    def _pool_of(self, name: str) -> _Pool:
        pool = self._pools.get(name)
        require(pool is not None, f"unknown pool {name}; there are {list(self._pools)}")
        return pool

    def _index_of(self, stream: str) -> int:
        index = self._stream_index.get(stream)
        require(index is not None, f"unknown stream {stream}; there are {list(self.streams)}")
        return index


def _outside(operation: Operation, touch: _Touch) -> Finding:
    pages = np.unique(touch.index[touch.index.view(np.uint64) >= touch.pool.pages])
    edge = f"pool {touch.pool.name} has pages 0..{touch.pool.pages - 1}"
    pool = touch.pool.name
    return Finding(Fault.OUTSIDE, pool, int(pages[0]), 0, pages.size, operation, None, edge)


def _misnamed(operation: Operation, touch: _Touch, current: np.ndarray) -> list[Finding]:
    """Handles whose generations int[k] are not the pages' `current` int64[k] ones."""
    findings = []
    for fault, wrong in (
        (Fault.STALE, touch.generations < current),
        (Fault.UNTOLD, touch.generations > current),
    ):
        held = np.flatnonzero(wrong)
        if held.size == 0:
            continue
        at = held[touch.index[held].argmin()]
        named, now = int(touch.generations[at]), int(current[at])
        page = int(touch.index[at])
        edge = f"{operation} holds generation {named} of page {page}, which is in generation {now}"
        pages = np.unique(touch.index[held]).size
        pool = touch.pool.name
        findings.append(Finding(fault, pool, page, now, pages, operation, None, edge))
    return findings
