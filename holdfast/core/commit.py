"""Commit: a step's result becomes facts, in order, or ends the epoch.

For result N: the mirror takes plan N's deltas and computes the digest that the device must have
seen; a difference is a WorkerFault, before any token of the step counts. Then tokens are matched
with the rows' lives (a row that ended, was cancelled or preempted meanwhile is void), end
conditions are applied, the journal is written, and only then is output made. Last, finished pages
are put up for sealing, sums that came are booked, and leases of ended holders drop.

Home of: the device's row table is the brain's; no token after cancel; emit after journalling.
Array code throughout; Python per row only for rows with an event.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from holdfast.config import Limits
from holdfast.core.journal import Journal
from holdfast.core.request import Request
from holdfast.core.running import Chain
from holdfast.core.scheduler import Flight, Scheduler
from holdfast.errors import WorkerFault
from holdfast.kv.ledger import Ledger
from holdfast.wire.link import Kind
from holdfast.wire.messages import End, TokenBatch
from holdfast.wire.plan import ROW_OK, StepResult
from holdfast.wire.rows import RowTable

Output = tuple[int, int, bytes]

# Plain integers: reading a member of an IntEnum costs a microsecond in Python 3.11.
_STOP, _LENGTH, _TOKENS = int(End.STOP), int(End.LENGTH), int(Kind.TOKENS)


class Commit:
    """`ended(request, end, message)` books a request's end; `compact()` makes journal room."""

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        journal: Journal,
        scheduler: Scheduler,
        *,
        ended: Callable[[Request, End, str], None],
        compact: Callable[[], None],
        output: list[Output],
        wall_ns: Callable[[], int],
    ) -> None:
        self.limits = limits
        self.ledger = ledger
        self.journal = journal
        self.scheduler = scheduler
        self.output = output
        self._wall_ns = wall_ns
        self._ended = ended
        self._compact = compact
        self.tokens_generated = 0
        # Requests of a core that died, until their client says where it stands: their tokens are
        # journalled and not sent, or it would get them twice.
        self.muted: set[int] = set()

    def commit(self, flight: Flight, result: StepResult) -> None:
        """Settle one step. Raises WorkerFault when the result cannot be of the plan."""
        plan, run, mirror = flight.plan, self.scheduler.running, self.scheduler.mirror
        _check_shapes(flight, result)
        mirror.apply(plan)
        expected = mirror.digest(plan)
        if expected != result.digest:
            raise WorkerFault(
                f"step {plan.step}: the device's rows are not the brain's "
                f"(digest {result.digest:#x}, expected {expected:#x})"
            )
        mirror.advance(plan, result.tokens)
        live = run.life[plan.rows] == flight.life
        faulty = live & (result.faults != ROW_OK)
        drawn = live & (plan.samples != 0) & ~faulty
        ends = self._settle_tokens(flight, result, drawn) if drawn.any() else None
        if faulty.any():
            self._fail_rows(plan.rows[faulty])
        self._want_seals(plan.rows[live & ~faulty], mirror)
        if ends is not None and ends.any():
            rows = plan.rows[drawn]
            for at in np.flatnonzero(ends).tolist():
                request = run.requests[int(rows[at])]
                assert request is not None
                self._ended(request, End(int(ends[at])), "")
        self.ledger.acknowledge(plan.step)
        self._book_seals(flight, result)
        self.ledger.release(plan.zeros, plan.step)

    def _settle_tokens(self, flight: Flight, result: StepResult, drawn: np.ndarray) -> np.ndarray:
        """Journal and emit the step's tokens; returns uint8[k] ends of the drawn rows."""
        run, mirror = self.scheduler.running, self.scheduler.mirror
        rows, tokens = flight.plan.rows, result.tokens
        if not drawn.all():
            rows, tokens = rows[drawn], tokens[drawn]
        # Unsigned, so that a negative id is too large as well.
        if int(tokens.view(np.uint32).max()) >= self.limits.vocab_size:
            raise WorkerFault(f"step {flight.plan.step}: a token is outside the vocabulary")
        emitted = run.emitted[rows] + 1
        run.emitted[rows] = emitted
        ends = np.zeros(rows.size, np.uint8)
        ends[run.prompt[rows] + emitted >= run.limit[rows]] = _LENGTH
        width = int(run.stop_len[rows].max())
        if width:
            hit = mirror.stop_ids[rows, :width] == tokens[:, None]
            ends[hit.any(axis=1)] = _STOP
        ids = run.ids[rows]
        self.tokens_generated += rows.size
        if not self.journal.tokens(self._wall_ns(), ids, tokens):
            self._compact()
            # The compaction wrote `emitted` tokens of each row, these among them.
        for at in ends.nonzero()[0].tolist():
            # Before output: a client that saw the end must find it in the journal.
            self._journal_end(int(ids[at]), int(ends[at]), int(emitted[at]))
        self._emit(flight, result, drawn, rows, ids, emitted - 1, tokens, ends)
        return ends

    def _journal_end(self, request: int, end: int, tokens: int) -> None:
        if not self.journal.end(request, end, tokens):
            self._compact()
            self.journal.end(request, end, tokens)

    def _emit(
        self,
        flight: Flight,
        result: StepResult,
        drawn: np.ndarray,
        rows: np.ndarray,
        ids: np.ndarray,
        indexes: np.ndarray,
        tokens: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """One TokenBatch to each api process with rows in the step."""
        run = self.scheduler.running
        step, top_k = flight.plan.step, result.top_k
        cached = run.cached[rows]
        logprobs = result.logprobs[drawn] if result.logprobs.size else result.logprobs
        top_ids = _rows_of(result.top_ids, top_k, drawn)
        top_logprobs = _rows_of(result.top_logprobs, top_k, drawn)
        apis = run.api[rows]
        for api in sorted(set(apis.tolist())):
            mine = apis == api if self.limits.api_processes > 1 else slice(None)
            if self.muted:
                mine = (apis == api) & [request not in self.muted for request in ids.tolist()]
                if not mine.any():
                    continue
            batch = TokenBatch(
                step=step,
                requests=ids[mine],
                indexes=indexes[mine],
                tokens=tokens[mine],
                ends=ends[mine],
                cached=cached[mine],
                top_k=top_k,
                logprobs=logprobs[mine] if logprobs.size else logprobs,
                top_ids=top_ids[mine].reshape(-1) if top_k else result.top_ids[:0],
                top_logprobs=top_logprobs[mine].reshape(-1) if top_k else result.top_logprobs[:0],
            )
            self.output.append((api, _TOKENS, batch.encode()))

    def _fail_rows(self, rows: np.ndarray) -> None:
        """NaN rows end alone; what they wrote is zeroed before anybody can own it (0 * NaN)."""
        run, scheduler = self.scheduler.running, self.scheduler
        for row in rows.tolist():
            request = run.requests[row]
            assert request is not None
            first = int(run.sealed_to[row])
            own = run.handles[row, first : int(run.pages_len[row])].copy()
            if own.size:
                self.ledger.acquire(own)
                scheduler.zeros.append(own)
            message = "the model's output for this request was not finite"
            self._ended(request, End.NOT_FINITE, message)

    def _want_seals(self, rows: np.ndarray, mirror: RowTable) -> None:
        complete = mirror.length[rows] // self.limits.page_tokens
        due = complete > self.scheduler.running.sealed_to[rows]
        if due.any():
            self.scheduler.want_seals(rows[due], complete[due])

    def _book_seals(self, flight: Flight, result: StepResult) -> None:
        """The sums of the plan's seals are in: pages become sealed, shared, and followers go."""
        if not flight.seals:
            return
        self.ledger.seal(flight.plan.seals, result.seal_sums)
        share, size = self.ledger.share, 4 * self.limits.page_tokens
        for batch in flight.seals:
            for at, (handle, chain) in enumerate(
                zip(batch.handles.tolist(), batch.chains, strict=True)
            ):
                assert chain is not None
                chain.pages += 1
                if chain.parent is not None:
                    tokens = batch.tokens[at * size : at * size + size]
                    chain.parent = share(handle, chain.parent, tokens)
                    if chain.parent != handle and chain.parent is not None:
                        self._borrow(chain, chain.parent)
                if chain.request.followers and chain.pages >= chain.waits:
                    self.scheduler.release_followers(chain.request)
        self.ledger.release(flight.plan.seals, flight.plan.step)

    def _borrow(self, chain: Chain, handle: int) -> None:
        """Lease the page that stands for an equal one of this row, as long as the row lasts."""
        handles = np.array([handle], np.uint64)
        self.ledger.acquire(handles)
        if self.scheduler.running.chains[chain.request.row] is chain:
            chain.borrowed.append(handle)
        else:
            self.ledger.release(handles, self.scheduler.step)


def _check_shapes(flight: Flight, result: StepResult) -> None:
    n, seals = flight.plan.rows.size, flight.plan.seals.size
    sizes = (result.tokens.size, result.faults.size, result.seal_sums.size)
    if sizes != (n, n, seals):
        raise WorkerFault(f"step {result.step}: result sizes {sizes}, not {(n, n, seals)}")
    top = n * result.top_k
    if (result.top_ids.size, result.top_logprobs.size) != (top, top):
        raise WorkerFault(f"step {result.step}: {result.top_ids.size} top ids, not {top}")
    if result.logprobs.size not in (0, n):
        raise WorkerFault(f"step {result.step}: {result.logprobs.size} logprobs, not {n}")


def _rows_of(values: np.ndarray, width: int, chosen: np.ndarray) -> np.ndarray:
    """[chosen.sum(), width] of row-major values [n * width]."""
    return values.reshape(-1, width)[chosen] if width else values
