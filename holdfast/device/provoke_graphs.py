"""What a drill breaks around graphs, and the watch it keeps over pages. Only with `--drills`.

Each kind makes what a graph must not meet: a buffer that lies elsewhere than it was captured, an
envelope that is too short, row state that is not of the step, a store where no row of the step
writes. It reaches into the runner's graphs and rows, since nobody else may do this to them, and
`mend-graphs` puts all of it back. On a CPU, where a replay is the work itself (device.capture
Rerun), a moved buffer is also made to be baked in, as a graph has it, so that whoever replays
there reads what is old. Called by device.provoke from the worker's thread, with no step in flight.

    canary               from here on: pages that nobody ever wrote, and the trash page, hold a
                         canary, and no page may change but those that the rows of a step write, and
                         the trash page. Says `canary-step` once for each number of rows that decode
    stray-store          a store into a page of nobody, as of a padding row
    move-buffer          the static buffers lie elsewhere
    move-buffer-unseen   and the address manifest says that it is well
    narrow-envelope      the graphs' page tables are said to have one page less
    stale-rows           the device's row table is of one step before
    stale-rows-unseen    and the digest is of the right one
    mend-graphs          as it was captured
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from holdfast.device.batch import HostRows
from holdfast.device.buckets import Bucket
from holdfast.device.capture import Work
from holdfast.device.graphs import StepGraphs
from holdfast.device.runner import Runner
from holdfast.errors import require
from holdfast.wire.envelope import Envelope, Graphs
from holdfast.wire.plan import StepPlan, handle_pages

KINDS = (
    "canary",
    "stray-store",
    "move-buffer",
    "move-buffer-unseen",
    "narrow-envelope",
    "stale-rows",
    "stale-rows-unseen",
    "mend-graphs",
)
# Needs the pages that a step has written.
LATE = ("stray-store",)
# 12.08 in float32, 12.06 in bfloat16: finite, as a page must be, and loud where it is attended to.
CANARY = 0x41414141
_STRAY = 0x3F3F3F3F
# Pages named in one message.
_NAMED = 8
# Fields of a bucket that are views of the rows' results and stay where they are.
_RESULTS = ("drawn", "finite")

Say = Callable[[dict[str, Any]], None]


class GraphProvocations:
    """`say` sends a control message."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._was: tuple[Bucket, Graphs, dict[int, Work], dict[int, Work]] | None = None
        self._watch: _Canary | None = None

    @torch.inference_mode()
    def fire(self, kind: str, runner: Runner, plan: StepPlan) -> None:
        """One of KINDS, now."""
        if kind == "canary":
            self._watch = _Canary(runner, self._say)
        elif kind == "stray-store":
            _stray(runner)
        elif kind.startswith("stale-rows"):
            _step_back(runner, plan, seen=kind == "stale-rows")
        elif kind == "mend-graphs":
            self._mend(runner)
        else:
            self._alter(kind, _graphs(runner), runner)

    @torch.inference_mode()
    def before(self, runner: Runner, plan: StepPlan) -> None:
        """Of every step, when orders have been fired."""
        if self._watch is not None:
            self._watch.before(runner, plan)

    @torch.inference_mode()
    def after(self, runner: Runner, plan: StepPlan) -> None:
        """Of every step, when orders have been fired."""
        if self._watch is not None:
            self._watch.after(runner, plan)

    def _alter(self, kind: str, graphs: StepGraphs, runner: Runner) -> None:
        if self._was is None:
            bodies, tails = dict(graphs._bodies), dict(graphs._tails)
            self._was = (runner.rows._buckets, graphs._graphs, bodies, tails)
        if kind == "narrow-envelope":
            page = runner.limits.page_tokens
            short = [e._replace(context_tokens=e.context_tokens - page) for e in _all(graphs)]
            graphs._graphs = Graphs(short, runner.limits.windows)
            return
        _move(runner.rows, graphs)
        if kind == "move-buffer-unseen":
            now = [e._replace(footing=graphs.footing) for e in _all(graphs)]
            graphs._graphs = Graphs(now, runner.limits.windows)

    def _mend(self, runner: Runner) -> None:
        self._watch = None
        if self._was is None:
            return
        graphs, (bucket, envelopes, bodies, tails) = _graphs(runner), self._was
        for field in fields(Bucket):
            # What a bucket keeps from step to step (widths of its tables) went on elsewhere.
            getattr(bucket, field.name).copy_(getattr(runner.rows._buckets, field.name))
        runner.rows._buckets, graphs._graphs = bucket, envelopes
        graphs._bodies, graphs._tails = bodies, tails
        self._was = None


class _Canary:
    """Looks before and after one step of each number of rows, since it reads the pool each time and
    a server has others to do; what steps between wrote is known, so that nothing else goes unseen.
    """

    def __init__(self, runner: Runner, say: Say) -> None:
        self._say = say
        self._checked: set[int] = set()
        self._words = runner.memory.page_words
        free = _free_pages(runner)
        self._words[free] = CANARY
        self._words[0] = CANARY
        self._free = free.numel()
        self._was = self._words.clone()
        self._written: set[int] = set()
        # Of the step that is looked at: what was found before it.
        self._found: set[int] | None = None

    def before(self, runner: Runner, plan: StepPlan) -> None:
        n = plan.rows.size
        decodes = n and np.count_nonzero(plan.query_lens == 1) == n
        if decodes and n not in self._checked:
            self._found = self._changed() - self._written
            self._written = set()

    def after(self, runner: Runner, plan: StepPlan) -> None:
        table, tokens = runner.rows.table, runner.limits.page_tokens
        own = set(handle_pages(plan.zeros).tolist())
        for row, count in zip(plan.rows.tolist(), plan.query_lens.tolist(), strict=True):
            end = int(table.length[row])  # The step has advanced it.
            columns = slice((end - count) // tokens, (end - 1) // tokens + 1)
            own.update(table.page_table[0, row, columns].tolist())
        if self._found is None:
            self._written |= own
            return
        stray = sorted(self._found | (self._changed() - own))
        self._found = None
        self._checked.add(plan.rows.size)
        self._say(
            {
                "type": "provoked",
                "kind": "canary-step",
                "at_s": time.monotonic(),
                "rows": plan.rows.size,
                "free": self._free,
                "stray": stray[:_NAMED],
            }
        )

    def _changed(self) -> set[int]:
        """Pages that changed since this was asked last, but the trash page."""
        changed = (self._words != self._was).any(dim=1).nonzero().view(-1)
        self._was.copy_(self._words)
        return set(changed.tolist()) - {0}


def _graphs(runner: Runner) -> StepGraphs:
    require(runner._graphs is not None, "this worker has no graphs to provoke")
    return runner._graphs


def _all(graphs: StepGraphs) -> list[Envelope]:
    kinds = graphs._graphs._by_kind.values()
    return [envelope for _, captured in kinds for envelope in captured]


def _free_pages(runner: Runner) -> torch.Tensor:
    """int64[k]: pages that no row holds and that nobody has written, but a canary before us. Which
    others are free the brain knows alone."""
    words, table = runner.memory.page_words, runner.rows.table
    first = words[:, :1]
    same = ((words == first) & ((first == 0) | (first == CANARY))).all(dim=1).cpu()
    same[0] = False
    same[torch.from_numpy(np.unique(table.page_table[0]).astype(np.int64))] = False
    return same.nonzero().view(-1).to(words.device)


def _stray(runner: Runner) -> None:
    """The highest page of nobody: what is free is handed out from below or was used before."""
    free = _free_pages(runner)
    require(free.numel() > 0, "no page is free that was never written")
    runner.memory.page_words[int(free[-1]), 0] = _STRAY


def _move(rows: Any, graphs: StepGraphs) -> None:
    """All static buffers that are not results, with what they hold. The old ones stay alive: a
    graph that is replayed must hit them and nobody else's memory."""
    old = rows._buckets
    moved = {f.name: getattr(old, f.name).clone() for f in fields(old) if f.name not in _RESULTS}
    rows._buckets = replace(old, **moved)
    if graphs._capture.bakes:
        return

    def baked(work: Work) -> Work:
        def replay() -> None:
            now, rows._buckets = rows._buckets, old
            try:
                work()
            finally:
                rows._buckets = now

        return replay

    graphs._bodies = {n: baked(work) for n, work in graphs._bodies.items()}
    graphs._tails = {n: baked(work) for n, work in graphs._tails.items()}


def _step_back(runner: Runner, plan: StepPlan, *, seen: bool) -> None:
    """In this step the rows that decode are as long as they were one step before. seen: when the
    digest is taken; else afterwards."""
    rows, decoding = runner.rows, plan.rows[(plan.query_lens == 1) & (plan.samples != 0)]
    right = rows.begin_digest

    def back() -> None:
        if isinstance(rows, HostRows):
            rows.table.length[decoding] -= 1
        else:
            rows.length[torch.from_numpy(decoding.astype(np.int64)).to(rows.length.device)] -= 1

    def begin_digest(plan: StepPlan) -> None:
        del rows.begin_digest
        if seen:
            back()
        right(plan)
        if not seen:
            back()

    rows.begin_digest = begin_digest
