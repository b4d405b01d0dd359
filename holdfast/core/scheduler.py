"""The scheduler: what the next step does, and which pages it may write.

Continuous batching, one plan at a time. In a plan: first every row that needs one token computed
(decode, the longest first), as far as pages go; then chunks of prompts that are under way, oldest
first; then new admissions. The token budget of a step is `limits.prefill_tokens`; decode rows come
out of it first and are never left out for a prompt (their floor), and a prompt under way gets at
least one page's worth of what is left (its floor), so neither starves the other. A step with both
has `limits.mixed_tokens` at most, as every row that decodes waits for its chunk; of these prompts
get half at least. The bound is of all its tokens since a GPU multiplies in tiles of them: a power
of two fills whole waves of its SMs, and 256 rows more begin another. While few rows decode it is
down to a quarter: they gain little by long steps, and wait for them.

When pages run short: cached pages are evicted (kv.ledger); rows that would need a page are left out
of the step while pages of ended requests are on their way back; then the youngest row of the lowest
priority is preempted and recomputed later; the last row that still cannot go on fails alone.

Owns nothing: reads and writes core.running's planned view, the ledger and the waiting queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from holdfast.config import Limits
from holdfast.core.admission import WaitingQueue
from holdfast.core.checks import PageChecks
from holdfast.core.draft import DraftPolicy
from holdfast.core.flight import Flight, PlanParts, SealBatch, concat, spread
from holdfast.core.request import Phase, Request
from holdfast.core.running import Chain, RunningRows
from holdfast.core.windows import WindowDrops
from holdfast.errors import require
from holdfast.kv.ledger import Ledger
from holdfast.kv.tiers import Tiers
from holdfast.wire.plan import StepPlan
from holdfast.wire.rows import RowTable

# A row gets its next page up to so many tokens before it needs it, together with a row that needs
# one now: page events then come every few steps for many rows, instead of every step for a few
# (64 rows: 4 pages a step, of which the array calls alone cost 40 us).
PAGE_AHEAD_TOKENS = 4

# Tokens of a mixed step for each row that decodes in it, from a quarter of limits.mixed_tokens to
# all of it. Few streams do not gain by long steps and wait for them: Qwen3-8B at 64 streams gave
# 6,816 tok/s and a p99 of 17 ms between tokens with 512, 6,765 and 52 with 2,048. Many pay for
# short ones: at 256 streams 10,023 tok/s with 1,024, 10,347 with 2,048, 10,216 with 3,072 (H200).
MIXED_TOKENS_A_ROW = 8
_MIXED_LEAST = 4
_NOTHING = np.empty(0, np.uint64)

# A request waits so often for pages of slower tiers before it computes what is missing: from disk
# to host, from host to device, and as often again because they were evicted on the way.
LOADS_MAX = 4

# A request waits so many launched steps at most for a page of its prompt whose sum is on its way.
# Two plans may be in flight, and the last pages of a row come one plan after the ones before.
SEAL_WAIT_STEPS = 4
# Those behind it go meanwhile, past so many that wait: each is looked up again in every step.
SEAL_WAITERS_MAX = 16


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
        checks: PageChecks,
        tiers: Tiers | None = None,
    ) -> None:
        self.limits = limits
        self.ledger = ledger
        self.waiting = waiting
        self.running = running
        self.mirror = mirror
        self.tag = tag
        self.tiers = tiers
        self.checks = checks
        self.step = 0  # last launched
        self._page_range = np.arange(limits.page_tokens)
        self._ones = np.ones(limits.rows_total, np.int32)
        self.drafts = DraftPolicy(limits) if limits.draft_depth else None
        self.preempted = 0
        self.recomputed = 0  # tokens computed again after a fault
        self.alone: Request | None = None  # nobody else may have a row (core.quarantine)
        self.starved: list[Request] = []  # cannot go on though nothing else holds pages
        self.clears: list[int] = []
        self.seals: list[SealBatch] = []
        self._unbooked: deque[SealBatch] = deque()  # of group 0: in `seals` or in flight
        self.zeros: list[np.ndarray] = []
        self._windows = WindowDrops(limits, ledger) if limits.groups > 1 else None

    # --- the plan ---

    def plan(self, epoch: int, in_flight: int, now_s: float) -> Flight | None:
        """The next plan, or None when nothing can be launched now.

        After a worker's end no row is in a plan before all pages that were kept are verified.
        """
        if self.ledger.unverified:
            return self._verify(epoch, now_s)
        if self._windows is not None:
            self._windows.drop_unseen(self.running, self.mirror, self.step)
        parts = self._fill()
        while not parts.rows and in_flight == 0 and not self._pending() and self._unblock():
            parts = self._fill()
        if not parts.rows and (in_flight or not (self._pending() or self.checks.due_s() <= now_s)):
            return None
        checks = self.checks.take_scrub(now_s) if self.checks.pages_s else _NOTHING
        return self._launch(parts, epoch, now_s, checks)

    def _pending(self) -> bool:
        """Whether a plan without rows has something to do: leases come back with its result."""
        return bool(self.seals or self.zeros or (self.tiers and self.tiers.pending))

    def _verify(self, epoch: int, now_s: float) -> Flight | None:
        """A plan that only reads pages that were kept, while there are any to be asked for."""
        handles = self.checks.take_unverified()
        if handles.size == 0:
            return None
        return self._launch(PlanParts(), epoch, now_s, handles, verifies=True)

    def _fill(self) -> PlanParts:
        parts = PlanParts()
        rows = self._decode(parts)
        if rows == self.running.active and self.waiting.empty:
            return parts
        decode = rows if parts.drafts is None else rows + int(parts.drafts.sum())
        budget = self._prompt_budget(decode)
        budget -= self._continue_prompts(parts, budget)
        if budget > 0:
            self._admit(parts, budget)
        return parts

    def _prompt_budget(self, decode: int) -> int:
        """Prompt tokens of a step that computes `decode` tokens of other rows."""
        limits = self.limits
        budget = limits.prefill_tokens - decode
        if decode and 0 < limits.mixed_tokens < limits.prefill_tokens:
            mixed = limits.mixed_tokens
            bound = min(mixed, max(mixed // _MIXED_LEAST, MIXED_TOKENS_A_ROW * decode))
            budget = min(budget, max(bound - decode, bound // 2))
        return max(budget, limits.page_tokens)

    def _launch(
        self,
        parts: PlanParts,
        epoch: int,
        now_s: float,
        checks: np.ndarray,
        *,
        verifies: bool = False,
    ) -> Flight:
        run = self.running
        self.step += 1
        rows = concat(parts.rows, np.int64)
        query_lens = concat(parts.query_lens, np.int32)
        planned = run.planned[rows] + query_lens
        run.planned[rows] = planned
        total = run.total[rows]
        drafts = None
        if parts.drafts is not None:
            # As if all were right: an upper bound, which the result corrects (core.commit).
            drafts = np.zeros(rows.size, np.uint8)
            drafts[: parts.drafts.size] = parts.drafts
            total += drafts
        samples = planned == total
        run.total[rows] = total + samples
        seals, self.seals = self.seals, []
        zeros, self.zeros = self.zeros, []
        leased = sum(handles.size for handles in zeros) if zeros else 0
        for handles in parts.fresh:
            self.ledger.launch(handles)
            if (soiled := self.ledger.soiled(handles)).size:
                zeros.append(soiled)
        clears, self.clears = self.clears, []
        plan = StepPlan(
            epoch=epoch,
            step=self.step,
            rows=rows.astype(np.int32),
            query_lens=query_lens,
            samples=samples.view(np.uint8),
        )
        if drafts is not None:
            plan.drafts = drafts
        if clears:
            plan.clears = np.array(clears, np.int32)
        if self._windows is not None:
            parts.writes.extend(self._windows.take(run))
        parts.put_into(plan)
        if seals or checks.size:
            named = [batch.handles for batch in seals]
            if checks.size:
                named.append(checks)
                self.ledger.read(checks, self.step)
            plan.seals = concat(named, np.uint64)
        if zeros:
            plan.zeros = concat(zeros, np.uint64)
        if self.tiers is not None and self.tiers.pending:
            plan.copies = self.tiers.take_copies(now_s)
        return Flight(
            plan,
            rows,
            run.life[rows],
            run.ids[rows],
            seals,
            leased,
            now_s,
            planned,
            parts.prompts,
            checks,
            verifies,
        )

    # --- decode ---

    def _decode(self, parts: PlanParts) -> int:
        """Rows whose last known token is all that is left to compute; returns how many go."""
        run = self.running
        while True:
            ready = (run.total - run.planned == 1) & (run.total < run.limit)
            rows = ready.nonzero()[0]
            planned = run.planned[rows]
            needy = rows[planned >= run.capacity[rows]]
            if needy.size == 0:
                break
            short = needy.size - self.ledger.available()
            if short <= 0 or self.ledger.coming(needy.size) or run.active <= 1:
                break
            if self.tiers is not None and short <= self.ledger.retiring + self.tiers.page_leases():
                break
            self.preempt(self._victim())
        if needy.size:
            soon = rows[
                (planned + PAGE_AHEAD_TOKENS >= run.capacity[rows])
                & (run.capacity[rows] < run.limit[rows])
            ]
            if soon.size <= self.ledger.available():
                needy = soon
            elif short > 0:
                # Pages are on their way back; until then the oldest of the highest priority go.
                keep = np.lexsort((run.order[needy], -run.priority[needy]))
                stalled = needy[keep[self.ledger.available() :]]
                needy = np.sort(needy[keep[: self.ledger.available()]])
                go = ~np.isin(rows, stalled)
                rows, planned = rows[go], planned[go]
            self._give_pages(parts, needy)
        # Longest first: a device begins rows in this order, and what it ends with should be short.
        rows = rows[(-planned).argsort(kind="stable")]
        query_lens = self._ones[: rows.size]
        if self.drafts is not None and rows.size:
            depths = self._draft_depths(parts, rows)
            if np.count_nonzero(depths):
                parts.drafts = depths.astype(np.uint8)
                query_lens = query_lens + depths
        parts.compute(rows, query_lens)
        return rows.size

    def _draft_depths(self, parts: PlanParts, rows: np.ndarray) -> np.ndarray:
        """int32[k]: drafts of these decode rows, with pages reserved as if all were right.

        Nobody is preempted or left out for a draft: where pages are short, only those held count.
        """
        run, drafts = self.running, self.drafts
        assert drafts is not None
        spare = max(0, self.limits.prefill_tokens - rows.size)
        depths = drafts.depths(rows, self.step + 1, spare)
        np.minimum(depths, run.limit[rows] - run.total[rows] - 1, out=depths)
        room = run.capacity[rows] - run.planned[rows] - 1
        wanted = -((room - depths) // self.limits.page_tokens)
        needy = wanted > 0
        if np.count_nonzero(needy) == 0:
            return depths
        if int(wanted[needy].sum()) + run.active > self.ledger.available():
            return np.minimum(depths, room)
        self._give_pages(parts, np.repeat(rows[needy], wanted[needy]))
        return depths

    def _give_pages(self, parts: PlanParts, rows: np.ndarray) -> None:
        """One page for each of these rows, equal ones side by side; the caller knows that there are
        as many."""
        if rows.size == 0:
            return
        handles = self.ledger.reserve(rows.size)
        require(handles is not None, f"{rows.size} pages promised and not there")
        parts.own(rows, self.running.append_pages(rows, handles), handles)

    # --- prompts ---

    def _continue_prompts(self, parts: PlanParts, budget: int) -> int:
        """Next chunks of prompts under way, oldest first; returns the tokens they take."""
        run = self.running
        rows = (run.total - run.planned > 1).nonzero()[0]
        taken = 0
        for row in rows[np.argsort(run.order[rows])].tolist():
            if taken >= budget:
                break
            taken += self._chunk(parts, row, budget - taken)
        return taken

    def _chunk(self, parts: PlanParts, row: int, budget: int) -> int:
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
            run.handles[:, row, held : held + pages] = handles
            run.pages_len[row] = held + pages
            run.capacity[row] = (held + pages) * page_tokens
            parts.own(row, np.arange(held, held + pages), handles)
        parts.compute(np.array([row], np.int64), np.array([count], np.int32))
        parts.prompts += count
        return count

    def _admit(self, parts: PlanParts, budget: int) -> None:
        """New rows from the waiting queue while rows, pages and budget last."""
        waiters: list[Request] = []
        self._admit_past(waiters, parts, budget)
        for request in reversed(waiters):
            self.waiting.push_front(request)

    def _admit_past(self, waiters: list[Request], parts: PlanParts, budget: int) -> None:
        """`_admit`; those that wait for a sum are taken from the queue and put into `waiters`."""
        while budget > 0 and self.running.rows_free:
            request = self.waiting.peek() if self.alone is None else self._alone()
            if request is None:
                return
            tokens = request.tokens
            if parts.admits and parts.admit_tokens + tokens.size > self.limits.plan_tokens:
                return
            root = self.ledger.index.root(_tag(self.tag, request.admission.tenant))
            # At least one token is computed, for there must be logits to draw from.
            hits = self.ledger.find(root, tokens, (tokens.size - 1) // self.limits.page_tokens)
            if self._next_page_comes(request, root, hits[0]):
                self.waiting.pop(request)
                waiters.append(request)
                if len(waiters) == SEAL_WAITERS_MAX:
                    return
                continue
            for group, mine in enumerate(hits):
                self.ledger.acquire(mine, group)
            # Room for the whole prompt and one page for each row that decodes beside it: fewer
            # preemptions than admitting to the last page.
            if not self._has_room(self.limits.pages_for_tokens(tokens.size) - hits[0].size):
                for group, mine in enumerate(hits):
                    self.ledger.release(mine, 0, group)
                return
            if self.tiers is not None and self._bring(request, root, hits[0]):
                continue
            self.waiting.pop(request)
            shared = hits[0].tolist()
            waits = request.prompt_len // self.limits.page_tokens
            chain = Chain(shared[-1] if shared else root, len(shared), waits, request)
            if self.limits.groups > 1:
                chain.stood.extend(shared)
            if request.computed:
                again = request.computed - len(shared) * self.limits.page_tokens
                self.recomputed += max(0, again)
                request.computed = 0
            if request.emitted == 0:
                request.cached_tokens = len(shared) * self.limits.page_tokens
            row = self.running.enter(request, hits, chain)
            if self.drafts is not None:
                self.drafts.enter(row)
            parts.admit(int(self.running.life[row]), request, hits, self.limits.page_tokens)
            if chain.pages >= chain.waits:
                self.release_followers(request)
            count = self._chunk(parts, row, budget)
            require(count > 0, f"row {row} was admitted without a token to compute")
            budget -= count

    def _next_page_comes(self, request: Request, root: int, hits: np.ndarray) -> bool:
        """Whether the page behind `hits` is computed and only its sum is not in.

        Who asks the same again the moment an answer is there would else compute all of it again,
        as pages are shared when they are sealed and not before.
        """
        if not self._unbooked or request is self.alone:
            return False
        first, size = hits.size * self.limits.page_tokens, self.limits.page_tokens
        if request.tokens.size <= first + size:
            return False
        tokens = request.tokens[first : first + size].tobytes()
        parent = int(hits[-1]) if hits.size else root
        if not any(batch.begins(parent, hits.size, tokens) for batch in self._unbooked):
            return False
        if request.waits_from is None or request.waits_from > self.step:
            request.waits_from = self.step
        return self.step - request.waits_from < SEAL_WAIT_STEPS

    def booked(self, batch: SealBatch) -> None:
        """The sums of this batch of group 0, the oldest one, are in the ledger."""
        require(self._unbooked.popleft() is batch, "sums are booked in another order than asked")

    def _has_room(self, pages: int) -> bool:
        """Whether a request that needs `pages` more of group 0 may start beside those that run."""
        if self.running.active == 0:
            return self.ledger.available() >= 1
        for group, window in enumerate(self.limits.windows):
            wanted = min(pages, self.limits.window_need(window)) if window else pages
            if self.ledger.available_in(group) < wanted + self.running.active:
                return False
        return True

    def _alone(self) -> Request | None:
        """The request that must run alone, while it has no row."""
        request = self.alone
        return request if request is not None and request.phase is Phase.WAITING else None

    def isolate(self, request: Request, flights: Iterable[Flight]) -> bool:
        """Give up all other rows. False while a step of `flights` may still compute one of them."""
        self.alone = request
        for row in self.running.rows().tolist():
            if self.running.requests[row] is not request:
                self.preempt(row)
        return all(np.count_nonzero(flight.ids != request.id) == 0 for flight in flights)

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
        self.waiting.pop(request)
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

    def recompute(self, row: int) -> None:
        """Preempt a row because a fault has voided what was computed of it."""
        request = self.running.requests[row]
        assert request is not None
        if self.mirror.records["owner"][row] == self.running.life[row]:  # else not admitted yet
            request.computed = max(request.computed, int(self.mirror.length[row]))
        self.preempt(row)

    def drop_row(self, row: int) -> None:
        """A row's request leaves: its leases go once every launched step is over."""
        chain = self.running.chains[row]
        assert chain is not None
        chain.left_at = self.step
        for group, handles in enumerate(self.running.leave(row)):
            self.ledger.release(handles, self.step, group)
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
        row, column = spread(rows, first, complete)
        handles = run.handles[0, row, column]
        self.ledger.acquire(handles)
        at = column[:, None] * page_tokens + self._page_range
        tokens = self.mirror.tokens[row[:, None], at].tobytes()
        chains = [run.chains[row_id] for row_id in row.tolist()]
        heads = [0, *(complete - first).cumsum()[:-1].tolist()]
        batch = SealBatch(0, handles, column, tokens, chains, heads)
        self.seals.append(batch)
        self._unbooked.append(batch)
        for group in range(1, self.limits.groups):
            held = np.maximum(first, run.dropped[group, rows])
            row, column = spread(rows, held, np.maximum(held, complete))
            handles = run.handles[group, row, column]
            self.ledger.acquire(handles, group)
            chains = [run.chains[row_id] for row_id in row.tolist()]
            self.seals.append(SealBatch(group, handles, column, b"", chains))
        run.sealed_to[rows] = complete
        run.seal_at[rows] = (complete + 1) * page_tokens

    def restart(self, running: RunningRows, mirror: RowTable) -> None:
        """A new epoch: nothing that was asked of the old device counts. Steps number from 1."""
        self.running, self.mirror = running, mirror
        self.step = 0
        self.clears, self.seals, self.zeros = [], [], []
        self._unbooked.clear()
        if self._windows is not None:
            self._windows.forget()
        self.alone = None


def _tag(tag: bytes, tenant: str) -> bytes:
    """Pages are shared within a tenant only: a prefix hit must not tell one key of another's."""
    return tag + b"\0" + tenant.encode()
