"""The page-order checker: the founding races by script, and any program against a graph search."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from holdfast.errors import InvariantError
from holdfast.wire.order import HOST, Fault, Finding, Kind, Operation, OrderChecker, Pages

CONFLICTS = {Fault.WRITE_WRITE, Fault.WRITE_READ, Fault.READ_WRITE}


def checker(**options) -> OrderChecker:
    return OrderChecker(
        {"device": 64, "host": 128}, ["compute", "h2d", "d2h"], trash=["device"], **options
    )


def device(*pages: int, generation: int | None = None) -> Pages:
    return pages_of("device", pages, generation)


def host(*pages: int, generation: int | None = None) -> Pages:
    return pages_of("host", pages, generation)


def pages_of(pool: str, pages, generation: int | None) -> Pages:
    held = None if generation is None else np.full(len(pages), generation, np.uint32)
    return Pages(pool, np.array(pages, np.int32), held)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


# --- founding report 004: copies against the forward pass, in both directions ---


def test_a_store_that_no_event_orders_after_the_step_that_writes_its_page_is_found():
    order = checker()
    assert order.launch("compute", [device(1, 2)], [device(7)], "step 41") == []
    finding = only(order.copy("d2h", device(7), host(100), "store of 9"))
    assert finding.fault is Fault.READ_WRITE
    assert (finding.pool, finding.page, finding.generation, finding.pages) == ("device", 7, 1, 1)
    assert finding.operation == Operation(Kind.COPY, "d2h", 2, "store of 9")
    assert finding.other == Operation(Kind.LAUNCH, "compute", 1, "step 41")
    assert str(finding) == (
        "copy#2 (store of 9) on stream d2h reads page 7 (gen 1) of pool device while "
        "launch#1 (step 41) on stream compute may still write it: d2h must wait for an event "
        "recorded on compute after launch#1 (step 41) before copy#2 (store of 9)"
    )


def test_a_step_that_writes_a_page_which_a_store_still_reads_is_found():
    order = checker()
    assert order.copy("d2h", device(7), host(100)) == []
    finding = only(order.launch("compute", [device(1)], [device(7)]))
    assert finding.fault is Fault.WRITE_READ
    assert finding.edge == (
        "compute must wait for an event recorded on d2h after copy#1 before launch#2"
    )
    assert "writes page 7" in str(finding) and "may still read it" in str(finding)


def test_a_load_back_into_a_page_that_a_launched_round_still_writes_is_found():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    assert only(order.copy("h2d", host(100), device(7))).fault is Fault.WRITE_WRITE


def test_a_load_into_a_page_that_a_launched_step_still_reads_is_found():
    order = checker()
    assert order.launch("compute", [device(7)], [device(8)]) == []
    assert only(order.copy("h2d", host(100), device(7))).fault is Fault.WRITE_READ


def test_a_step_that_reads_a_page_whose_load_it_does_not_wait_for_is_found():
    order = checker()
    assert order.copy("h2d", host(100), device(7)) == []
    assert only(order.launch("compute", [device(7)], [])).fault is Fault.READ_WRITE


def test_a_load_into_the_host_page_that_a_store_still_fills_is_found_in_the_host_pool():
    order = checker()
    assert order.copy("d2h", device(7), host(100)) == []
    finding = only(order.copy("h2d", host(100), device(9)))
    assert (finding.fault, finding.pool, finding.page) == (Fault.READ_WRITE, "host", 100)


def test_page_ids_of_different_pools_are_different_pages():
    order = checker()
    assert order.copy("d2h", device(7), host(8)) == []
    assert order.copy("h2d", host(7), device(8)) == []


def test_two_unordered_reads_are_no_conflict():
    order = checker()
    assert order.launch("compute", [device(7)], []) == []
    assert order.copy("d2h", device(7), host(100)) == []


def test_one_stream_orders_its_own_operations():
    order = checker()
    for _ in range(3):
        assert order.launch("compute", [device(7)], [device(7, 8)]) == []


# --- frees and generations ---


def test_a_page_freed_and_reused_while_a_copy_reads_it_is_found():
    order = checker()
    assert order.copy("d2h", device(7, generation=1), host(100)) == []
    order.free(device(7))
    finding = only(order.launch("compute", [], [device(7, generation=2)]))
    assert (finding.fault, finding.generation) == (Fault.WRITE_READ, 2)


def test_a_store_confirmed_by_a_host_wait_lets_its_page_be_freed_and_reused():
    order = checker()
    assert order.copy("d2h", device(7), host(100)) == []
    order.record("d2h", "stored")
    assert order.host_wait(event="stored") == []
    order.free(device(7))
    assert order.launch("compute", [], [device(7, generation=2)]) == []
    assert order.access([host(100)], []) == []


def test_a_handle_of_an_older_generation_is_stale_even_when_everything_is_ordered():
    order = checker()
    order.free(device(5, 7))
    finding = only(order.launch("compute", [device(7, 9, 5, 5, generation=1)], []))
    assert (finding.fault, finding.page, finding.pages) == (Fault.STALE, 5, 2)
    assert str(finding) == (
        "launch#1 on stream compute names page 5 (gen 2) of pool device, a generation of the page "
        "that is over (and 1 more pages): launch#1 holds generation 1 of page 5, which is in "
        "generation 2"
    )


def test_a_generation_that_the_checker_was_not_told_of_is_found():
    order = checker()
    assert only(order.launch("compute", [device(7, generation=2)], [])).fault is Fault.UNTOLD
    order.free(device(7, generation=2))
    assert order.launch("compute", [device(7, generation=2)], []) == []


def test_a_generation_never_falls_and_a_page_is_freed_once_a_call():
    order = checker()
    with pytest.raises(InvariantError, match="falls"):
        order.free(device(7, generation=1))
    with pytest.raises(InvariantError, match="twice"):
        order.free(device(7, 7))
    with pytest.raises(InvariantError, match="outside"):
        order.free(device(64))


@pytest.mark.parametrize("page", [-1, 64, 2**31 - 1, -(2**31)])
def test_a_page_outside_its_pool_is_a_finding_and_touches_nothing(page):
    order = checker()
    finding = only(order.launch("compute", [], [device(3, page)]))
    assert (finding.fault, finding.page) == (Fault.OUTSIDE, page)
    assert order.copy("h2d", host(0), device(3)) == []


# --- events, waits, fences ---


def test_an_event_recorded_after_the_step_and_waited_for_is_enough():
    order = checker()
    assert order.launch("compute", [device(1)], [device(7)]) == []
    order.record("compute", "stepped")
    assert order.wait("d2h", "stepped") == []
    assert order.copy("d2h", device(7), host(100)) == []


def test_an_event_recorded_too_early_is_not_enough():
    order = checker()
    order.record("compute", "stepped")
    assert order.launch("compute", [], [device(7)]) == []
    assert order.wait("d2h", "stepped") == []
    assert only(order.copy("d2h", device(7), host(100))).fault is Fault.READ_WRITE


def test_a_wait_made_before_the_event_is_recorded_anew_holds_the_old_record_only():
    order = checker()
    order.record("compute", "stepped")
    assert order.wait("d2h", "stepped") == []
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "stepped")
    assert len(order.copy("d2h", device(7), host(100))) == 1
    assert order.wait("d2h", "stepped") == []
    assert order.copy("d2h", device(7), host(100)) == []


def test_an_event_recorded_anew_on_another_stream_no_longer_stands_for_the_first():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "event")
    order.record("h2d", "event")
    assert order.wait("d2h", "event") == []
    assert only(order.copy("d2h", device(7), host(100))).other.stream == "compute"


def test_a_wait_orders_the_waiting_stream_only():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "stepped")
    assert order.wait("d2h", "stepped") == []
    assert only(order.copy("h2d", host(100), device(7))).fault is Fault.WRITE_WRITE


def test_a_wait_adds_to_what_a_stream_is_after_and_takes_nothing_away():
    order = checker()
    order.record("h2d", "empty")
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "stepped")
    assert order.wait("d2h", "stepped") == []
    assert order.wait("d2h", "empty") == []
    assert order.copy("d2h", device(7), host(100)) == []


def test_order_carries_through_a_third_stream():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "stepped")
    assert order.wait("h2d", "stepped") == []
    order.record("h2d", "passed on")
    assert order.wait("d2h", "passed on") == []
    assert order.copy("d2h", device(7), host(100)) == []


def test_a_wait_for_an_event_that_was_never_recorded_is_found_and_orders_nothing():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    finding = only(order.wait("d2h", "stepped"))
    assert finding.fault is Fault.UNRECORDED
    assert str(finding) == (
        "wait#2 on stream d2h waits for nothing: event 'stepped' must be recorded before wait#2"
    )
    assert only(order.host_wait(event="stepped")).operation.stream == HOST
    assert len(order.copy("d2h", device(7), host(100))) == 1


def test_a_destroyed_event_is_as_if_never_recorded():
    order = checker(events_max=1)
    order.record("compute", 1)
    with pytest.raises(InvariantError, match="more than 1 events"):
        order.record("compute", 2)
    order.record("h2d", 1)
    order.destroy(1)
    order.destroy(1)
    order.record("compute", 2)
    assert only(order.wait("d2h", 1)).fault is Fault.UNRECORDED


def test_a_host_wait_for_a_stream_orders_all_later_submissions_after_it():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    assert order.host_wait(stream="compute") == []
    assert order.launch("compute", [], [device(8)]) == []
    assert order.copy("h2d", host(100), device(7)) == []
    assert len(order.copy("h2d", host(100), device(8))) == 1


def test_the_host_may_not_touch_a_staging_page_before_it_waited_for_the_copy_that_reads_it():
    order = checker()
    assert order.access([], [host(100)]) == []
    assert order.copy("h2d", host(100), device(7)) == []
    assert order.access([host(100)], []) == []
    finding = only(order.access([], [host(100)], "stage"))
    assert finding.edge.startswith("the host must wait for an event recorded on h2d after copy#2")
    assert order.host_wait(stream="h2d") == []
    assert order.access([], [host(100)]) == []


def test_a_fence_ends_all_that_the_old_epoch_did_and_its_events():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    assert order.copy("d2h", device(3), host(100)) == []
    order.record("compute", "stepped")
    order.fence()
    assert order.copy("h2d", host(100, 101), device(7, 3)) == []
    assert only(order.wait("h2d", "stepped")).fault is Fault.UNRECORDED


def test_a_fence_of_the_old_worker_does_not_end_what_the_standby_does():
    order = OrderChecker({"device": 64}, ["old", "standby"])
    assert order.launch("old", [], [device(7)]) == []
    assert order.launch("standby", [device(3)], [], "verify") == []
    order.record("standby", "verified")
    order.fence(["old"])
    assert order.launch("standby", [device(7)], []) == []
    assert only(order.launch("old", [], [device(3)])).other.label == "verify"
    assert order.wait("old", "verified") == []


def test_a_fence_refuses_to_guess_about_a_stream_that_waited_for_a_survivor():
    order = checker()
    assert order.launch("compute", [], [device(7)]) == []
    order.record("compute", "stepped")
    assert order.wait("d2h", "stepped") == []
    with pytest.raises(InvariantError, match="outside the fence"):
        order.fence(["d2h"])
    order.fence(["d2h", "compute"])


# --- operations ---


def test_a_graph_replay_is_one_operation_with_all_its_pages():
    order = checker()
    inside = order.replay("compute", [device(7, 8)], [device(7), device(9)], "bucket 8")
    assert inside == []
    findings = order.copy("h2d", host(99, 100, 101), device(7, 8, 9))
    assert [(f.fault, f.pages) for f in findings] == [(Fault.WRITE_WRITE, 2), (Fault.WRITE_READ, 2)]
    assert {f.other for f in findings} == {Operation(Kind.REPLAY, "compute", 1, "bucket 8")}
    order.record("compute", "replayed")
    assert order.wait("h2d", "replayed") == []
    assert order.copy("h2d", host(99, 100, 101), device(7, 8, 9)) == []


def test_repeats_and_reading_what_one_writes_are_no_conflict_within_one_operation():
    order = checker()
    assert order.launch("compute", [device(7, 7, 8)], [device(7, 7)]) == []
    assert order.copy("compute", device(7, 7), device(7, 9)) == []


def test_an_operation_with_findings_is_not_recorded():
    order = checker()
    assert order.copy("d2h", device(7), host(100)) == []
    assert len(order.launch("compute", [device(20)], [device(7, 21)])) == 1
    assert order.copy("h2d", host(50, 51), device(20, 21)) == []


def test_a_finding_blames_the_latest_operation_of_each_stream_and_counts_its_pages():
    order = checker()
    assert order.launch("compute", [], [device(5)], "first") == []
    assert order.launch("compute", [], [device(6, 7, 7)], "second") == []
    assert order.copy("h2d", host(0), device(8)) == []
    findings = order.copy("d2h", device(5, 6, 7, 6, 8), host(1, 2, 3, 4, 5))
    assert [(f.other.stream, f.other.label, f.pages) for f in findings] == [
        ("compute", "second", 3),
        ("h2d", "", 1),
    ]
    assert "(and 2 more pages)" in str(findings[0])


def test_padding_on_the_trash_page_is_nobodys_business():
    order = checker()
    assert order.launch("compute", [device(0)], [device(0, 1)]) == []
    assert order.copy("h2d", host(0), device(0)) == []
    assert order.copy("d2h", device(0), host(1)) == []
    # The host pool was not named as one with a trash page.
    assert len(order.copy("h2d", host(1), device(5))) == 1


def test_a_label_is_forgotten_but_its_operation_still_named():
    order = checker(labels_max=2)
    assert order.launch("compute", [], [device(7)], "long ago") == []
    for _ in range(2):
        assert order.launch("compute", [device(1)], [], "since") == []
    finding = only(order.copy("d2h", device(7), host(100)))
    assert finding.other == Operation(Kind.LAUNCH, "compute", 1)


def test_what_the_checker_cannot_make_sense_of_is_our_bug():
    order = checker()
    for call in (
        lambda: order.launch("side", [], []),
        lambda: order.launch("compute", [Pages("disk", np.zeros(1, np.int32))], []),
        lambda: order.copy("h2d", host(1, 2), device(3)),
        lambda: order.launch(
            "compute", [Pages("device", np.zeros(2, np.int32), np.ones(1, np.uint32))], []
        ),
        lambda: order.host_wait(),
        lambda: OrderChecker({"device": 8}, ["compute", "compute"]),
        lambda: OrderChecker({"device": 8}, [HOST]),
        lambda: OrderChecker({"device": 8}, ["compute"], trash=["host"]),
    ):
        with pytest.raises(InvariantError):
            call()


# --- against a graph search ---


@dataclass
class Node:
    before: set[int]
    accesses: frozenset[tuple[str, int, bool]] = frozenset()  # (pool, page, writes)
    stream: str = HOST


@dataclass
class Oracle:
    """Happens-before as an explicit graph: slow, and shares nothing with the checker."""

    nodes: list[Node] = field(default_factory=list)
    last: dict[str, int] = field(default_factory=dict)  # stream (or HOST) -> its last node
    events: dict[str, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # event -> stream of its record
    generations: dict[tuple[str, int], int] = field(default_factory=dict)

    def past(self, stream: str) -> set[int]:
        return {self.last[name] for name in (stream, HOST) if name in self.last}

    def add(self, stream: str, before: set[int] = frozenset(), accesses=frozenset()) -> int:
        self.nodes.append(Node(self.past(stream) | before, accesses, stream))
        self.last[stream] = len(self.nodes) - 1
        return self.last[stream]

    def conflicts(self, stream: str, accesses) -> dict[int, set[tuple[str, str, int]]]:
        """Node -> (fault, pool, page) of every recorded access that is not before this one."""
        ancestors, queue = set(), list(self.past(stream))
        while queue:
            node = queue.pop()
            if node not in ancestors:
                ancestors.add(node)
                queue.extend(self.nodes[node].before)
        found: dict[int, set[tuple[str, str, int]]] = {}
        for at, node in enumerate(self.nodes):
            if at in ancestors:
                continue
            for pool, page, writes in accesses:
                if writes and (pool, page, True) in node.accesses:
                    found.setdefault(at, set()).add((Fault.WRITE_WRITE, pool, page))
                if writes and (pool, page, False) in node.accesses:
                    found.setdefault(at, set()).add((Fault.WRITE_READ, pool, page))
                if not writes and (pool, page, True) in node.accesses:
                    found.setdefault(at, set()).add((Fault.READ_WRITE, pool, page))
        return found


STREAMS = "abcx"
POOLS = {"device": 3, "host": 4}
PROCESSES = [("abcx",), ("abc", "x"), ("ab", "cx")]

streams = st.sampled_from(STREAMS)
events = st.sampled_from(["e", "f"])
# A page of a pool, and how the named generation differs from the current one (None: not named).
page = st.one_of(
    [st.tuples(st.just(name), st.integers(0, count - 1)) for name, count in POOLS.items()]
)
touched = st.tuples(page, st.sampled_from([None, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1]))
read, written = st.lists(touched, max_size=3), st.lists(touched, min_size=1, max_size=3)
arguments_of = {
    "operate": st.tuples(
        st.sampled_from(["launch", "replay", "copy", "access"]), streams, read, written
    ),
    "record and wait": st.tuples(st.just("record and wait"), streams, streams, events),
    "record": st.tuples(st.just("record"), streams, events),
    "wait": st.tuples(st.just("wait"), streams, events),
    "host_wait event": st.tuples(st.just("host_wait event"), events),
    "host_wait stream": st.tuples(st.just("host_wait stream"), streams),
    "fence": st.tuples(st.just("fence"), st.integers(0, 1)),
    "free": st.tuples(st.just("free"), page),
}
# Operations and edges weigh most: a fence or a host wait ends what could have been in conflict.
# Not by one_of, which would flatten repeats into even odds.
weights = {"operate": 12, "record and wait": 4, "record": 3, "wait": 3}
commands = st.sampled_from(
    [verb for verb in arguments_of for _ in range(weights.get(verb, 1))]
).flatmap(arguments_of.__getitem__)


class Both:
    """Tells a program to the checker and to the oracle, and compares after every operation."""

    def __init__(self, processes: tuple[str, ...]) -> None:
        self.order = OrderChecker(POOLS, STREAMS, labels_max=4)
        self.oracle = Oracle()
        self.processes = processes
        self.nodes_by_sequence: dict[int, int] = {}

    def related(self, one: str, other: str) -> bool:
        return any(one in process and other in process for process in self.processes)

    def run(self, command) -> None:
        verb, *arguments = command
        if verb in ("launch", "replay", "copy", "access"):
            self.operate(verb, *arguments)
        elif verb == "record":
            self.record(*arguments)
        elif verb == "wait":
            self.wait(*arguments)
        elif verb == "record and wait":
            source, target, name = arguments
            self.record(source, name)
            self.wait(target, name)
        elif verb == "host_wait event":
            (name,) = arguments
            known = name in self.oracle.events
            assert bool(self.order.host_wait(event=name)) == (not known)
            if known:
                self.oracle.add(HOST, {self.oracle.events[name]})
        elif verb == "host_wait stream":
            (stream,) = arguments
            assert self.order.host_wait(stream=stream) == []
            self.oracle.add(HOST, self.oracle.past(stream))
        elif verb == "fence":
            self.fence(arguments[0])
        else:
            ((pool, index),) = arguments
            self.order.free(Pages(pool, np.array([index])))
            at = (pool, index)
            self.oracle.generations[at] = self.oracle.generations.get(at, 1) + 1

    def record(self, stream: str, name: str) -> None:
        self.order.record(stream, name)
        self.oracle.events[name] = self.oracle.add(stream)
        self.oracle.owners[name] = stream

    def wait(self, stream: str, name: str) -> None:
        if name in self.oracle.events and not self.related(stream, self.oracle.owners[name]):
            return
        findings = self.order.wait(stream, name)
        if name in self.oracle.events:
            assert findings == []
            self.oracle.add(stream, {self.oracle.events[name]})
        else:
            assert only(findings).fault is Fault.UNRECORDED

    def fence(self, at: int) -> None:
        names = self.processes[at % len(self.processes)]
        self.order.fence(list(names))
        self.oracle.add(HOST, set().union(*(self.oracle.past(name) for name in names)))
        for name in [name for name, owner in self.oracle.owners.items() if owner in names]:
            del self.oracle.events[name], self.oracle.owners[name]

    def pages(self, touches) -> list[Pages]:
        """One Pages a pool and way of naming, so that an operation has several of each."""
        groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for (pool, index), offset in touches:
            now = self.oracle.generations.get((pool, index), 1)
            groups.setdefault((pool, offset is not None), []).append((index, now + (offset or 0)))
        return [
            Pages(
                pool,
                np.array([index for index, _ in group], np.int32),
                np.array([generation for _, generation in group]) if named else None,
            )
            for (pool, named), group in groups.items()
        ]

    def operate(self, verb: str, stream: str, reads, writes) -> None:
        if verb == "copy":
            reads, writes = reads[:1], writes[:1]
            if not (reads and writes):
                return
        findings = self.submit(verb, stream, reads, writes)
        # The named edges, and no others, must make a refused operation acceptable.
        others = {finding.other.stream for finding in findings if finding.fault in CONFLICTS}
        if not others:
            return
        event("refused for its order")
        for other in sorted(others):
            if verb == "access":
                self.run(("host_wait stream", other))
            elif self.related(stream, other):
                self.run(("record and wait", other, stream, "e"))
            else:
                self.run(("host_wait stream", other))
        again = self.submit(verb, stream, reads, writes)
        assert not [finding for finding in again if finding.fault in CONFLICTS]

    def submit(self, verb: str, stream: str, reads, writes) -> list[Finding]:
        accesses = frozenset((*at, False) for at, _ in reads)
        accesses |= frozenset((*at, True) for at, _ in writes)
        stream = HOST if verb == "access" else stream
        conflicts = self.oracle.conflicts(stream, accesses)
        stale = any(offset == -1 for _, offset in (*reads, *writes))
        sources, targets = self.pages(reads), self.pages(writes)
        if verb == "access":
            findings = self.order.access(sources, targets)
        elif verb == "copy":
            findings = self.order.copy(stream, sources[0], targets[0])
        else:
            findings = getattr(self.order, verb)(stream, sources, targets)
        assert bool(conflicts) == any(finding.fault in CONFLICTS for finding in findings)
        assert stale == any(finding.fault is Fault.STALE for finding in findings)
        for finding in findings:
            if finding.fault in CONFLICTS:
                blamed = self.nodes_by_sequence[finding.other.sequence]
                assert (finding.fault, finding.pool, finding.page) in conflicts[blamed]
                assert finding.other.stream == self.oracle.nodes[blamed].stream
        if not findings and verb != "access":
            node = self.oracle.add(stream, accesses=accesses)
            self.nodes_by_sequence[self.order.sequence] = node
        return findings


# A list of at least 20 has 40 on average; without a least size it would have 5, and no depth.
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PROCESSES), st.lists(commands, min_size=20, max_size=80))
def test_any_program_gets_the_findings_of_a_graph_search_and_the_named_edges_cure_them(
    processes, program
):
    both = Both(processes)
    for command in program:
        both.run(command)
