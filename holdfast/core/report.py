"""FaultReports: what is told of a lost worker or a damaged page, as plain data of bounded size.

Evidence is taken the moment the worker is lost, while the supervisor fences it and the core has
nothing to launch; it is handed out once the next worker has answered, so that no report is ever in
the way of a recovery. Who writes it where is not known here (proc.fault_files, by the supervisor).

Invariant: a report holds no text, no key and, unless `tokens`, no token: ids of requests, the
stable names of tenants, lengths and places. It reads the brain and changes nothing in it.

    lost -> ended? -> renewed -> take          (proc.core makes it, core.loop calls it)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from holdfast.core.brain import Brain
from holdfast.core.flight import Flight
from holdfast.core.request import Phase, Request
from holdfast.kv.pages import PageState
from holdfast.wire.copies import LOAD, STORE
from holdfast.wire.envelope import bucket_of, buckets
from holdfast.wire.plan import StepPlan, handle_generations, handle_pages

FORMAT = "holdfast fault 1"
# Bounds of one report: its JSON stays below FRAME_BYTES_MAX of a control message (1 MiB). 10 plans
# of 64 rows are 30 KB, 256 requests 50 KB, 512 pages 60 KB, 32,768 tokens 200 KB.
ROWS_TOLD = 64
REQUESTS_TOLD = 256
PAGES_TOLD = 512
TOKENS_TOLD = 32_768
DETAIL_CHARS = 4000
# Workers that end faster than their reports leave: the oldest reports are dropped, and counted.
REPORTS_KEPT = 8
# A report does not wait longer than this for a worker that answers.
WAIT_S = 5.0

Report = dict[str, Any]


class FaultReports:
    """`tokens`: prompts and answers of the requests in flight are told too."""

    def __init__(
        self,
        brain: Brain,
        *,
        tokens: bool = False,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._brain = brain
        self._page_told: dict[str, Any] | None = None  # the last entry that was
        self._tokens = tokens
        self._wall_ns = wall_ns
        self._made: deque[Report] = deque()
        self._open: Report | None = None  # of the worker that was lost and has no follower yet
        self._lost_s = 0.0
        self._renewed_epoch: int | None = None
        self.dropped = 0

    def lost(self, epoch: int, detail: str, now_s: float, *, hung: bool = False) -> None:
        """The worker of `epoch` is no longer believed, for this reason. Called before the brain
        has the next one: 6 ms at 256 rows and ten plans."""
        self._close()
        self._lost_s = now_s
        self._open = self._evidence(epoch, detail, hung, now_s)

    def ended(self, detail: str, *, implicates: bool) -> None:
        """How its process ended, as the supervisor says, and whether it did so by itself."""
        if self._open is not None:
            self._open["ended"] = detail[:DETAIL_CHARS]
            self._open["implicates"] = implicates

    def renewed(self, epoch: int) -> None:
        """The brain has another worker, and has settled who is suspected."""
        report = self._open
        if report is None:
            return
        report["next_epoch"] = epoch
        quarantine = self._brain.quarantine
        report["alone"] = None if quarantine.alone is None else _hex(quarantine.alone)
        room = TOKENS_TOLD
        for told in report["requests"]:
            number = int(told["id"], 16)
            suspicion = quarantine.suspicion(number)
            if suspicion is not None:
                told["suspected_at"] = int(suspicion.position)
                told["faults_there"] = suspicion.faults
            request = self._brain.requests.get(number)
            told["ended"] = request is None
            if self._tokens and request is not None:
                # All wait now, and one that waits has all of its tokens.
                told["token_ids"] = request.tokens[-room:].tolist() if room else []
                room -= len(told["token_ids"])
        self._close()
        self._renewed_epoch = epoch

    def take(self, now_s: float, *, last: bool = False) -> list[Report]:
        """Reports that may leave now; `last`: whatever there is, since nothing comes after."""
        self._note_pages()
        late = now_s - self._lost_s >= WAIT_S
        if self._open is not None and (last or late):
            self._close()
        if not self._made or not (last or late or self._resumed()):
            return []
        made, self._made = list(self._made), deque()
        if self.dropped:
            made[0]["reports_dropped"], self.dropped = self.dropped, 0
        return made

    def _note_pages(self) -> None:
        """Make a report of each damaged page that is new since the last time."""
        entries = self._brain.page_faults
        if not entries or entries[-1] is self._page_told:
            return
        told = [at for at, entry in enumerate(entries) if entry is self._page_told]
        for entry in entries[told[0] + 1 if told else 0 :]:
            self._keep({**self._head("page", self._brain.epoch), **entry})
        self._page_told = entries[-1]

    def _resumed(self) -> bool:
        """Whether new work has begun, or there is none."""
        brain = self._brain
        if self._open is not None:
            return False
        if self._renewed_epoch is None or not brain.live:
            return True
        # A plan without rows is no work: it verifies pages, or gives up what is left of requests.
        worked = [flight.plan.epoch for flight in brain.recent if flight.plan.rows.size]
        return bool(worked) and worked[-1] >= self._renewed_epoch

    def _close(self) -> None:
        if self._open is not None:
            self._keep(self._open)
            self._open = None

    def _keep(self, report: Report) -> None:
        if len(self._made) >= REPORTS_KEPT:
            self._made.popleft()
            self.dropped += 1
        self._made.append(report)

    def _head(self, kind: str, epoch: int) -> Report:
        return {"format": FORMAT, "kind": kind, "time_ns": self._wall_ns(), "epoch": epoch}

    def _evidence(self, epoch: int, detail: str, hung: bool, now_s: float) -> Report:
        brain = self._brain
        flying, settled = list(brain.flights), list(brain.recent)
        pages = _Pages(brain)
        for flight in settled + flying:
            pages.add(flight)
        in_flight, rows_max = _distinct(flying), brain.limits.rows_max
        # Those in flight first: they are the suspects.
        ids = in_flight + [one for one in _distinct(settled) if one not in set(in_flight)]
        return {
            **self._head("worker", epoch),
            "said": detail[:DETAIL_CHARS],
            "hung": hung,
            "ended": None,
            "implicates": None,
            "next_epoch": None,
            "in_flight": [_plan(flight, now_s, rows_max) for flight in flying],
            "acknowledged": [_plan(flight, now_s, rows_max) for flight in settled],
            "requests": [self._request(one, one in in_flight) for one in ids[:REQUESTS_TOLD]],
            "requests_left_out": max(0, len(ids) - REQUESTS_TOLD),
            "pages": pages.told,
            "pages_left_out": pages.left_out,
            "ledger": _ledger(brain),
            "live": brain.live,
            "running": brain.scheduler.running.active,
        }

    def _request(self, number: int, in_flight: bool) -> dict[str, Any]:
        request = self._brain.requests.get(number)
        facts: dict[str, Any] = {"id": _hex(number), "in_flight": in_flight}
        if request is None:
            return {**facts, "phase": "ENDED"}
        admission, run = request.admission, self._brain.scheduler.running
        running = request.phase is Phase.RUNNING
        return {
            **facts,
            "tenant": admission.tenant,
            "phase": request.phase.name,
            "row": request.row,
            "prompt_tokens": request.prompt_len,
            "tokens": _known(self._brain, request),
            "max_tokens": admission.max_tokens,
            "planned_tokens": int(run.planned[request.row]) if running else 0,
            "pages": int(run.pages_len[request.row]) if running else 0,
        }


class _Pages:
    """The pages that plans wrote, and whose they were: `told`, each page once, by handle."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain
        self._found: dict[int, dict[str, Any]] = {}
        self.left_out = 0

    @property
    def told(self) -> list[dict[str, Any]]:
        return [self._found[handle] for handle in sorted(self._found)]

    def add(self, flight: Flight) -> None:
        run, size = self._brain.scheduler.running, self._brain.limits.page_tokens
        plan = flight.plan
        for at, row in enumerate(plan.rows.tolist()):
            if run.life[row] != flight.life[at]:
                continue  # The request has left the row, and its pages with it.
            last = int(flight.reach[at])
            first = last - int(plan.query_lens[at])
            columns = range(first // size, (last - 1) // size + 1)
            for group in range(self._brain.limits.groups):
                for column in columns:
                    if run.dropped[group, row] <= column < run.pages_len[row]:
                        handle = run.handles[group, row, column]
                        self._wrote(group, handle, int(flight.ids[at]), column, plan.step)

    def _wrote(self, group: int, handle: np.uint64, request: int, column: int, step: int) -> None:
        number = int(handle)
        if number not in self._found:
            if len(self._found) >= PAGES_TOLD:
                self.left_out += 1
                return
            one = np.array([handle], np.uint64)
            page = int(handle_pages(one)[0])
            pool = self._brain.ledger.pools[group]
            self._found[number] = {
                "group": group,
                "page": page,
                "generation": int(handle_generations(one)[0]),
                "state": PageState(int(pool.state[page])).name,
                "leases": int(pool.leases[page]),
                "request": _hex(request),
                "column": column,
                "steps": [],
            }
        self._found[number]["steps"].append(step)


def _graph(plan: StepPlan, rows_max: int) -> str:
    """The key of the graph that such a step is replayed from where there are graphs and it is
    admitted: a bucket of rows, or one that has room for the tokens of a step with prompts."""
    if plan.rows.size == 0:
        return "none"
    if plan.query_lens.max() > 1:
        return f"tokens {int(plan.query_lens.sum())}"
    return f"rows {bucket_of(plan.rows.size, buckets(rows_max))}"


def _plan(flight: Flight, now_s: float, rows_max: int) -> dict[str, Any]:
    plan = flight.plan
    kinds = plan.copies["kind"].tolist()
    told = slice(0, ROWS_TOLD)
    rows = zip(
        plan.rows[told].tolist(),
        flight.ids[told].tolist(),
        (flight.reach - plan.query_lens)[told].tolist(),
        plan.query_lens[told].tolist(),
        plan.samples[told].tolist(),
        plan.drafts[told].tolist() or [0] * ROWS_TOLD,
        strict=False,
    )
    return {
        "epoch": plan.epoch,
        "step": plan.step,
        "launched_s_ago": round(now_s - flight.launched_s, 6),
        "rows_total": plan.rows.size,
        "query_tokens": int(plan.query_lens.sum()),
        "graph": _graph(plan, rows_max),
        "rows": [
            {
                "row": row,
                "request": _hex(number),
                "from": position,
                "query_len": query_len,
                "samples": bool(samples),
                "drafts": drafts,
            }
            for row, number, position, query_len, samples, drafts in rows
        ],
        "admits": int(plan.admits.size),
        "clears": int(plan.clears.size),
        "page_writes": int(plan.page_writes.size),
        "seals": int(plan.seals.size),
        "zeros": int(plan.zeros.size),
        "loads": kinds.count(LOAD),
        "stores": kinds.count(STORE),
    }


def _ledger(brain: Brain) -> list[dict[str, Any]]:
    ledger = brain.ledger
    return [
        {
            "group": group,
            "pages": pool.pages,
            **{state.name.lower(): count for state, count in pool.counts().items()},
            "available": int(ledger.available_in(group)),
        }
        for group, pool in enumerate(ledger.pools)
    ]


def _distinct(flights: list[Flight]) -> list[int]:
    """Request ids of the flights, each once, in order of plans and rows."""
    return list(dict.fromkeys(number for flight in flights for number in flight.ids.tolist()))


def _known(brain: Brain, request: Request) -> int:
    """Tokens known of a request: its position."""
    if request.phase is Phase.RUNNING:
        return request.prompt_len + int(brain.scheduler.running.emitted[request.row])
    return int(request.tokens.size)


def _hex(number: int) -> str:
    return f"{number:#018x}"


def line_of(report: Report) -> str:
    """A report in one line, for a terminal and for logs."""
    if report["kind"] != "worker":
        places = ("group", "page", "generation", "found")
        known = [f"{name} {report[name]}" for name in places if name in report]
        return f"a page was damaged in epoch {report['epoch']}: {', '.join(known)}"
    flying = [one for one in report["requests"] if one["in_flight"]]
    suspects = [one["id"] for one in flying if "suspected_at" in one]
    parts = [f"epoch {report['epoch']} ended: {report['said']}"]
    if report["ended"] and report["ended"] != report["said"]:
        parts.append(report["ended"])
    parts.append(f"{len(report['in_flight'])} plans and {len(flying)} requests were in flight")
    if suspects:
        more = "" if len(suspects) <= 4 else f" and {len(suspects) - 4} more"
        parts.append(f"suspected: {', '.join(suspects[:4])}{more}")
    if report.get("alone"):
        parts.append(f"runs alone: {report['alone']}")
    return "; ".join(parts)
