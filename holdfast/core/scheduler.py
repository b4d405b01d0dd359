"""The scheduler: what the next step does, and which pages it may write.

Continuous batching, one plan at a time. In a plan: first every row that needs one token computed
(decode), as far as pages go; then chunks of prompts that are under way, oldest first; then new
admissions. The token budget of a step is `limits.prefill_tokens`; decode rows come out of it first
and are never left out for a prompt (their floor), and a prompt under way gets at least one page's
worth of what is left (its floor), so neither starves the other.

When pages run short: cached pages are evicted (kv.ledger); rows that would need a page are left out
of the step while pages of ended requests are on their way back; then the youngest row of the lowest
priority is preempted and recomputed later; the last row that still cannot go on fails alone.

Owns nothing: reads and writes core.running's planned view, the ledger and the waiting queue.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from holdfast.config import Limits
from holdfast.core.admission import WaitingQueue
from holdfast.core.request import Phase, Request
from holdfast.core.running import Chain, RunningRows
from holdfast.errors import require
from holdfast.kv.ledger import Ledger
from holdfast.kv.tiers import Tiers
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan, handle_pages
from holdfast.wire.rows import RowTable

# A row gets its next page up to so many tokens before it needs it, together with a row that needs
# one now: page events then come every few steps for many rows, instead of every step for a few
# (64 rows: 4 pages a step, of which the array calls alone cost 40 us).
PAGE_AHEAD_TOKENS = 4

# A request waits so often for pages of slower tiers before it computes what is missing: from disk
# to host, from host to device, and as often again because they were evicted on the way.
LOADS_MAX = 4


@dataclass(slots=True)
class SealBatch:
    """Full pages whose checksums the device is asked for; each holds a lease of its own.

    handles: uint64[k]; tokens: the pages' ids, one page after the other; chains: k rows' chains.
    """

    handles: np.ndarray
    tokens: bytes
    chains: list[Chain | None]


@dataclass(slots=True)
class Flight:
    """A launched plan and what its result will be matched with. life: int64[n], of plan.rows."""

    plan: StepPlan
    life: np.ndarray
    seals: list[SealBatch]
    launched_s: float


@dataclass(slots=True)
class _Draft:
    """The parts of a plan while it is put together."""

    rows: list[np.ndarray] = field(default_factory=list)
    query_lens: list[np.ndarray] = field(default_factory=list)
    writes: list[np.ndarray] = field(default_factory=list)
    fresh: list[np.ndarray] = field(default_factory=list)
    admits: list[tuple] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    bias: list[tuple[int, float]] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    admit_tokens: int = 0

    def add(self, rows: np.ndarray, query_lens: np.ndarray) -> None:
        if rows.size:
            self.rows.append(rows)
            self.query_lens.append(query_lens)


class Scheduler:
    """`mirror` is read for the tokens of a row that is preempted; nothing else of it is used."""

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        waiting: WaitingQueue,
        running: RunningRows,
        mirror: RowTable,
        tag: bytes,
        tiers: Tiers | None = None,
    ) -> None:
        self.limits = limits
        self.ledger = ledger
        self.waiting = waiting
        self.running = running
        self.mirror = mirror
        self.tag = tag
        self.tiers = tiers
        self.step = 0  # last launched
        self._page_range = np.arange(limits.page_tokens)
        self._ones = np.ones(limits.rows_total, np.int32)
        self.preempted = 0
        self.starved: list[Request] = []  # cannot go on though nothing else holds pages
        self.clears: list[int] = []
        self.seals: list[SealBatch] = []
        self.zeros: list[np.ndarray] = []

    # --- the plan ---

    def plan(self, epoch: int, in_flight: int, now_s: float) -> Flight | None:
        """The next plan, or None when nothing can be launched now."""
        draft = self._fill()
        while not draft.rows and in_flight == 0 and not self._pending() and self._unblock():
            draft = self._fill()
        if not draft.rows and (in_flight or not self._pending()):
            return None
        return self._launch(draft, epoch, now_s)

    def _pending(self) -> bool:
        """Whether a plan without rows has something to do: leases come back with its result."""
        return bool(self.seals or self.zeros or (self.tiers and self.tiers.pending))

    def _fill(self) -> _Draft:
        draft = _Draft()
        decode = self._decode(draft)
        if decode == self.running.active and self.waiting.empty:
            return draft
        budget = max(self.limits.prefill_tokens - decode, self.limits.page_tokens)
        budget -= self._continue_prompts(draft, budget)
        if budget > 0:
            self._admit(draft, budget)
        return draft

    def _launch(self, draft: _Draft, epoch: int, now_s: float) -> Flight:
        run = self.running
        self.step += 1
        rows = _concat(draft.rows, np.int32)
        query_lens = _concat(draft.query_lens, np.int32)
        planned = run.planned[rows] + query_lens
        run.planned[rows] = planned
        total = run.total[rows]
        samples = planned == total
        run.total[rows] = total + samples
        for handles in draft.fresh:
            self.ledger.launch(handles)
        seals, self.seals = self.seals, []
        zeros, self.zeros = self.zeros, []
        clears, self.clears = self.clears, []
        plan = StepPlan(
            epoch=epoch,
            step=self.step,
            rows=rows,
            query_lens=query_lens,
            samples=samples.view(np.uint8),
        )
        if clears:
            plan.clears = np.array(clears, np.int32)
        if draft.writes:
            plan.page_writes = _concat(draft.writes, PAGE_WRITE)
        if seals:
            plan.seals = _concat([batch.handles for batch in seals], np.uint64)
        if zeros:
            plan.zeros = _concat(zeros, np.uint64)
        if self.tiers is not None and self.tiers.pending:
            plan.copies = self.tiers.take_copies(now_s)
        if draft.admits:
            plan.admits = np.array(draft.admits, ADMIT)
            plan.admit_tokens = _concat(draft.tokens, np.int32)
            plan.bias_ids = np.array([entry[0] for entry in draft.bias], np.int32)
            plan.bias_values = np.array([entry[1] for entry in draft.bias], np.float32)
            plan.stop_ids = np.array(draft.stop_ids, np.int32)
        return Flight(plan, run.life[rows], seals, now_s)

    # --- decode ---

    def _decode(self, draft: _Draft) -> int:
        """Rows whose last known token is all that is left to compute; returns how many go."""
        run = self.running
        while True:
            ready = (run.total - run.planned == 1) & (run.total < run.limit)
            rows = ready.nonzero()[0]
            needy = rows[run.planned[rows] >= run.capacity[rows]]
            short = needy.size - self.ledger.available()
            if short <= self.ledger.retiring or run.active <= 1:
                break
            if self.tiers is not None and short <= self.ledger.retiring + self.tiers.page_leases():
                break
            self.preempt(self._victim())
        if needy.size:
            soon = rows[
                (run.planned[rows] + PAGE_AHEAD_TOKENS >= run.capacity[rows])
                & (run.capacity[rows] < run.limit[rows])
            ]
            if soon.size <= self.ledger.available():
                needy = soon
            elif short > 0:
                # Pages are on their way back; until then the oldest of the highest priority go.
                keep = np.lexsort((run.order[needy], -run.priority[needy]))
                stalled = needy[keep[self.ledger.available() :]]
                needy = np.sort(needy[keep[: self.ledger.available()]])
                rows = rows[~np.isin(rows, stalled)]
            self._give_pages(draft, needy)
        draft.add(rows, self._ones[: rows.size])
        return rows.size

    def _give_pages(self, draft: _Draft, rows: np.ndarray) -> None:
        """One page for each of these rows; the caller knows that there are as many."""
        if rows.size == 0:
            return
        handles = self.ledger.reserve(rows.size)
        require(handles is not None, f"{rows.size} pages promised and not there")
        columns = self.running.append_pages(rows, handles)
        writes = np.zeros(rows.size, PAGE_WRITE)
        writes["row"] = rows
        writes["column"] = columns
        writes["page"] = handle_pages(handles)
        draft.writes.append(writes)
        draft.fresh.append(handles)

    # --- prompts ---

    def _continue_prompts(self, draft: _Draft, budget: int) -> int:
        """Next chunks of prompts under way, oldest first; returns the tokens they take."""
        run = self.running
        rows = (run.total - run.planned > 1).nonzero()[0]
        taken = 0
        for row in rows[np.argsort(run.order[rows])].tolist():
            if taken >= budget:
                break
            taken += self._chunk(draft, row, budget - taken)
        return taken

    def _chunk(self, draft: _Draft, row: int, budget: int) -> int:
        """One chunk of one row, as long as budget and pages allow; returns its tokens (maybe 0)."""
        run, page_tokens = self.running, self.limits.page_tokens
        planned, held = int(run.planned[row]), int(run.pages_len[row])
        room = (held + self.ledger.available()) * page_tokens - planned
        count = min(int(run.total[row]) - planned, budget, room)
        if count <= 0:
            return 0
        pages = self.limits.pages_for_tokens(planned + count) - held
        if pages > 0:
            handles = self.ledger.reserve(pages)
            require(handles is not None, f"{pages} pages promised and not there")
            run.handles[row, held : held + pages] = handles
            run.pages_len[row] = held + pages
            run.capacity[row] = (held + pages) * page_tokens
            draft.writes.append(_row_writes(row, held, handles))
            draft.fresh.append(handles)
        draft.add(np.array([row], np.int32), np.array([count], np.int32))
        return count

    def _admit(self, draft: _Draft, budget: int) -> None:
        """New rows from the waiting queue while rows, pages and budget last."""
        while budget > 0 and self.running.rows_free:
            request = self.waiting.peek()
            if request is None:
                return
            tokens = request.tokens
            if draft.admits and draft.admit_tokens + tokens.size > self.limits.plan_tokens:
                return
            root = self.ledger.index.root(_tag(self.tag, request.admission.tenant))
            # At least one token is computed, for there must be logits to draw from.
            hits = self.ledger.find(root, tokens, (tokens.size - 1) // self.limits.page_tokens)
            self.ledger.acquire(hits)
            # Room for the whole prompt and one page for each row that decodes beside it: fewer
            # preemptions than admitting to the last page.
            pages = self.limits.pages_for_tokens(tokens.size) - hits.size
            wanted = pages + self.running.active if self.running.active else 1
            if self.ledger.available() < wanted:
                self.ledger.release(hits, 0)
                return
            if self.tiers is not None and self._bring(request, root, hits):
                continue
            self.waiting.pop()
            parent = int(hits[-1]) if hits.size else root
            waits = request.prompt_len // self.limits.page_tokens
            chain = Chain(parent, hits.size, waits, request)
            if request.emitted == 0:
                request.cached_tokens = hits.size * self.limits.page_tokens
            row = self.running.enter(request, hits, chain)
            self._admit_record(draft, row, request, hits)
            if chain.pages >= chain.waits:
                self.release_followers(request)
            count = self._chunk(draft, row, budget)
            require(count > 0, f"row {row} was admitted without a token to compute")
            budget -= count

    def _bring(self, request: Request, root: int, hits: np.ndarray) -> bool:
        """Whether `request` now waits for pages of slower tiers, which go on where its `hits` end.

        There is room for its whole prompt, so what is loaded takes nothing from running rows.
        """
        tiers, size, tokens = self.tiers, self.limits.page_tokens, request.tokens
        assert tiers is not None
        missing = (tokens.size - 1) // size - hits.size
        if missing <= 0 or request.loads >= LOADS_MAX:
            return False
        parent = int(hits[-1]) if hits.size else root
        wanted = tokens[hits.size * size : (hits.size + missing) * size]
        if not tiers.bring(request, hits, parent, wanted, self.ledger.available() - 1):
            return False
        self.waiting.pop()
        request.load()
        return True

    def brought(self, waiters: list[Request]) -> None:
        """What these requests waited for is there, or is not coming: they are next in line."""
        assert self.tiers is not None
        for request in reversed(waiters):
            if request.phase is Phase.LOADING:
                request.loaded()
                self.waiting.push_front(request)
        self.zeros += self.tiers.spoiled
        self.tiers.spoiled.clear()

    def _admit_record(self, draft: _Draft, row: int, request: Request, hits: np.ndarray) -> None:
        admission, sampling = request.admission, request.admission.sampling
        draft.admits.append(
            (
                int(self.running.life[row]),
                admission.seed,
                row,
                hits.size * self.limits.page_tokens,
                request.tokens.size,
                request.prompt_len,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.top_k,
                request.prompt_len + sampling.min_tokens,
                sampling.top_logprobs,
                len(sampling.bias),
                len(sampling.stop_ids),
                0,
            )
        )
        draft.tokens.append(request.tokens)
        draft.admit_tokens += request.tokens.size
        draft.bias.extend(sampling.bias)
        draft.stop_ids.extend(sampling.stop_ids)
        if hits.size:
            draft.writes.append(_row_writes(row, 0, hits))

    # --- shortage ---

    def _unblock(self) -> bool:
        """Nothing is in flight and no row can go: make room, or fail the one that never will."""
        run = self.running
        if run.active == 0:
            return False
        if self.tiers is not None and self.tiers.page_leases():
            return False  # The acknowledgements of copies bring pages, and the next plan.
        if run.active > 1:
            self.preempt(self._victim())
            return True
        row = int(run.rows()[0])
        request, chain = run.requests[row], run.chains[row]
        assert request is not None and chain is not None
        if chain.borrowed:
            # It holds pages twice, its own and their shared twins. Admitted again it has one each.
            self.preempt(row)
            return True
        self.starved.append(request)
        return False

    def _victim(self) -> int:
        """The youngest row of the lowest priority."""
        rows = self.running.rows()
        first = np.lexsort((-self.running.order[rows], self.running.priority[rows]))[0]
        return int(rows[first])

    def preempt(self, row: int) -> None:
        """Back to the front of the queue; its pages go once every launched step is over."""
        run = self.running
        request = run.requests[row]
        assert request is not None
        known = request.prompt_len + int(run.emitted[row])
        tokens = request.tokens
        if known > tokens.size:
            tokens = self.mirror.tokens[row, :known].copy()
        request.preempt(tokens)
        self.drop_row(row)
        self.waiting.push_front(request)
        self.release_followers(request)
        self.preempted += 1

    def drop_row(self, row: int) -> None:
        """A row's request leaves: its leases go once every launched step is over."""
        chain = self.running.chains[row]
        assert chain is not None
        chain.left_at = self.step
        self.ledger.release(self.running.leave(row), self.step)
        self.clears.append(row)

    def release_followers(self, request: Request) -> None:
        """Let the other choices of this prompt compete for rows."""
        for follower in request.followers:
            if follower.phase is Phase.WAITING:
                self.waiting.push(follower)
        request.followers = []

    def want_seals(self, rows: np.ndarray, complete: np.ndarray) -> None:
        """Ask for the checksums of these rows' pages up to column `complete`, all committed.

        rows, complete: integers of shape [k], rows distinct, complete above the rows' sealed_to.
        """
        run, page_tokens = self.running, self.limits.page_tokens
        first = run.sealed_to[rows]
        counts = complete - first
        row, column = rows, first
        if int(counts.max()) > 1:
            row = np.repeat(rows, counts)
            within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
            column = np.repeat(first, counts) + within
        handles = run.handles[row, column]
        self.ledger.acquire(handles)
        at = column[:, None] * page_tokens + self._page_range
        tokens = self.mirror.tokens[row[:, None], at].tobytes()
        run.sealed_to[rows] = complete
        run.seal_at[rows] = (complete + 1) * page_tokens
        chains = [run.chains[row_id] for row_id in row.tolist()]
        self.seals.append(SealBatch(handles, tokens, chains))

    def restart(self, running: RunningRows, mirror: RowTable) -> None:
        """A new epoch: nothing that was asked of the old device counts. Steps number from 1."""
        self.running, self.mirror = running, mirror
        self.step = 0
        self.clears, self.seals, self.zeros = [], [], []


def _row_writes(row: int, column: int, handles: np.ndarray) -> np.ndarray:
    writes = np.zeros(handles.size, PAGE_WRITE)
    writes["row"] = row
    writes["column"] = np.arange(column, column + handles.size)
    writes["page"] = handle_pages(handles)
    return writes


def _tag(tag: bytes, tenant: str) -> bytes:
    """Pages are shared within a tenant only: a prefix hit must not tell one key of another's."""
    return tag + b"\0" + tenant.encode()


def _concat(parts: list[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    if len(parts) == 1:
        return parts[0].astype(dtype, copy=False)
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
