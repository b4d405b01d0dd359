"""Random legal plans over small limits, for whoever keeps row state: the same for twins and graphs.

`Plans` holds a RowTable of its own as the judge: `step` gives the next plan with the judge's deltas
applied, `advance` moves the judge past it.
"""

from __future__ import annotations

import numpy as np

from holdfast.config import Limits
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan
from holdfast.wire.rows import RowTable


class Plans:
    def __init__(self, limits: Limits, seed: int) -> None:
        self.limits = limits
        self.judge = RowTable(limits)
        self.rng = np.random.default_rng(seed)
        self._step = 0
        self._owner = 0
        self._held: list[int] = []
        # Rows that decode again in the next steps, and in how many.
        self._again: tuple[list[int], int] = ([], 0)
        self._pages = {
            group: list(range(1, pages)) for group, pages in enumerate(limits.pages_by_group)
        }

    def chance(self, of: float) -> bool:
        return bool(self.rng.random() < of)

    def step(self, *, decode: bool | None = None) -> StepPlan:
        """The next plan; decode: every row has one query token; None: as it falls."""
        rng, judge = self.rng, self.judge
        self._step += 1
        again = self._runs_on(decode)
        decode = bool(again) or (self.chance(0.5) if decode is None else decode)
        clears = [row for row in self._held if self.chance(0.15) or self._full(row)]
        clears = [] if again else clears
        for row in clears:
            self._release(row)
        plan = StepPlan(epoch=1, step=self._step, clears=np.array(clears, np.int32))
        if not again:
            self._admit(plan)
        judge.apply(plan)
        running = [row for row in self._held if self.chance(0.8)]
        rng.shuffle(running)
        running = again or running
        rows, lens, samples = [], [], []
        for row in running:
            known = int(judge.records["tokens_len"][row]) - int(judge.length[row])
            count = 1 if decode else int(rng.integers(1, max(known, 1) + 1))
            rows.append(row)
            lens.append(count)
            samples.append(int(count >= known))
        plan.rows, plan.query_lens = np.array(rows, np.int32), np.array(lens, np.int32)
        plan.samples = np.array(samples, np.uint8)
        plan.page_writes = self._page_writes(rows, lens)
        extra = StepPlan(epoch=1, step=self._step, page_writes=plan.page_writes)
        judge.apply(extra)
        return StepPlan.decode(plan.encode())

    def _runs_on(self, decode: bool | None) -> list[int]:
        """Rows of a decode step that is the last one's next, as nearly all of a server's are; none
        for a step as it falls. Such a run begins with rows whose next token is drawn."""
        rows, left = self._again
        if left == 0 and decode is not False and self.chance(0.2):
            known = self.judge.records["tokens_len"] - self.judge.length
            rows = [row for row in self._held if known[row] <= 1 and self.chance(0.9)]
            left = int(self.rng.integers(3, 12))
        if decode is False or not rows or any(self._full(row) for row in self._held):
            left = 0
        self._again = rows, max(0, left - 1)
        return rows if left else []

    def tokens(self, plan: StepPlan) -> np.ndarray:
        """int32[n]: what the step draws, 0 where it draws nothing."""
        drawn = self.rng.integers(0, self.limits.vocab_size, plan.rows.size).astype(np.int32)
        return np.where(plan.samples != 0, drawn, 0).astype(np.int32)

    def advance(self, plan: StepPlan, tokens: np.ndarray) -> None:
        self.judge.advance(plan, tokens)

    def _full(self, row: int) -> bool:
        return int(self.judge.length[row]) + 1 >= self.limits.context_tokens

    def _release(self, row: int) -> None:
        self._held.remove(row)
        for group in range(self.limits.groups):
            held = self.judge.page_table[group, row]
            self._pages[group].extend(held[held != 0].tolist())

    def _admit(self, plan: StepPlan) -> None:
        """Rows that were free or are cleared by this very plan."""
        rng, limits = self.rng, self.limits
        records, tokens, bias, stops = [], [], [], []
        free = [row for row in range(1, limits.rows_total) if row not in self._held]
        rng.shuffle(free)
        for row in free:
            if not self.chance(0.4):
                continue
            record = np.zeros((), ADMIT)
            self._owner += 1
            known = int(rng.integers(1, limits.context_tokens - 1))
            record["owner"], record["row"] = self._owner, row
            record["seed"] = rng.integers(0, 1 << 64, dtype=np.uint64)
            record["tokens_len"] = record["prompt_len"] = known
            # What a prefix hit brings has pages of its own here: written with the first step.
            record["length"] = int(rng.integers(0, known)) if self.chance(0.3) else 0
            record["top_p"] = record["repetition_penalty"] = 1.0
            record["top_logprobs"] = -1
            record["temperature"] = rng.choice([0.0, 0.5, 1.0])
            record["bias_len"] = int(rng.integers(0, limits.bias_entries + 1))
            record["stop_len"] = int(rng.integers(0, limits.stop_ids + 1))
            record["stop_from"] = int(rng.integers(0, known + 2))
            tokens += rng.integers(0, limits.vocab_size, known).tolist()
            count = int(record["bias_len"])
            bias += rng.choice(limits.vocab_size, count, replace=False).tolist()
            stops += rng.integers(0, limits.vocab_size, int(record["stop_len"])).tolist()
            records.append(record)
            self._held.append(row)
        plan.admits = np.array(records, ADMIT)
        plan.admit_tokens = np.array(tokens, np.int32)
        plan.bias_ids = np.array(bias, np.int32)
        plan.bias_values = rng.standard_normal(len(bias)).astype(np.float32)
        plan.stop_ids = np.array(stops, np.int32)

    def _page_writes(self, rows: list[int], lens: list[int]) -> np.ndarray:
        """The pages that the rows lack for their query tokens; window groups drop what is behind
        their sight."""
        writes = []
        for row, count in zip(rows, lens, strict=True):
            begin = int(self.judge.length[row])
            for group, window in enumerate(self.limits.windows):
                table = self.judge.page_table[group, row]
                first = max(0, begin - window + 1) // self.limits.page_tokens if window else 0
                for column in range(self.limits.pages_for_tokens(begin + count)):
                    if column < first and table[column]:
                        self._pages[group].append(int(table[column]))
                        writes.append((group, row, column, 0))
                    elif column >= first and not table[column]:
                        at = int(self.rng.integers(len(self._pages[group])))
                        writes.append((group, row, column, self._pages[group].pop(at)))
        return np.array(writes, PAGE_WRITE)
