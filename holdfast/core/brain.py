"""The brain: one engine's requests from admission to end, without IO and without a clock.

Whoever drives it (core.loop in a process, `LLM` in-process, the simulator) passes in messages,
results and the time, sends the plans it returns and the output it leaves behind. It never sees a
character of text and never imports torch.

    receive(message)   admission, cancel, finish, resume
    plan()             the next StepPlan, at most `limits.steps_ahead` unanswered
    commit(result)     facts: journal, then output
    copied(acks)       copies of plans are over
    take_moves() / moved(acks)   orders for the mover between host and disk, and their ends
    suspend() / new_epoch()   the worker is gone / another one is there
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from holdfast.config import ENDED_SHARES, Limits
from holdfast.core.admission import Admission as AdmissionControl
from holdfast.core.admission import WaitingQueue
from holdfast.core.checks import PageChecks
from holdfast.core.commit import Commit
from holdfast.core.ended import EndedRequests
from holdfast.core.flight import Flight
from holdfast.core.gauges import Gauges
from holdfast.core.journal import Admission, Journal, JournalledRequest
from holdfast.core.metrics import Metrics
from holdfast.core.page_faults import PageFaults
from holdfast.core.quarantine import Quarantine
from holdfast.core.replies import Output, Replies
from holdfast.core.request import Phase, Request
from holdfast.core.running import RunningRows
from holdfast.core.scheduler import Scheduler
from holdfast.core.trust import Moment, Trust
from holdfast.errors import InvariantError, WorkerFault, require
from holdfast.kv.ledger import Ledger
from holdfast.kv.tiers import Tiers
from holdfast.wire.copies import CopyAcks, MoveOrders
from holdfast.wire.messages import (
    ID_MAX,
    Accepted,
    Cancel,
    End,
    Ended,
    Finish,
    Memory,
    Refused,
    Resume,
    Submit,
    ToCore,
)
from holdfast.wire.plan import StepPlan, StepResult
from holdfast.wire.rows import RowTable

POISON_MESSAGE = (
    "the engine faulted each time it computed this request, at last with nothing beside it"
)
# Gauges and sums are published every few steps, and whenever the pipe is empty.
COUNT_EVERY_STEPS = 8
# Of the last plans that were answered, for the report of a fault (core.report).
PLANS_KEPT = 8


class Brain:
    """`tag` names everything a page's content depends on besides tokens and tenant: model,
    weights, layout, dtype. `epoch` numbers the workers this brain has had, from 1; `life` the cores
    of the engine, this one included. `wall_ns`: the wall clock, for what must mean the same to the
    next core; everything else is told the time. `scrub_pages_s`: sealed pages read again a second;
    0 = off."""

    def __init__(
        self,
        limits: Limits,
        journal: Journal,
        metrics: Metrics,
        *,
        epoch: int = 1,
        life: int = 1,
        tag: bytes = b"",
        wall_ns: Callable[[], int] = time.time_ns,
        scrub_pages_s: float = 0.0,
    ) -> None:
        self.limits = limits
        self.journal = journal
        self.metrics = metrics
        self.epoch = epoch
        self.wall_ns = wall_ns
        self.suspended = False
        self.ledger = Ledger(limits)
        self.admission = AdmissionControl(limits)
        self.waiting = WaitingQueue(limits)
        self.requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._deadlines_max = 2 * limits.live_requests
        self._flights: deque[Flight] = deque()
        self.recent: deque[Flight] = deque(maxlen=PLANS_KEPT)
        self.quarantine = Quarantine()
        self._replies = Replies()
        # For clients that have not read their end when the core dies: the last requests that ended
        # here, and those of a core before that no client has asked for since.
        self._ended = EndedRequests(limits, shares=1)
        self._unresumed = EndedRequests(limits, shares=ENDED_SHARES - 1)
        self._step_seconds = 0.05  # smoothed, for Retry-After
        running, mirror = RunningRows(limits), RowTable(limits)
        self.tiers = Tiers(limits, self.ledger, life) if limits.host_pages else None
        self.checks = PageChecks(limits, self.ledger, scrub_pages_s)
        self.scheduler = Scheduler(
            limits, self.ledger, self.waiting, running, mirror, tag, self.checks, self.tiers
        )
        self.faults = PageFaults(self.ledger, self.scheduler)
        self.trust = Trust()
        self.doubtful_tokens = 0  # emitted when the weights may have been wrong already
        self.committer = Commit(
            limits,
            self.ledger,
            journal,
            self.scheduler,
            checked=self._checked,
            ended=self._end,
            compact=self._compact,
            output=self._replies.queue,
            wall_ns=wall_ns,
        )
        self.gauges = Gauges(metrics, self.committer, self.scheduler)

    @property
    def in_flight(self) -> int:
        """Plans launched and not committed."""
        return len(self._flights)

    @property
    def flights(self) -> Sequence[Flight]:
        """Plans launched and not committed, oldest first."""
        return tuple(self._flights)

    @property
    def live(self) -> int:
        """Requests admitted and not ended."""
        return len(self.requests)

    @property
    def tokens_generated(self) -> int:
        """Output tokens committed since the start."""
        return self.committer.tokens_generated

    def context_tokens(self, plan: StepPlan) -> int:
        """Tokens, summed over its rows, that the plan just given reads or computes."""
        return int(self.scheduler.running.planned[plan.rows].sum())

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire`, or on an idle engine `plan`, has something to do next."""
        deadline_s = self._deadlines[0][0] if self._deadlines else math.inf
        if self.tiers is not None:
            tiers_s = self.tiers.next_deadline_s(worker=not self.suspended)
            deadline_s = min(deadline_s, tiers_s)
        if self.checks.pages_s and not self.suspended and not self._flights:
            deadline_s = min(deadline_s, self.checks.due_s())
        return deadline_s if deadline_s < math.inf else None

    def take_output(self) -> list[Output]:
        """(api, message) in order; whoever takes it sends it (core.replies.framed), or reads it
        before the next `commit`."""
        return self._replies.take()

    # --- messages ---

    def receive(self, api: int, message: ToCore, now_s: float) -> None:
        if isinstance(message, Submit):
            self._submit(api, message, now_s)
        elif isinstance(message, Cancel):
            for request_id in message.ids:
                request = self.requests.get(request_id)
                if request is not None:
                    self._end(request, End.CANCELLED, "")
                else:
                    self._unresumed.take(request_id)  # It ended, and nobody will ask how.
        elif isinstance(message, Finish):
            request = self.requests.get(message.id)
            if request is not None:
                self._end(request, End.STOP, "", tokens=message.tokens)
        else:
            self._resume(api, message)

    def _submit(self, api: int, submit: Submit, now_s: float) -> None:
        if any(one in self.requests or one in self._unresumed for one in submit.ids):
            # Resent by an api process that missed the answer of the core before this one: admission
            # is idempotent, and it has no token of it yet.
            self._replies.say(api, Accepted(submit.ids))
            self._resume(api, Resume(tuple((one, 0) for one in submit.ids)))
            return
        refusal = self.admission.judge(submit, self._queued(), self._step_seconds)
        if refusal is not None:
            self.metrics.add("requests_refused_total", labels=(refusal.code or "refused",))
            self._replies.say(
                api,
                Refused(
                    submit.ids,
                    refusal.status,
                    refusal.message,
                    refusal.field,
                    refusal.code,
                    refusal.retry_after_s,
                ),
            )
            return
        deadline_ns = self.wall_ns() + int((submit.deadline_s - now_s) * 1e9)
        prompt = np.frombuffer(submit.prompt, np.int32)
        leader: Request | None = None
        for request_id, seed in zip(submit.ids, submit.seeds, strict=True):
            record = Admission(
                id=request_id,
                api=api,
                tenant=submit.tenant,
                priority=submit.priority,
                prompt=submit.prompt,
                max_tokens=submit.max_tokens,
                seed=seed,
                deadline_ns=deadline_ns,
                sampling=submit.sampling,
            )
            request = Request(record, prompt, submit.deadline_s)
            self._take(request)
            if not self.journal.submit(record):
                self._compact()
            if leader is None:
                leader = request
                self.waiting.push(request)
            elif prompt.size >= self.limits.page_tokens:
                leader.followers.append(request)
            else:
                self.waiting.push(request)
        self.metrics.add("requests_admitted_total", len(submit.ids))
        self._replies.say(api, Accepted(submit.ids))

    def _take(self, request: Request) -> None:
        self.requests[request.id] = request
        self.admission.took(request)
        heapq.heappush(self._deadlines, (request.deadline_s, request.id))

    def _queued(self) -> int:
        """Requests without a row, the held-back choices included."""
        return len(self.requests) - self.scheduler.running.active

    def _resume(self, api: int, message: Resume) -> None:
        """Bring an api process up to date after the core was replaced."""
        for request_id, next_index in message.pairs:
            self.committer.muted.discard(request_id)
            request = self.requests.get(request_id)
            if request is not None:
                tokens = self._tokens_of(request)[request.prompt_len :]
                self._replies.say_tokens(api, request_id, next_index, tokens, request.cached_tokens)
            elif entry := self._unresumed.take(request_id) or self._ended.take(request_id):
                record, tokens, end = entry
                self._ended.add(*entry)
                self._replies.say_tokens(
                    api, request_id, next_index, tokens, record.cached_tokens, end
                )
                if next_index >= tokens.size or end not in (End.STOP, End.LENGTH):
                    ended = Ended(request_id, end, "", tokens.size, record.cached_tokens)
                    self._replies.say(api, ended)
            else:
                self._replies.say(api, Refused((request_id,), 0, "not known to this core"))

    def _tokens_of(self, request: Request) -> np.ndarray:
        """int32[prompt + emitted] of a live request, wherever its tokens are."""
        if request.phase is Phase.RUNNING:
            run, row = self.scheduler.running, request.row
            known = request.prompt_len + int(run.emitted[row])
            if known > request.tokens.size:
                return self.scheduler.mirror.tokens[row, :known]
        return request.tokens

    # --- steps ---

    def plan(self, now_s: float) -> StepPlan | None:
        """The next plan to launch, or None when there is none or enough are unanswered."""
        if self.suspended or len(self._flights) >= self.limits.steps_ahead:
            return None
        if self.quarantine.alone is not None and not self._isolate():
            return None
        flight = self.scheduler.plan(self.epoch, len(self._flights), now_s)
        while self.scheduler.starved:
            require(flight is None, "a plan was launched although its only row is starved")
            request = self.scheduler.starved.pop()
            self._end(request, End.ENGINE_FAULT, "too few KV pages to continue this request")
            # Its pages may be all that the next one waits for, and nothing else will wake us.
            flight = self.scheduler.plan(self.epoch, len(self._flights), now_s)
        if flight is None:
            return None
        self._flights.append(flight)
        self.faults.launched(flight)
        self.metrics.add("steps_total")
        if flight.plan.admits.size:
            admits = flight.plan.admits
            self.metrics.add("prefix_query_tokens_total", int(admits["tokens_len"].sum()))
            self.metrics.add("prefix_hit_tokens_total", int(admits["length"].sum()))
        if flight.prompts:
            # A row's last known token is decoded, be it of a prompt or drawn.
            prefilled = int(flight.plan.known_lens.sum()) - int(flight.plan.samples.sum())
            self.metrics.add("tokens_prefilled_total", prefilled)
        return flight.plan

    def _isolate(self) -> bool:
        """Let the request that must run alone do so; False while steps of others are in flight."""
        request = self.requests[self.quarantine.alone]
        self.quarantine.progress(self._tokens_of(request).size)
        if self.quarantine.alone is None:
            self.scheduler.alone = None
            return True
        return self.scheduler.isolate(self.requests[self.quarantine.alone], self._flights)

    def commit(self, result: StepResult, now_s: float) -> None:
        """Settle the oldest unanswered plan.

        One that was committed already is counted and dropped; those of another epoch never get
        past the link. Output may hold arrays of the result: they stay as they are until it is
        taken. Raises WorkerFault when the result cannot be of the plan: the epoch must end.
        """
        if result.epoch != self.epoch:
            raise InvariantError(f"result of epoch {result.epoch} in {self.epoch}")
        if not self._flights or self.suspended:
            self.metrics.add("stale_results_total")
            return
        flight = self._flights[0]
        if result.step < flight.plan.step:
            self.metrics.add("stale_results_total")
            return
        if result.step > flight.plan.step:
            raise WorkerFault(f"result of step {result.step}, expected {flight.plan.step}")
        try:
            self.committer.commit(flight, result)
        except WorkerFault:
            self.metrics.add("digest_mismatches_total")
            # The mirror has taken the plan's deltas: no result may be compared with it any more.
            self.suspended = True
            raise
        self.recent.append(self._flights.popleft())
        seconds = now_s - flight.launched_s
        self._step_seconds += 0.05 * (seconds - self._step_seconds)
        self.metrics.observe("step_seconds", result.device_ns * 1e-9)
        if result.step % COUNT_EVERY_STEPS == 0 or not self._flights:
            self.gauges.publish(self._queued())
            self.trust.taken(result.step, self._moment())

    # --- slower tiers ---

    def copied(self, acks: CopyAcks, now_s: float) -> None:
        """Copies that plans of this epoch ordered are over. Those of another epoch never get past
        the link; unknown tickets are counted and dropped."""
        require(acks.epoch == self.epoch, f"copies of epoch {acks.epoch} in {self.epoch}")
        if self.tiers is None or self.suspended:
            self.metrics.add("stale_acks_total", acks.tickets.size)
            return
        self.scheduler.brought(self.tiers.copied(acks))
        changed, self.tiers.changed = self.tiers.changed, []
        for handle in changed:
            if self.ledger.is_sealed(handle):
                self._page_faults([handle], "store")

    def take_moves(self, now_s: float) -> MoveOrders | None:
        """New orders for the mover; whoever takes them sends them."""
        if self.tiers is None:
            return None
        moves = self.tiers.take_moves(now_s)
        return MoveOrders(life=self.tiers.life, moves=moves) if moves.size else None

    def moved(self, acks: CopyAcks, now_s: float) -> None:
        """The mover's orders are over; those of other cores are counted and dropped."""
        if self.tiers is None:
            self.metrics.add("stale_acks_total", acks.tickets.size)
            return
        self.scheduler.brought(self.tiers.moved(acks))

    def _expire_orders(self, tiers: Tiers, now_s: float) -> None:
        """Raises WorkerFault when a copy is late: its bytes may be written at any time, so that
        only the end of the epoch makes its page and its slot safe again."""
        self.scheduler.brought(tiers.expire(now_s))
        late = None if self.suspended else tiers.late_copy(now_s)
        if late is not None:
            self.suspended = True
            raise WorkerFault(f"copy {late} was not acknowledged in {self.limits.copy_timeout_s} s")

    # --- ends ---

    def _end(self, request: Request, end: End, message: str, tokens: int | None = None) -> None:
        """The one place where a request ends; `tokens` cuts what it keeps (stop strings)."""
        output = self._tokens_of(request)[request.prompt_len :].copy()
        running = request.phase is Phase.RUNNING
        request.finish(end)
        if running:
            self.scheduler.drop_row(request.row)
        self.scheduler.release_followers(request)
        del self.requests[request.id]
        self.quarantine.forget(request.id)
        if self.scheduler.alone is request:
            self.scheduler.alone = None
        self.admission.ended(request)
        self.metrics.add("requests_ended_total", labels=(end.name.lower(),))
        kept = output.size if tokens is None else min(tokens, output.size)
        muted = request.id in self.committer.muted
        if end is not End.CANCELLED:
            keeper = self._unresumed if muted else self._ended
            keeper.add(request.admission, output[:kept], end)
        if end in (End.STOP, End.LENGTH) and tokens is None:
            return  # core.commit journalled it with its last token
        if not self.journal.end(request.id, end, kept):
            self._compact()
            self.journal.end(request.id, end, kept)
        self.committer.muted.discard(request.id)
        if end not in (End.STOP, End.CANCELLED) and not muted:
            ended = Ended(request.id, end, message, kept, request.cached_tokens)
            self._replies.say(request.admission.api, ended)

    def expire(self, now_s: float) -> None:
        """End every request whose deadline has passed.

        Raises WorkerFault when a copy between tiers is late: the epoch must end.
        """
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline_s <= now_s:
                self._end(request, End.DEADLINE, "the request's deadline passed")
        # Deadlines of ended requests are dropped lazily; keep the heap proportional to the live.
        if len(self._deadlines) > self._deadlines_max:
            self._deadlines = [e for e in self._deadlines if e[1] in self.requests]
            heapq.heapify(self._deadlines)
        if self.tiers is not None:
            self._expire_orders(self.tiers, now_s)

    def drop_api(self, api: int, now_s: float, before: int = ID_MAX) -> None:
        """Nobody waits any more for what the api process of this index asked for: its requests
        with ids below `before`."""
        for request in [r for r in self.requests.values() if r.admission.api == api]:
            if request.id < before:
                self._end(request, End.CANCELLED, "")
        self._unresumed.forget(api, before)

    def drain(self) -> None:
        """Refuse what comes from now on; what is live goes on."""
        self.admission.draining = True

    def end_all(self, end: End, message: str, now_s: float) -> None:
        """End every live request, for instance because the drain deadline passed."""
        for request in list(self.requests.values()):
            self._end(request, end, message)

    # --- the worker goes and comes ---

    def suspend(self) -> None:
        """There is no worker: nothing is launched until `new_epoch`."""
        self.suspended = True

    def new_epoch(
        self, epoch: int, now_s: float, *, implicates: bool = False, memory: Memory = Memory.LOST
    ) -> None:
        """Another worker is there, and the old one is fenced: it can write nothing any more.

        Every running request is admitted again with the tokens that are facts. Oldest last to the
        front, so that the order stays. It finds the pages that are kept, which is up to `memory`
        and to their sums: plans verify them before anybody is admitted.
        `implicates`: the old worker faulted by itself, so that one of the requests in flight may
        have been the cause (core.quarantine).
        """
        require(epoch > self.epoch or not self._flights, f"epoch {epoch} after {self.epoch}")
        run = self.scheduler.running
        sealed_until = self._sealed_until(memory)
        if self.tiers is not None:
            lost = memory is Memory.LOST
            waiters = self.tiers.reset() if lost else self.tiers.new_epoch(sealed_until)
            self.scheduler.brought(waiters)
        rows = run.rows()
        for row in rows[np.argsort(-run.order[rows])].tolist():
            self.scheduler.recompute(row)
        suspects = dict.fromkeys(
            request_id for flight in self._flights for request_id in flight.ids.tolist()
        )
        self._flights.clear()
        if memory is Memory.LOST:
            self.ledger.reset()
            self.checks.restart(np.empty(0, np.uint64))
        else:
            self.checks.restart(self.ledger.survive(sealed_until))
        self.scheduler.restart(RunningRows(self.limits), RowTable(self.limits))
        self.epoch = epoch
        self.suspended = False
        self._suspect(suspects, implicates=implicates)

    def _suspect(self, in_flight: Collection[int], *, implicates: bool) -> None:
        """A worker has ended with these requests in flight, and all that live wait again."""
        if not implicates:
            self.quarantine.interrupt()
            return
        live = [self.requests[one] for one in in_flight if one in self.requests]
        suspects = [(one.id, one.tokens.size) for one in live]
        culprit = self.quarantine.implicate(suspects, shared=len(in_flight) > 1)
        if culprit is not None:
            self._end(self.requests[culprit], End.ENGINE_FAULT, POISON_MESSAGE)

    def _sealed_until(self, memory: Memory) -> int | None:
        """Where the good pages of an ended worker end on the ledger's clock, as far as that is up
        to the weights; None = nowhere. What is computed from here on is of weights that were
        verified or loaded."""
        now = self._moment()
        before = self.trust.until
        self.trust.proved(now)
        if memory is not Memory.RELOADED:
            return None
        doubtful = now.tokens - before.tokens
        self.doubtful_tokens += doubtful
        self.metrics.add("tokens_doubtful_total", doubtful)
        return before.clock

    def weights_good(self, epoch: int, step: int) -> None:
        """The worker of this epoch has read the weights through, and they are the bytes that were
        loaded; it began once `step` was computed."""
        if epoch == self.epoch:
            self.trust.found_good(step)

    def _moment(self) -> Moment:
        return Moment(self.ledger.clock, self.committer.tokens_generated)

    @property
    def page_faults(self) -> list[dict[str, Any]]:
        """The last pages that were not as they had been sealed (core.page_faults), oldest first."""
        return list(self.faults.entries)

    def _checked(self, flight: Flight, sums: np.ndarray) -> None:
        """The sums of pages that a plan has read again are in."""
        handles = self.faults.judge(flight, sums)
        if handles:
            self._page_faults(handles, "promotion" if flight.verifies else "scrub")

    def _page_faults(self, handles: list[int], found: str) -> None:
        self.faults.fail(handles, found)
        self.metrics.add("pages_failed_total", len(handles), (found,))
        self.metrics.add("faults_total", len(handles), ("page",))

    def restore(self, recovered: dict[int, JournalledRequest], now_s: float) -> None:
        """Take over from a core that died: its live requests wait for a row, in their order.

        Nothing of them is sent until their api process resumes them and says what it has.
        """
        wall_ns = self.wall_ns()
        for entry in recovered.values():
            record, output = entry.admission, np.array(entry.tokens, np.int32)
            if entry.end:
                if entry.end != End.CANCELLED:
                    self._unresumed.add(record, output, entry.end)
                continue
            tokens = np.concatenate([np.frombuffer(record.prompt, np.int32), output])
            deadline_s = now_s + (record.deadline_ns - wall_ns) * 1e-9
            request = Request(record, tokens, deadline_s)
            self._take(request)
            self.committer.muted.add(request.id)
            self.waiting.push(request)
            # It may have had its last token, and only the record of its end is missing.
            if output.size and int(output[-1]) in record.sampling.stop_ids:
                self._end(request, End.STOP, "", tokens=request.emitted)
            elif tokens.size >= request.limit:
                self._end(request, End.LENGTH, "", tokens=request.emitted)

    def _compact(self) -> None:
        live = (
            (request.admission, self._tokens_of(request)[request.prompt_len :], 0)
            for request in self.requests.values()
        )
        self.journal.compact(itertools.chain(self._unresumed, self._ended, live))

    def verify(self) -> None:
        """Recount everything. Raises InvariantError naming what does not add up."""
        self.ledger.verify()
        if self.tiers is not None:
            self.tiers.verify()
        running = self.scheduler.running
        require(running.active == int((running.life != 0).sum()), "active rows miscounted")
        live = sum(request.limit for request in self.requests.values())
        require(live == self.admission.live_tokens, "live tokens miscounted")
