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
from holdfast.core.flight import Flight, SealBatch
from holdfast.core.journal import Journal
from holdfast.core.replies import Output
from holdfast.core.request import Request
from holdfast.core.running import Chain
from holdfast.core.scheduler import Scheduler
from holdfast.errors import WorkerFault
from holdfast.kv.ledger import Ledger
from holdfast.wire.messages import End, TokenBatch
from holdfast.wire.plan import ROW_OK, StepPlan, StepResult, handle_groups
from holdfast.wire.rows import drawn_slots

# Decode pages are sealed this many together, or every so many steps, whichever comes first. What is
# not sealed is recomputed after a fault, so the steps stay few.
SEAL_TOGETHER = 32
SEAL_EVERY_STEPS = 4

# Plain integers: reading a member of an IntEnum costs a microsecond in Python 3.11.
_STOP, _LENGTH = int(End.STOP), int(End.LENGTH)


class Commit:
    """`ended(request, end, message)` books a request's end; `compact()` makes journal room;
    `checked(flight, sums)` takes uint64 sums of flight.checks, and may take rows away."""

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        journal: Journal,
        scheduler: Scheduler,
        *,
        checked: Callable[[Flight, np.ndarray], None],
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
        self._checked = checked
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
        if flight.checks.size:
            # Before any token: one that was drawn from a page that has changed is none.
            self._checked(flight, result.seal_sums[flight.sealed.size :])
        mirror.advance(plan, result.tokens, result.accepted)
        rows, n = flight.rows, flight.rows.size
        live = run.life[rows] == flight.life
        if plan.drafts.size:
            self._roll_back(plan, result, rows, live)
        # Nearly every step is whole: nobody left meanwhile, nobody failed, everybody drew a token.
        whole = np.count_nonzero(live) == n and not np.count_nonzero(result.faults)
        drawn = None
        if not whole or np.count_nonzero(plan.samples) != n:
            faulty = live & (result.faults != ROW_OK)
            drawn = live & (plan.samples != 0) & ~faulty
            if np.count_nonzero(faulty):
                self._fail_rows(rows[faulty])
            gone = ~live & (result.faults != ROW_OK)
            if np.count_nonzero(gone):
                self._soil_rows(rows[gone])
            live &= ~faulty
        ends = self._settle_tokens(flight, result, drawn)
        self._want_seals(plan, rows if whole else rows[live], now=bool(ends))
        for request, end in ends:
            self._ended(request, end, "")
        self.ledger.acknowledge(plan.step)
        if flight.seals:
            self._book_seals(flight, result)
        if flight.zeros:
            self._release_groups(plan.zeros[: flight.zeros], plan.step)

    def _roll_back(
        self, plan: StepPlan, result: StepResult, rows: np.ndarray, live: np.ndarray
    ) -> None:
        """Take back what was planned as if every draft were right. Their pages stay the row's own:
        what the rejected ones left there lies behind its last token and is written over."""
        run, policy = self.scheduler.running, self.scheduler.drafts
        assert policy is not None
        rows, drafts, accepted = rows[live], plan.drafts[live], result.accepted[live]
        rejected = (drafts - accepted).astype(np.int32)
        run.planned[rows] -= rejected
        run.total[rows] -= rejected
        policy.learn(rows, drafts, accepted)

    def _settle_tokens(
        self, flight: Flight, result: StepResult, drawn: np.ndarray | None
    ) -> list[tuple[Request, End]]:
        """Journal and emit the tokens of the `drawn` rows (None = all); returns who ends."""
        run, mirror = self.scheduler.running, self.scheduler.mirror
        plan, slots = flight.plan, drawn
        rows, tokens, within = flight.rows, result.tokens, None
        if plan.drafts.size:
            drawn = plan.samples != 0 if drawn is None else drawn
            slots = drawn_slots(plan.drafts, drawn, result.accepted)
            counts = result.accepted[drawn].astype(np.int32) + 1
            rows, tokens = np.repeat(rows[drawn], counts), tokens[slots]
            within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        elif slots is not None:
            rows, tokens = rows[slots], tokens[slots]
        if rows.size == 0:
            return []
        # Unsigned, so that a negative id is too large as well.
        if np.count_nonzero(tokens.view(np.uint32) >= self.limits.vocab_size):
            raise WorkerFault(f"step {plan.step}: a token is outside the vocabulary")
        indexes = run.emitted[rows]
        if within is not None:
            indexes = indexes + within.astype(np.int32)
        emitted = indexes + 1
        ends = (emitted >= run.output_limit[rows]).view(np.uint8) * _LENGTH
        if run.stop_width:
            hit = mirror.stop_ids[rows, : run.stop_width] == tokens[:, None]
            if np.count_nonzero(hit):
                ends[hit.any(axis=1)] = _STOP
        if within is not None and np.count_nonzero(ends):
            # Accepted behind a stop id: never said.
            kept = _until_end(within, ends)
            rows, tokens, ends, slots = rows[kept], tokens[kept], ends[kept], slots[kept]
            indexes, emitted = indexes[kept], emitted[kept]
        # A row with several tokens keeps the last of its numbers.
        run.emitted[rows] = emitted
        ids = run.ids[rows]
        self.tokens_generated += rows.size
        if not self.journal.tokens(self._wall_ns(), ids, tokens):
            self._compact()
            # The compaction wrote `emitted` tokens of each row, these among them.
        ending = []
        if np.count_nonzero(ends):
            for at in ends.nonzero()[0].tolist():
                # Before output: a client that saw the end must find it in the journal.
                self._journal_end(int(ids[at]), int(ends[at]), int(emitted[at]))
                request = run.requests[int(rows[at])]
                assert request is not None
                ending.append((request, End(int(ends[at]))))
        self._emit(flight, result, slots, rows, ids, indexes, tokens, ends)
        return ending

    def _journal_end(self, request: int, end: int, tokens: int) -> None:
        if not self.journal.end(request, end, tokens):
            self._compact()
            self.journal.end(request, end, tokens)

    def _emit(
        self,
        flight: Flight,
        result: StepResult,
        slots: np.ndarray | None,
        rows: np.ndarray,
        ids: np.ndarray,
        indexes: np.ndarray,
        tokens: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """One TokenBatch to each api process with rows in the step. slots: where the tokens stood
        in the result, a mask or indexes; None = all of it."""
        run = self.scheduler.running
        logprobs, top_k = result.logprobs, result.top_k
        top_ids, top_logprobs = result.top_ids, result.top_logprobs
        if slots is not None and logprobs.size:
            logprobs = logprobs[slots]
            if top_k:
                top_ids = top_ids.reshape(-1, top_k)[slots].reshape(-1)
                top_logprobs = top_logprobs.reshape(-1, top_k)[slots].reshape(-1)
        batch = TokenBatch(
            step=flight.plan.step,
            requests=ids,
            indexes=indexes,
            tokens=tokens,
            ends=ends,
            cached=run.cached[rows],
            top_k=top_k,
            logprobs=logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
        )
        if self.limits.api_processes == 1 and not self.muted:
            self.output.append((0, batch))
            return
        apis = run.api[rows]
        for api in sorted(set(apis.tolist())):
            mine = apis == api
            if self.muted:
                mine &= [request not in self.muted for request in ids.tolist()]
            if np.count_nonzero(mine):
                self.output.append((api, batch.of(mine)))

    def _fail_rows(self, rows: np.ndarray) -> None:
        """NaN rows end alone; what they wrote is zeroed before anybody can own it (0 * NaN)."""
        run, scheduler = self.scheduler.running, self.scheduler
        for row in rows.tolist():
            request = run.requests[row]
            assert request is not None
            last = int(run.pages_len[row])
            for group in range(self.limits.groups):
                first = max(int(run.sealed_to[row]), int(run.dropped[group, row]))
                own = run.handles[group, row, first:last].copy()
                if own.size:
                    self.ledger.acquire(own, group)
                    scheduler.zeros.append(own)
            message = "the model's output for this request was not finite"
            self._ended(request, End.NOT_FINITE, message)

    def _soil_rows(self, rows: np.ndarray) -> None:
        """Rows that were not finite, whose requests had left meanwhile: their pages retire already,
        and are zeroed when somebody gets them."""
        mirror = self.scheduler.mirror
        for group in range(self.limits.groups):
            self.ledger.soil(group, np.unique(mirror.page_table[group, rows]))

    def _want_seals(self, plan: StepPlan, rows: np.ndarray, *, now: bool) -> None:
        """Ask for the sums of these rows' pages that have become full.

        Pages of prompts and of rows that are about to leave (`now`) at once; pages that decode
        fills one by one are put together over a few steps, as their array calls cost the same.
        """
        length = self.scheduler.mirror.length[rows]
        due = length >= self.scheduler.running.seal_at[rows]
        count = np.count_nonzero(due)
        if count == 0:
            return
        wait = count < SEAL_TOGETHER and plan.step % SEAL_EVERY_STEPS and not now
        if wait and np.count_nonzero(plan.query_lens > 1) == 0:
            return
        self.scheduler.want_seals(rows[due], length[due] // self.limits.page_tokens)

    def _book_seals(self, flight: Flight, result: StepResult) -> None:
        """The sums of the plan's seals are in: pages become sealed, shared, and followers go."""
        sealed = flight.sealed
        self.ledger.seal(sealed, result.seal_sums[: sealed.size])
        share, size = self.ledger.share, 4 * self.limits.page_tokens
        windowed = self.limits.groups > 1
        tiers = self.scheduler.tiers
        for batch in flight.seals:
            if batch.group:
                self._share_beside(batch)
                continue
            for at, (handle, chain) in enumerate(
                zip(batch.handles.tolist(), batch.chains, strict=True)
            ):
                assert chain is not None
                chain.pages += 1
                if chain.parent is not None:
                    tokens = batch.tokens[at * size : at * size + size]
                    chain.parent = share(handle, chain.parent, tokens)
                    if tiers is not None and chain.parent == handle:
                        tiers.offer(handle, tokens)
                    if chain.parent != handle and chain.parent is not None:
                        self._borrow(chain, chain.parent, flight.plan.step)
                if windowed:
                    chain.stood.append(chain.parent)
                if chain.request.followers and chain.pages >= chain.waits:
                    self.scheduler.release_followers(chain.request)
            self.scheduler.booked(batch)
        self._release_groups(sealed, flight.plan.step)

    def _share_beside(self, batch: SealBatch) -> None:
        """Window pages go beside the pages of group 0 that stand for the same tokens."""
        columns, handles = batch.columns.tolist(), batch.handles.tolist()
        for column, handle, chain in zip(columns, handles, batch.chains, strict=True):
            assert chain is not None
            stands = chain.stood[column]
            if stands is not None:
                self.ledger.share_beside(stands, handle)

    def _release_groups(self, handles: np.ndarray, step: int) -> None:
        """Give up one lease on each of these handles, of whatever groups."""
        if self.limits.groups == 1:
            self.ledger.release(handles, step)
            return
        groups = handle_groups(handles)
        for group in range(self.limits.groups):
            self.ledger.release(handles[groups == group], step, group)

    def _borrow(self, chain: Chain, handle: int, step: int) -> None:
        """Lease the page that stands for an equal one of this row as long as the row's own leases
        last: a leased page must not hang below an unleased one, nor the other way round."""
        handles = np.array([handle], np.uint64)
        if chain.left_at == 0:
            self.ledger.acquire(handles)
            chain.borrowed.append(handle)
        elif chain.left_at > step:
            self.ledger.acquire(handles)
            self.ledger.release(handles, chain.left_at)


def _check_shapes(flight: Flight, result: StepResult) -> None:
    n, seals = flight.plan.rows.size, flight.plan.seals.size
    slots, drafts = flight.plan.slots, flight.plan.drafts
    sizes = (result.tokens.size, result.faults.size, result.accepted.size, result.seal_sums.size)
    wanted = (slots, n, drafts.size, seals)
    if sizes != wanted:
        raise WorkerFault(f"step {result.step}: result sizes {sizes}, not {wanted}")
    if drafts.size and np.count_nonzero(result.accepted > drafts):
        raise WorkerFault(f"step {result.step}: more drafts accepted than there were")
    top = slots * result.top_k
    if (result.top_ids.size, result.top_logprobs.size) != (top, top):
        raise WorkerFault(f"step {result.step}: {result.top_ids.size} top ids, not {top}")
    if result.logprobs.size not in (0, slots):
        raise WorkerFault(f"step {result.step}: {result.logprobs.size} logprobs, not {slots}")


def _until_end(within: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool[t]: tokens up to each row's first end. within: a token's place among its row's own."""
    over = np.cumsum(ends != 0)
    before = over - (ends != 0)  # ends among the tokens before, of all rows
    first = np.flatnonzero(within == 0)
    counts = np.diff(first, append=within.size)
    return before == np.repeat(before[first], counts)
