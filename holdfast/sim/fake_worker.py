"""A device of integers: its next token is a hash of the history it can see through its own rows
and pages, so a wrong page table, a stale row or a page of somebody else gives a wrong token.

A page's "KV" of one token is one uint64 a layer group. With full attention it is a hash of (token,
position); in a group with a window it also takes in the farthest cell that its token can see, so
that a page dropped one step too early shows, whatever the chunking. A token is drawn by reading the
cells in sight of the last position through the page tables and reducing them to the vocabulary.
`expected_token` computes the same from a request's true history; the two agree if and only if the
device saw what the brain meant it to see. Nothing is checked on the way: like a real device this
one reads the trash page, or somebody else's, without a word.

Draft tokens come from an oracle that is wrong as often as the row's owner says; what a wrong one
leaves in the pages is there for whoever reads too far.

Runs wire.rows and wire.checksum as they are. Used by tests, the simulator and `bench core`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from holdfast.config import Limits
from holdfast.errors import WorkerFault
from holdfast.sim.fake_graphs import Capture, FakeGraphs, FirstSeen, StagedRows
from holdfast.sim.rot import Cell, Rot
from holdfast.wire.checksum import page_sums, weights
from holdfast.wire.plan import (
    ROW_NOT_FINITE,
    StepPlan,
    StepResult,
    handle_groups,
    handle_pages,
)
from holdfast.wire.rows import RowTable, mix

# A cell that is not finite. Attention multiplies what it masks by zero, and 0 * NaN is NaN: a page
# with such a cell in it spoils whoever reads the page, be the cell in sight or not.
NOT_FINITE = np.uint64(0x7FF8_DEAD_BEEF_0001)
# How many of a hundred drafts are right, by the row's owner.
_DRAFTS_RIGHT = (0, 50, 90, 100)


def cells_of(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64[k]: what a page holds for these tokens at these positions, with full attention."""
    return mix(positions.astype(np.int64) + 1, tokens.astype(np.int64) + 1)


def _window_cells(cells: np.ndarray, group: int, seen: np.ndarray) -> np.ndarray:
    """What a page of a window group holds instead: `seen` uint64[k] are the farthest cells."""
    return cells + mix(group, seen)


def _fold(cells: np.ndarray, first: int) -> int:
    """Sum, below 2**64, of a history of cells uint64[k], the first of them at position `first`."""
    order = np.arange(first, first + cells.size, dtype=np.int64)
    return int(mix(order, cells).sum(dtype=np.uint64))


def _token_of(total: int, vocab_size: int, seed: int) -> int:
    return ((total % (1 << 64) >> 7) + seed) % vocab_size


def expected_token(
    history: np.ndarray, vocab_size: int, seed: int = 0, windows: tuple[int, ...] = (0,)
) -> int:
    """The oracle: the token after a true history int32[k]; `seed` unless it is drawn greedily."""
    length = history.size
    base = cells_of(history, np.arange(length))
    total = _fold(base, 0)
    for group, window in enumerate(windows[1:], start=1):
        cells, far = base.copy(), window - 1
        if far == 0:
            cells = _window_cells(base, group, np.zeros(length, np.uint64))
        for first in range(0, length, max(1, far)) if far else ():
            last = min(length, first + far)
            seen = np.zeros(last - first, np.uint64)
            if first >= far:
                seen = cells[first - far : last - far]
            cells[first:last] = _window_cells(base[first:last], group, seen)
        start = max(0, length - window)
        total += _fold(cells[start:], start)
    return _token_of(total, vocab_size, seed)


def expected_logprob(token: int) -> float:
    """The oracle: the logprob that the device says of a drawn token; exact in float32."""
    return -(token + 1) / 256


def expected_alternatives(token: int, count: int, vocab_size: int) -> list[tuple[int, float]]:
    """The oracle: (id, logprob) of the `count` likeliest tokens beside a drawn one."""
    return [((token + 1 + at) % vocab_size, -(token + 1) / 256 - 1 - at) for at in range(count)]


def memory_of(limits: Limits) -> list[np.ndarray]:
    """uint64[pages, page_tokens] for each layer group: pools of empty pages."""
    return [np.zeros((pages, limits.page_tokens), np.uint64) for pages in limits.pages_by_group]


class FakeWorker:
    """Executes plans in the order that wire.plan states. One instance is one epoch's device.

    `pages`: memory that outlives it (memory_of), or None for memory of its own. `inherited`: graphs
    of the worker before (sim.fake_graphs). `rot`: told of what is read of rotten cells.
    """

    def __init__(
        self,
        limits: Limits,
        epoch: int = 1,
        pages: list[np.ndarray] | None = None,
        inherited: Iterable[Capture] = (),
        rot: Rot | None = None,
    ) -> None:
        self.limits = limits
        self.rot = rot
        # (place in the plan, position of the token, rotten cells in sight) of the last step's draws
        self.misread: list[tuple[int, int, set[Cell]]] = []
        self._place = 0
        self.epoch = epoch
        self.step = 0
        self.rows = RowTable(limits)
        # The keeper's memory: it outlives this worker, with whatever a zombie still writes to it.
        self.pages = memory_of(limits) if pages is None else pages
        self._weights = weights(limits.page_tokens * 2)
        # Captured for a little less than the longest context, so that its end is a boundary too.
        captured = limits.page_tokens * max(1, limits.table_columns - 1)
        self.graphs = FakeGraphs(
            limits,
            pool_epoch=epoch,
            windows=limits.windows,
            query_lens=(1, 1 + limits.draft_depth) if limits.draft_depth else (1,),
            inherited=inherited,
            context_tokens=captured,
        )

    def run(self, plan: StepPlan, spoil: int | None = None) -> StepResult:
        """Execute one plan; `spoil`: the plan row whose last token's KV is not finite.

        Raises WorkerFault on a plan that is out of order or reaches outside the rows' pages."""
        if (plan.epoch, plan.step) != (self.epoch, self.step + 1):
            raise WorkerFault(f"plan {plan.epoch}:{plan.step} after {self.epoch}:{self.step}")
        self.step = plan.step
        rows = self.rows
        rows.apply(plan)
        digest = rows.digest_full(plan)
        self._zero(plan.zeros)
        self.misread = []
        if self.rot is not None:
            mine = plan.seals[handle_groups(plan.seals) == 0]
            self.rot.summed((plan.epoch, plan.step), handle_pages(mine).tolist())
        sums = self.sums(plan.seals)
        tokens, accepted, faults = self._forward(plan, spoil)
        rows.advance(plan, tokens, accepted)
        result = StepResult(
            epoch=plan.epoch,
            step=plan.step,
            digest=digest,
            tokens=tokens,
            faults=faults,
            accepted=accepted,
            seal_sums=sums,
        )
        wanted = rows.records["top_logprobs"][plan.rows]
        if np.count_nonzero(wanted >= 0):
            self._put_logprobs(result, int(wanted.max()))
        return result

    def _put_logprobs(self, result: StepResult, top_k: int) -> None:
        """What `expected_logprob` and `expected_alternatives` say, for all rows of the step."""
        tokens, others = result.tokens[:, None], np.arange(top_k)
        logprobs = -(tokens + 1) / 256
        result.logprobs = logprobs[:, 0].astype(np.float32)
        result.top_k = top_k
        result.top_ids = ((tokens + 1 + others) % self.limits.vocab_size).astype(np.int32).ravel()
        result.top_logprobs = (logprobs - 1 - others).astype(np.float32).ravel()

    def _zero(self, handles: np.ndarray) -> None:
        groups = handle_groups(handles)
        for group, pages in enumerate(self.pages):
            pages[handle_pages(handles[groups == group])] = 0

    def sums(self, handles: np.ndarray) -> np.ndarray:
        """uint64[k] checksums of the pages of uint64[k] handles, as they are now."""
        sums = np.zeros(handles.size, np.uint64)
        groups = handle_groups(handles)
        for group, pages in enumerate(self.pages):
            mine = groups == group
            held = pages[handle_pages(handles[mine])]
            sums[mine] = page_sums(held.view(np.uint32), self._weights)
        return sums

    def _forward(
        self, plan: StepPlan, spoil: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (tokens int32[plan.slots], accepted uint8[n] or [0], faults uint8[n]), by a graph
        where one is admitted."""
        tokens, accepted, faults = self.graphs.run(
            plan,
            self.rows,
            lambda step, rows, first_seen: self._compute(step, rows, first_seen, spoil),
            drafts=plan.drafts,
            moves_bytes=plan.zeros.size > 0,
        )
        return tokens, accepted, faults

    def _compute(
        self,
        plan: StepPlan,
        rows: RowTable | StagedRows,
        first_seen: FirstSeen,
        spoil: int | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_forward` returns. Reads nothing of the rows but `rows`."""
        known_lens, drafts = plan.known_lens, plan.drafts
        self._write(rows, *rows.inputs(plan.rows, known_lens))
        tokens = np.zeros(plan.slots, np.int32)
        accepted = np.zeros(drafts.size, np.uint8)
        faults = np.zeros(plan.rows.size, np.uint8)
        lengths = (rows.length[plan.rows] + known_lens).tolist()
        if spoil is not None:
            self._spoil(rows, int(plan.rows[spoil]), lengths[spoil])
        slot = 0
        for at, (row, length) in enumerate(zip(plan.rows.tolist(), lengths, strict=True)):
            count = int(drafts[at]) if drafts.size else 0
            self._place = at
            drawn = len(self.misread)
            # Looked at in the middle of a prompt too, where nothing is drawn.
            said = self._say(rows, first_seen, row, length, count)
            if not plan.samples[at]:
                del self.misread[drawn:]
            if said is None:
                faults[at] = ROW_NOT_FINITE
            elif plan.samples[at]:
                tokens[slot : slot + len(said)] = said
                if drafts.size:
                    accepted[at] = len(said) - 1
            slot += 1 + count
        return tokens, accepted, faults

    def _spoil(self, rows: RowTable | StagedRows, row: int, length: int) -> None:
        size = self.limits.page_tokens
        for group, pages in enumerate(self.pages):
            page = rows.page_table[group, row, (length - 1) // size]
            pages[page, (length - 1) % size] = NOT_FINITE

    def _write(
        self,
        rows: RowTable | StagedRows,
        row: np.ndarray,
        position: np.ndarray,
        token: np.ndarray,
    ) -> None:
        """Append the KV of these query tokens, rows one after the other, positions rising."""
        size = self.limits.page_tokens
        base = cells_of(token, position)
        for group, window in enumerate(self.limits.windows):
            table, pages = rows.page_table[group], self.pages[group]
            page = table[row, position // size]
            if window == 0:
                pages[page, position % size] = base
                continue
            far = position - (window - 1)
            # A token may see one of its own chunk: in the order in which they become known.
            turn = np.zeros(row.size, np.int64)
            if window > 1 and row.size:
                turn = (position - rows.length[row]) // (window - 1)
            for this in range(int(turn.max(initial=0)) + 1):
                now = turn == this
                seen = np.zeros(int(np.count_nonzero(now)), np.uint64)
                past = far[now] >= 0
                if window > 1:
                    at, of = far[now][past], row[now][past]
                    seen[past] = pages[table[of, at // size], at % size]
                cells = _window_cells(base[now], group, seen)
                pages[page[now], position[now] % size] = cells

    def _draw(
        self, rows: RowTable | StagedRows, first_seen: FirstSeen, row: int, length: int
    ) -> int | None:
        """The token after the row's first `length` positions, as its page tables show them; None
        when what they show is not finite."""
        size, total = self.limits.page_tokens, 0
        for group in range(self.limits.groups):
            start = first_seen(group, length)
            column = start // size
            table = rows.page_table[group, row, column : -(-length // size)]
            if group == 0 and self.rot is not None and self.rot.cells:
                self._note_rot(table.tolist(), column, start, length)
            cells = self.pages[group][table].reshape(-1)
            if np.count_nonzero(cells == NOT_FINITE):
                return None
            cells = cells[start - column * size : length - column * size]
            total += _fold(cells, start)
        record = rows.records[row]
        seed = int(record["seed"]) if record["temperature"] > 0 else 0
        return _token_of(total, self.limits.vocab_size, seed)

    def _note_rot(self, table: list[int], column: int, start: int, length: int) -> None:
        """The token at `length` is drawn from positions `start` on, in these pages of group 0."""
        assert self.rot is not None
        size, seen = self.limits.page_tokens, set()
        for page, at in self.rot.among(table):
            places = [(column + k) * size + at for k, one in enumerate(table) if one == page]
            if any(start <= place < length for place in places):
                seen.add((page, at))
        if seen:
            self.misread.append((self._place, length, seen))

    def _say(
        self,
        rows: RowTable | StagedRows,
        first_seen: FirstSeen,
        row: int,
        length: int,
        drafts: int,
    ) -> list[int] | None:
        """The token drawn after `length` positions, and those behind drafts that were right. Every
        draft's KV is written. None when a draw is not finite."""
        owner = int(rows.records["owner"][row])
        drawn = self._draw(rows, first_seen, row, length)
        said = [drawn]
        right = True
        for position in range(length, length + drafts):
            if drawn is None:
                return None
            luck = int(mix(position, np.array([owner]))[0] >> np.uint64(40)) % 100
            hit = luck < _DRAFTS_RIGHT[owner % len(_DRAFTS_RIGHT)]
            draft = drawn if hit else (drawn + 1) % self.limits.vocab_size
            token = np.array([draft], np.int32)
            self._write(rows, np.array([row]), np.array([position]), token)
            right = right and draft == drawn
            drawn = self._draw(rows, first_seen, row, position + 1)
            if right:
                said.append(drawn)
        return None if drawn is None else said
