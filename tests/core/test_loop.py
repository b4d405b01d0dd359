"""The core's loop with a scripted brain and real sockets: order, bounds, and who loses what."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from holdfast.core import loop as loop_module
from holdfast.core.loop import CoreLoop
from holdfast.core.replies import Output, framed
from holdfast.errors import LinkClosed, WorkerFault
from holdfast.proc.control import Control
from holdfast.wire.copies import CopyAcks
from holdfast.wire.link import Kind, Link
from holdfast.wire.messages import (
    ID_MAX,
    Cancel,
    End,
    Memory,
    State,
    TokenBatch,
    decode_to_api,
    encode,
)
from holdfast.wire.plan import StepPlan, StepResult


def batch(step: int, size: int = 0) -> TokenBatch:
    """Something to send: `size` bytes of tokens."""
    return TokenBatch(
        step=step,
        requests=np.empty(0, np.uint64),
        indexes=np.empty(0, np.int32),
        tokens=np.zeros(size // 4, np.int32),
        ends=np.empty(0, np.uint8),
        cached=np.empty(0, np.int32),
    )


class ScriptedBrain:
    """Does what it is told and notes every call. `wants`: steps it would still launch."""

    def __init__(self, *, ahead: int = 2) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.epoch = 0
        self.ahead = ahead
        self.wants = 0
        self.steps: list[int] = []
        self.next_step = 0
        self.output: list[Output] = []
        self.suspended = True
        self.live = 0
        self.next_deadline_s: float | None = None
        self.fault: Exception | None = None
        self.late: Exception | None = None  # raised by the next `expire` that is due
        self.tokens_generated = 0
        self.on_commit: Callable[[int], None] = lambda step: None

    @property
    def in_flight(self) -> int:
        return len(self.steps)

    def receive(self, api: int, message: Any, now_s: float) -> None:
        self.calls.append(("receive", api, message))

    def plan(self, now_s: float) -> StepPlan | None:
        if self.suspended or not self.wants or len(self.steps) >= self.ahead:
            return None
        self.wants -= 1
        self.next_step += 1
        self.steps.append(self.next_step)
        self.calls.append(("plan", self.next_step))
        return StepPlan(epoch=self.epoch, step=self.next_step, rows=np.array([1], np.int32))

    def commit(self, result: StepResult, now_s: float) -> None:
        if self.fault:
            raise self.fault
        assert self.steps.pop(0) == result.step
        self.calls.append(("commit", result.step))
        self.on_commit(result.step)

    def copied(self, acks: CopyAcks, now_s: float) -> None:
        self.calls.append(("copied", acks.tickets.tolist()))
        self.wants += 1

    def take_output(self) -> list[Output]:
        output, self.output = self.output, []
        if output:
            self.calls.append(("output", len(output)))
        return output

    def context_tokens(self, plan: StepPlan) -> int:
        return 1

    def weights_good(self, epoch: int, step: int) -> None:
        self.calls.append(("weights_good", epoch, step))

    def new_epoch(
        self, epoch: int, now_s: float, *, implicates: bool = False, memory: Memory = Memory.KEPT
    ) -> None:
        self.calls.append(("new_epoch", epoch))
        self.memory = memory
        self.implicated = implicates
        self.epoch, self.suspended = epoch, False
        self.steps.clear()

    def suspend(self) -> None:
        self.calls.append(("suspend",))
        self.suspended = True

    def drop_api(self, api: int, now_s: float, before: int = ID_MAX) -> None:
        self.calls.append(("drop_api", api, *([] if before == ID_MAX else [before])))

    def drain(self) -> None:
        self.calls.append(("drain",))

    def expire(self, now_s: float) -> None:
        if self.next_deadline_s is not None and self.next_deadline_s <= now_s:
            self.calls.append(("expire",))
            self.next_deadline_s = None
            if self.late:
                raise self.late

    def end_all(self, end: End, message: str, now_s: float) -> None:
        self.calls.append(("end_all", end, message))
        self.live = 0

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Bench:
    """A loop with the far ends of its links in our hands."""

    def __init__(self) -> None:
        self.brain = ScriptedBrain()
        self.control, sock = Control.pair()
        self.inner = Control(sock)
        self.loop = CoreLoop(self.brain, self.inner)
        self.links: list[Link] = []

    def connect(self, message: dict[str, Any], epoch: int = 0) -> Link:
        ours, theirs = socket.socketpair()
        with theirs:
            self.control.send(message, [theirs.fileno()])
        self.links.append(Link(ours, epoch=epoch))
        self.loop.tick(0)
        return self.links[-1]

    def worker(self, epoch: int = 1) -> Link:
        return self.connect({"type": "worker", "epoch": epoch}, epoch)

    def api(self, index: int = 0, *, first_id: int = 1) -> Link:
        message = {"type": "api", "index": index, "process": 40 + index, "first_id": first_id}
        return self.connect(message)

    def say(self, **message: Any) -> None:
        self.control.send(message)
        self.loop.tick(0)

    def heard(self, *, resumed: bool = False) -> list[dict[str, Any]]:
        """What the core said; that it resumed, or else all the rest."""
        try:
            said = [message for message, _ in self.control.receive()]
        except LinkClosed:
            return []
        return [message for message in said if (message["type"] == "resumed") is resumed]

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.loop._close()
        self.control.close()
        self.inner.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def plans(link: Link) -> list[int]:
    frames = []
    while (frame := link.receive(0)) is not None:
        assert frame[0] == Kind.PLAN
        frames.append(StepPlan.decode(frame[1]).step)
    return frames


def result(step: int, epoch: int = 1) -> bytes:
    return StepResult(epoch=epoch, step=step, digest=0).encode()


def states(link: Link) -> list[State]:
    found = []
    while (frame := link.receive(0)) is not None:
        found.append(decode_to_api(frame[1]))
    return found


def test_the_next_plan_leaves_before_messages_are_read_and_output_is_sent(bench: Bench) -> None:
    worker, api = bench.worker(), bench.api()
    states(api)
    bench.brain.wants = 3
    bench.loop.tick(0)
    assert plans(worker) == [1, 2]
    bench.brain.calls.clear()
    bench.brain.on_commit = lambda step: bench.brain.output.append((0, batch(step)))
    worker.send(Kind.RESULT, result(1))
    api.send(Kind.MESSAGE, encode(Cancel((1,))))
    bench.loop.tick(0)
    assert bench.brain.names() == ["commit", "plan", "receive", "output"]
    assert plans(worker) == [3]
    assert api.receive(0) == (Kind.TOKENS, batch(1).encode())


def test_results_are_committed_in_the_order_of_the_link(bench: Bench) -> None:
    worker = bench.worker()
    bench.brain.wants = 2
    bench.loop.tick(0)
    for step in (1, 2):
        worker.send(Kind.RESULT, result(step))
    bench.loop.tick(0)
    assert [call for call in bench.brain.calls if call[0] == "commit"] == [
        ("commit", 1),
        ("commit", 2),
    ]


def test_output_of_each_api_process_keeps_its_order(bench: Bench) -> None:
    first, second = bench.api(0), bench.api(1)
    states(first), states(second)
    sent: list[Output] = [(n % 2, batch(n)) for n in range(50)]
    bench.brain.output = list(sent)
    bench.loop.tick(0)
    for index, link in enumerate((first, second)):
        got = [link.receive(0) for _ in range(25)]
        assert got == [framed(message) for api, message in sent if api == index]


def test_a_burst_of_one_api_process_is_taken_in_bounded_pieces(bench: Bench) -> None:
    bound = loop_module.API_MESSAGES_A_TICK
    busy, quiet = bench.api(0), bench.api(1)
    for number in range(bound * 2 + 1):
        busy.send(Kind.MESSAGE, encode(Cancel((number,))))
    quiet.send(Kind.MESSAGE, encode(Cancel((7,))))
    bench.brain.calls.clear()
    bench.loop.tick(0)
    received = [call[1] for call in bench.brain.calls if call[0] == "receive"]
    assert received == [0] * bound + [1]
    # What is left is not forgotten: the loop does not sleep over it, and keeps its order.
    assert bench.loop._sleep_s() == 0.0
    bench.loop.tick(0)
    bench.loop.tick(0)
    numbers = [call[2].ids[0] for call in bench.brain.calls if call[:2] == ("receive", 0)]
    assert numbers == list(range(bound * 2 + 1))
    assert bench.loop._sleep_s() > 0.0


def test_without_a_worker_nothing_is_planned(bench: Bench) -> None:
    bench.brain.wants = 1
    bench.brain.suspended = False
    bench.loop.tick(0)
    assert "plan" not in bench.brain.names()


def test_the_death_of_the_worker_suspends_the_brain_until_another_epoch(bench: Bench) -> None:
    worker, api = bench.worker(), bench.api()
    assert states(api)[-1] == State(ready=True, detail="ready")
    bench.brain.wants = 1
    bench.loop.tick(0)
    worker.close()
    bench.loop.tick(0)
    assert bench.brain.suspended and not states(api)[-1].ready
    fault = {"type": "worker_fault", "epoch": 1, "detail": "peer closed the link"}
    assert bench.heard() == [{**fault, "hung": False, "closed": True, "since_s": None}]
    bench.say(type="worker_lost", epoch=1, detail="killed by SIGKILL", implicates=False)
    assert "killed by SIGKILL" in states(api)[-1].detail
    bench.brain.wants = 1
    second = bench.worker(2)
    assert bench.brain.epoch == 2 and plans(second) == [2]
    assert states(api)[-1].ready


@pytest.mark.parametrize("implicates", [True, False])
def test_what_was_in_flight_is_suspect_when_the_supervisor_says_so(
    bench: Bench, implicates: bool
) -> None:
    bench.worker().close()
    bench.loop.tick(0)
    bench.say(type="worker_lost", epoch=1, detail="exit code 70", implicates=implicates)
    bench.worker(2).close()
    assert bench.brain.implicated is implicates
    bench.loop.tick(0)
    bench.worker(3)
    assert bench.brain.implicated is False, "what was said of one worker is said of no other"


def test_the_brain_is_told_what_became_of_the_memory_and_of_no_word_thinks_the_worst(
    bench: Bench,
) -> None:
    for epoch, word in enumerate(("kept", "reloaded", "lost", None), start=1):
        said = {} if word is None else {"memory": word}
        link = bench.connect({"type": "worker", "epoch": epoch, **said}, epoch)
        assert bench.brain.memory is Memory(word or "lost")
        link.close()
        bench.loop.tick(0)


def test_acknowledgements_of_copies_are_taken_with_no_step_in_flight(bench: Bench) -> None:
    worker = bench.worker()
    acks = CopyAcks(
        epoch=1,
        tickets=np.array([4, 5], np.uint64),
        status=np.zeros(2, np.uint8),
        sums=np.zeros(2, np.uint64),
    )
    worker.send(Kind.COPIES, acks.encode())
    bench.loop.tick(0)
    assert ("copied", [4, 5]) in bench.brain.calls
    assert plans(worker) == [1], "what waited for the copies goes on at once"


def test_a_worker_whose_copy_is_late_loses_its_epoch(bench: Bench) -> None:
    worker = bench.worker()
    bench.brain.late, bench.brain.next_deadline_s = WorkerFault("copy 7 is late"), 0.0
    bench.loop.tick(0)
    assert bench.brain.suspended
    assert bench.heard()[0]["detail"] == "copy 7 is late"
    with pytest.raises(LinkClosed):
        worker.receive(0)


@pytest.mark.parametrize("how", ["fault", "kind", "bytes", "future epoch"])
def test_a_worker_that_cannot_be_believed_loses_its_epoch(bench: Bench, how: str) -> None:
    worker = bench.worker()
    bench.brain.wants = 1
    bench.loop.tick(0)
    if how == "fault":
        bench.brain.fault = WorkerFault("digest")
    assert plans(worker) == [1]
    if how == "future epoch":
        worker.epoch = 2
    kind = Kind.TOKENS if how == "kind" else Kind.RESULT
    worker.send(kind, b"nonsense" if how == "bytes" else result(1))
    bench.loop.tick(0)
    assert bench.brain.suspended
    assert bench.heard()[0]["type"] == "worker_fault"
    with pytest.raises(LinkClosed):
        worker.receive(0)


@pytest.mark.parametrize("how", ["closed", "kind", "bytes"])
def test_an_api_process_that_breaks_the_protocol_loses_its_own_link_only(
    bench: Bench, how: str
) -> None:
    bad, good = bench.api(0), bench.api(1)
    if how == "closed":
        bad.close()
    else:
        bad.send(Kind.PLAN if how == "kind" else Kind.MESSAGE, b"nonsense")
    good.send(Kind.MESSAGE, encode(Cancel((1,))))
    bench.brain.calls.clear()
    bench.loop.tick(0)
    assert bench.brain.calls == [("drop_api", 0), ("receive", 1, Cancel((1,)))]
    faults = [(m["type"], m["index"], m["process"]) for m in bench.heard()]
    assert faults == [("api_fault", 0, 40)]
    bench.brain.output = [(0, batch(1)), (1, batch(2))]
    bench.loop.tick(0)
    states_and_tokens = []
    while (frame := good.receive(0)) is not None:
        states_and_tokens.append(frame)
    assert states_and_tokens[-1] == (Kind.TOKENS, batch(2).encode())


def test_an_api_process_that_does_not_read_is_dropped_at_the_bound(bench: Bench) -> None:
    bench.api(0), bench.api(1)
    bench.loop._apis[0].link.buffer_bytes = 1 << 20
    bench.brain.output = [(0, batch(1, 1 << 18))] * 8
    bench.loop.tick(0)
    assert ("drop_api", 0) in bench.brain.calls[2:]
    assert bench.heard()[0]["type"] == "api_fault"
    assert list(bench.loop._apis) == [1]


def test_bytes_a_peer_did_not_take_follow_when_it_reads(bench: Bench) -> None:
    api = bench.api(0)
    states(api)
    pieces = [batch(n, 1 << 18) for n in range(8)]
    bench.brain.output = [(0, piece) for piece in pieces]
    bench.loop.tick(0)
    assert bench.loop._apis[0].link.unsent_bytes > 0
    got = []
    for _ in range(100):
        if (frame := api.receive(0)) is None:
            bench.loop.tick(0.1)
        else:
            got.append(frame[1])
        if len(got) == len(pieces):
            break
    assert got == [piece.encode() for piece in pieces]
    # And then it is not woken for writability any more.
    assert bench.loop._apis[0].link.unsent_bytes == 0 and not bench.loop._apis[0].writing


def test_an_api_process_inherits_nothing_of_those_before_it(bench: Bench) -> None:
    bench.api(0, first_id=700)
    assert bench.brain.calls == [("drop_api", 0, 700)]
    bench.say(type="api_lost", index=0)
    assert bench.brain.calls[1:] == [("drop_api", 0)]
    bench.say(type="api_lost", index=5)
    assert bench.brain.calls[-1] == ("drop_api", 5)


def test_it_sleeps_until_the_next_deadline_and_no_longer_than_its_bound(bench: Bench) -> None:
    now = 100.0
    bench.loop._clock = lambda: now
    assert bench.loop._sleep_s() == loop_module.SLEEP_S_MAX
    bench.brain.next_deadline_s = 100.25
    assert bench.loop._sleep_s() == 0.25
    bench.brain.next_deadline_s = 99.0
    assert bench.loop._sleep_s() == 0.0
    bench.loop.tick(0)
    assert bench.brain.calls == [("expire",)]


class Time:
    """The loop's clock in our hands: it goes on while the loop waits, unless an event is there."""

    def __init__(self, bench: Bench) -> None:
        self.now_s = 100.0
        self.bench = bench
        self.select = bench.loop._selector.select
        self.stopped_s = 0.0  # the process is stopped for so long in its next wait
        bench.loop._clock = lambda: self.now_s
        bench.loop._looked_s = self.now_s
        bench.loop._selector.select = self.wait

    def wait(self, timeout_s: float) -> list[Any]:
        events = self.select(0)
        self.now_s += self.stopped_s + (0.0 if events else timeout_s)
        self.stopped_s = 0.0
        return events or self.select(0)

    def run(self, seconds: float) -> None:
        """Ticks, each as long as the loop would sleep, for so long."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.bench.loop.tick(min(self.bench.loop._sleep_s(), end_s - self.now_s))


def answered(bench: Bench, time: Time, worker: Link, steps: int, seconds: float) -> int:
    """So many steps, one after the other, each answered after so long: the last one's number."""
    for _ in range(steps):
        bench.brain.wants = 1
        bench.loop.tick(0)
        time.run(seconds)
        worker.send(Kind.RESULT, result(bench.brain.next_step, bench.brain.epoch))
        bench.loop.tick(0)
    return bench.brain.next_step


def test_a_step_that_does_not_come_back_makes_the_server_not_ready(bench: Bench) -> None:
    time = Time(bench)
    worker, api = bench.worker(), bench.api()
    bench.brain.wants = 1
    bench.loop.tick(0)
    assert states(api)[-1].ready
    time.run(31)
    assert "takes long" in states(api)[-1].detail
    worker.send(Kind.RESULT, result(1))
    bench.loop.tick(0)
    assert states(api)[-1].ready
    time.run(1000)
    assert states(api) == []  # Idle and able is ready.


def test_a_step_far_beyond_its_like_is_a_hang_and_the_loop_wakes_for_it(bench: Bench) -> None:
    time = Time(bench)
    worker = bench.worker()
    answered(bench, time, worker, 40, 0.05)
    bench.brain.wants = 1
    bench.loop.tick(0)
    sent_s = time.now_s
    time.run(0.6)
    assert bench.heard() == []
    time.run(0.4)
    [fault] = bench.heard()
    assert (fault["type"], fault["hung"], fault["since_s"]) == ("worker_fault", True, sent_s)
    assert bench.brain.suspended


def test_a_step_counts_from_the_end_of_the_one_before_it(bench: Bench) -> None:
    time = Time(bench)
    worker = bench.worker()
    answered(bench, time, worker, 40, 0.5)
    # The bound is some 2.5 s; two steps of 2 s are sent at once.
    first = bench.brain.next_step + 1
    bench.brain.wants = 2
    bench.loop.tick(0)
    for step in (first, first + 1):
        time.run(2.0)
        worker.send(Kind.RESULT, result(step))
        bench.loop.tick(0)
    assert bench.heard() == [] and not bench.brain.suspended


def test_a_core_that_was_stopped_looks_for_the_result_and_blames_nobody(bench: Bench) -> None:
    time = Time(bench)
    worker = bench.worker()
    answered(bench, time, worker, 40, 0.05)
    bench.brain.wants = 1
    bench.loop.tick(0)
    time.stopped_s = 3600
    time.run(0.3)
    assert bench.heard() == [] and not bench.brain.suspended
    # Between two ticks as well; and a worker that hangs meanwhile is found all the same.
    time.now_s += 3600
    time.run(0.1)
    assert bench.heard() == []
    time.run(1.0)
    assert [fault["hung"] for fault in bench.heard()] == [True]


def test_a_result_that_came_with_the_deadline_is_a_result(bench: Bench) -> None:
    time = Time(bench)
    worker = bench.worker()
    answered(bench, time, worker, 40, 0.05)
    bench.brain.wants = 1
    bench.loop.tick(0)
    step = bench.brain.next_step
    # It arrives after the wait, when its deadline is over as well.
    after_wait = time.select

    def late(timeout_s: float) -> list[Any]:
        events = after_wait(0)
        time.now_s = bench.loop.clocks.deadline_s + 0.05
        worker.send(Kind.RESULT, result(step))
        return events

    bench.loop._selector.select = late
    bench.loop.tick(bench.loop._sleep_s())
    assert bench.heard() == [] and ("commit", step) in bench.brain.calls


def test_the_first_new_token_of_an_epoch_is_told_with_the_streams_that_waited(
    bench: Bench,
) -> None:
    bench.brain.live = 3
    worker = bench.worker()
    bench.brain.wants = 1
    bench.loop.tick(0)
    assert bench.heard(resumed=True) == []
    bench.brain.on_commit = lambda step: setattr(bench.brain, "tokens_generated", 2)
    worker.send(Kind.RESULT, result(1))
    bench.loop.tick(0)
    bench.loop.tick(0)
    [resumed] = bench.heard(resumed=True)
    assert (resumed["epoch"], resumed["streams"]) == (1, 3)


def test_a_worker_for_whom_nobody_waits_is_told_at_once(bench: Bench) -> None:
    bench.worker()
    assert [resumed["streams"] for resumed in bench.heard(resumed=True)] == [0]


@pytest.mark.parametrize(
    ("said", "memory"),
    [({}, Memory.LOST), *(({"memory": str(one)}, one) for one in Memory)],
)
def test_the_brain_is_told_what_became_of_the_memory_and_silence_means_lost(
    bench: Bench, said: dict[str, str], memory: Memory
) -> None:
    bench.connect({"type": "worker", "epoch": 1, **said}, 1)
    assert bench.brain.memory is memory


def test_words_of_the_supervisor_that_need_no_worker(bench: Bench) -> None:
    bench.say(type="ping")
    assert bench.heard() == [{"type": "pong"}]
    bench.say(type="weights_good", epoch=3, step=40)
    assert bench.brain.calls == [("weights_good", 3, 40)]


def test_drained_is_said_once_when_nothing_is_live_any_more(bench: Bench) -> None:
    bench.brain.live = 1
    api = bench.api()
    bench.say(type="drain")
    assert ("drain",) in bench.brain.calls and bench.heard() == []
    assert not states(api)[-1].ready
    bench.say(type="end_all", end=int(End.SHUTDOWN), message="late")
    assert ("end_all", End.SHUTDOWN, "late") in bench.brain.calls
    assert bench.heard() == [{"type": "drained"}]
    bench.loop.tick(0)
    assert bench.heard() == []


def test_stop_sends_what_is_left_and_returns_0(bench: Bench) -> None:
    api = bench.api(0)
    states(api)
    last = batch(1, 1 << 20)
    bench.brain.output = [(0, last)]
    got: list[int] = []
    reader = threading.Thread(target=lambda: got.append(len(api.receive(10)[1])))
    bench.control.send({"type": "stop"})
    reader.start()
    assert bench.loop.run() == 0
    reader.join(10)
    assert got == [len(last.encode())]
    with pytest.raises(LinkClosed):
        api.receive(5)


def test_the_end_of_the_supervisor_ends_the_loop(bench: Bench) -> None:
    bench.control.close()
    assert bench.loop.run() == 70


def test_a_tick_that_fails_ends_the_process_with_a_dump_and_never_continues(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = bench.worker()
    bench.brain.wants = 1
    bench.loop.tick(0)
    bench.brain.fault = ZeroDivisionError("a bug")
    worker.send(Kind.RESULT, result(1))
    assert bench.loop.run() == 70
    assert bench.heard() == [
        {"type": "fault", "operator": False, "message": "core: ZeroDivisionError('a bug')"}
    ]
    error = capsys.readouterr().err
    assert "Traceback" in error and "epoch=1, in_flight=1" in error


class ScriptedReports:
    """Notes what it is told; `ready` is what may leave."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ready: list[dict[str, Any]] = []

    def lost(self, epoch: int, detail: str, now_s: float, *, hung: bool = False) -> None:
        self.calls.append(("lost", epoch, detail))

    def ended(self, detail: str, *, implicates: bool) -> None:
        self.calls.append(("ended", detail, implicates))

    def renewed(self, epoch: int) -> None:
        self.calls.append(("renewed", epoch))

    def take(self, now_s: float, *, last: bool = False) -> list[dict[str, Any]]:
        ready, self.ready = self.ready, []
        return [*ready, {"last": True}] if last else ready


def test_evidence_of_a_fault_is_taken_after_the_supervisor_heard_of_it_and_told_to_it_later(
    bench: Bench,
) -> None:
    reports, worker = ScriptedReports(), bench.worker()
    bench.loop._reports = reports
    lost = reports.lost

    def noted(*arguments: Any, **options: Any) -> None:
        told = [message["type"] for message in bench.heard()]
        assert told == ["worker_fault"], "it must not wait for the evidence"
        lost(*arguments, **options)

    reports.lost = noted  # type: ignore[method-assign]
    worker.close()
    bench.loop.tick(0)
    bench.say(type="worker_lost", epoch=1, detail="ended with code 70", implicates=True)
    bench.worker(2)
    assert [call[0] for call in reports.calls] == ["lost", "ended", "renewed"]
    assert reports.calls[1:] == [("ended", "ended with code 70", True), ("renewed", 2)]
    reports.ready = [{"epoch": 1}]
    bench.loop.tick(0)
    bench.say(type="stop")
    told = [message["report"] for message in bench.heard() if message["type"] == "fault_report"]
    assert told == [{"epoch": 1}, {"last": True}]
