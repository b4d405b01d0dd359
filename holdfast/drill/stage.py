"""Stage: what one case of a drill is given, from the first stream to the verdict.

Owns the case's streams, its Report and the judging that all drills share: are the streams whole,
are their tokens right, did everything come home, how long did it take. A drill says what to break
and what it promises. `expect` collects failures; only a server that does not answer raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.api.text import Tokenizer
from holdfast.core.metrics import METRICS
from holdfast.drill.client import Stream
from holdfast.drill.job import TOKENS, Job, make_jobs
from holdfast.drill.oracle import Explainer, Reference, tau_of
from holdfast.drill.report import Failure, Report
from holdfast.drill.server import DrillServer
from holdfast.errors import OperatorError, require

# Until every stream has begun, a provocation has fired, a process is up: far above what it takes.
WAIT_S = 60.0
WARM_S = 150.0
# Fault-free streams that are asked one after another.
ALONE = 4
# Tokens that every stream has before something breaks: it is in the middle of its answer.
BEGUN = 4
_POLL_S = 0.01
# Moments are noted by several processes: one that is this much early is of the same provocation.
_SLACK_S = 0.05
# On a machine that does other work besides; an idle one needs 1 ms (EOF after SIGKILL).
NOTICE_S = 0.5
# Faults of the server must never look like faults of the client.
CLIENT_CODES = ("400", "401", "404", "405", "408", "413")


@dataclass(frozen=True, slots=True)
class Judges:
    """What answers are compared with. explainer: on a device where equality is not exact."""

    tokenizer: Tokenizer
    reference: Reference
    explainer: Explainer | None = None


class Stage:
    """One case. `sabotage`: something must go wrong that the drill has to see."""

    def __init__(
        self, server: DrillServer, report: Report, judges: Judges, streams: int, *, device: str
    ) -> None:
        self.server = server
        self.report = report
        self.judges = judges
        self.count = streams
        self.device = device
        self.case = report.case
        self.sabotage = report.sabotage
        self.broken_s: float | None = None
        self._streams: list[Stream] = []
        # Of fault-free runs: the first answer to each job, and every one; jobs without their keys.
        self._clean: dict[Job, list[int]] = {}
        self._clean_runs: set[tuple[Job, tuple[int, ...]]] = set()
        # Whose page is wrong, under sabotage; it is cached as if it were right.
        self._victim: Job | None = None
        self._distances: dict[tuple[Job, tuple[int, ...]], np.ndarray] = {}
        self._started_s = time.monotonic()
        self._before = server.metrics()

    # --- streams ---

    def jobs(self, count: int, name: str = "drill", *, tokens: int = TOKENS) -> list[Job]:
        return make_jobs(self.judges.tokenizer.encode, name, count, tokens=tokens)

    async def open(self, jobs: Sequence[Job] | None = None, *, clean: bool = True) -> list[Stream]:
        """Ask all of `jobs` at once (default: as many of the usual ones as the drill has).

        clean: where tokens are explained, run them undisturbed first; not to be had once something
        is armed, or where a second run would find what the first one cached.
        """
        jobs = list(self.jobs(self.count) if jobs is None else jobs)
        if clean:
            await self.prepare(jobs)
        opened = [Stream(job) for job in jobs]
        for stream in opened:
            stream.start(self.server.address, self.server.name)
        self._streams += opened
        return opened

    async def open_sabotaged(self, jobs: Sequence[Job] | None = None) -> list[Stream]:
        """`open`; under sabotage one prompt more, whose pages are wrong before they are sealed."""
        jobs = list(self.jobs(self.count) if jobs is None else jobs)
        await self.prepare(jobs)
        if self.sabotage:
            victim = self.jobs(1, f"{self.report.name} sabotaged")[0]
            victim = replace(victim, key=jobs[0].key if jobs else None)
            self._victim = victim.without_key()
            await self.arm("plant-page", "prefill", tokens=victim.prompt, lasting=True)
            jobs = [victim, *jobs]
        return await self.open(jobs, clean=False)

    async def begin(self, jobs: Sequence[Job] | None = None) -> list[Stream]:
        """`open_sabotaged`, and all of them in the middle of their answers."""
        streams = await self.open_sabotaged(jobs)
        await self.have(streams)
        return streams

    async def prepare(self, jobs: Sequence[Job]) -> None:
        """Where tokens are explained: the same jobs on the same server before anything is broken,
        which tau is taken from. In all that the drill's own streams will meet, since roundings
        differ with the batch and with what is cached: together, in a crowd as large as the drill's,
        and some alone. Raises OperatorError when one of them does not end well."""
        if self.judges.explainer is None:
            return
        plain = [job.without_key() for job in jobs]
        require(self._victim not in plain, "no run of the sabotaged prompt is fault-free")
        # Nothing of it may be refused.
        rows = self.server.needs.rows
        room = asyncio.Semaphore(rows)

        async def run(job: Job) -> None:
            async with room:
                stream = Stream(job)
                stream.start(self.server.address, self.server.name)
                await stream.finish()
            if not stream.whole:
                raise OperatorError(f"a fault-free stream ended {stream.ended!r}: {stream.error}")
            answered = job.without_key()
            self._clean.setdefault(answered, stream.tokens)
            self._clean_runs.add((answered, tuple(stream.tokens)))

        missing = [job for job in dict.fromkeys(jobs) if job.without_key() not in self._clean]
        await asyncio.gather(*(run(job) for job in missing))
        width = min(rows, self.count)
        if missing and width > len(missing):
            crowd = itertools.islice(itertools.cycle(missing), width)
            await asyncio.gather(*(run(job) for job in crowd))
        for job in missing[:ALONE]:
            await run(job)

    async def until(self, what: str, check: Callable[[], Any], seconds: float = WAIT_S) -> bool:
        """Look again and again; False, and a failure, at the deadline."""
        deadline_s = time.monotonic() + seconds
        while not check():
            if time.monotonic() > deadline_s:
                self.fail("wait", f"not within {seconds:g} s: {what}")
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def have(self, streams: Sequence[Stream], tokens: int = BEGUN) -> None:
        """Until each has so many tokens, or has ended."""
        what = f"{tokens} tokens of each stream"
        await self.until(what, lambda: all(len(s.tokens) >= tokens or s.ended for s in streams))

    async def finish(self, streams: Sequence[Stream] | None = None) -> None:
        for stream in self._streams if streams is None else streams:
            await stream.finish()

    # --- breaking ---

    async def provoke(self, **order: Any) -> float:
        """A drill's order; the moment counts as the one from which clocks run."""
        self.broken_s = await asyncio.to_thread(lambda: self.server.provoke(**order))
        return self.broken_s

    async def arm(self, kind: str, phase: str, *, to: str = "worker", **order: Any) -> None:
        """A fault that waits for its moment."""
        given = {"do": "fault", "to": to, "kind": kind, "phase": phase, **order}
        await asyncio.to_thread(lambda: self.server.provoke(**given))

    async def kill(self, *roles: str, name: str = "SIGKILL") -> float:
        return await self.provoke(do="signal", signal=name, roles=list(roles))

    def moments(self, event: str, since_s: float = 0.0) -> list[dict[str, Any]]:
        """What the supervisor noted, oldest first."""
        return self.server.moments(event, since_s)

    async def told(self) -> None:
        """Until `moved` is of every step so far."""
        await asyncio.to_thread(self.server.tell)

    async def fired(self, kind: str, since_s: float) -> bool:
        """Until a worker has said that it breaks now; clocks run from then."""

        def check() -> bool:
            found = [m for m in self.moments("provoked", since_s) if m["kind"] == kind]
            if found:
                self.broken_s = found[0]["at_s"]
            return bool(found)

        return await self.until(f"{kind} happens", check)

    # --- judging ---

    def fail(self, kind: str, text: str) -> None:
        self.report.failures.append(Failure(kind, text))

    def expect(self, kind: str, condition: object, text: str) -> None:
        if not condition:
            self.fail(kind, text)

    def judge(self, streams: Sequence[Stream] | None = None) -> None:
        """These streams are promised: whole, and each token the model's."""
        streams = list(self._streams if streams is None else streams)
        report = self.report
        report.streams += len(streams)
        for stream in streams:
            if not stream.whole:
                report.lost += 1
                got = f"{len(stream.tokens)} of {stream.job.max_tokens} tokens"
                self.fail("lost", f"a stream ended {stream.ended!r} after {got}: {stream.error}")
        self._judge_tokens(streams)

    def _judge_tokens(self, streams: list[Stream]) -> None:
        """As far as they came: a lost stream is judged too."""
        report, explainer = self.report, self.judges.explainer
        tau = self._tau()
        for stream, right in zip(streams, self._expected(streams), strict=True):
            count = len(stream.tokens)
            pairs = zip(stream.tokens, right, strict=False)
            wrong = [at for at, (ours, theirs) in enumerate(pairs) if ours != theirs]
            equal = min(count, len(right)) - len(wrong)
            farthest = 0.0
            if explainer is not None:
                distances = self._distances_of(stream.job.without_key(), tuple(stream.tokens))
                farthest = float(distances.max(initial=0.0))
                report.farthest = max(report.farthest or 0.0, farthest)
                wrong = (distances > tau).nonzero()[0].tolist()
            report.tokens += count
            report.tokens_equal += equal
            report.tokens_explained += count - len(wrong)
            if wrong:
                text = f"{len(wrong)} of {count} tokens wrong, the first at {wrong[0]}"
                if explainer is not None:
                    text += f", up to {farthest:.3f} below the maximum; tau is {tau:.3f}"
                self.fail("tokens", text)

    def _tau(self) -> float:
        """Of all fault-free runs of this case. None is needed where equality is exact."""
        explainer = self.judges.explainer
        if explainer is None:
            return 0.0
        errors = [self._distances_of(*run) for run in self._clean_runs]
        errors += [explainer.spreads(*pair) for pair in self._clean.items()]
        self.report.tau = tau_of(errors)
        return self.report.tau

    def _distances_of(self, job: Job, tokens: tuple[int, ...]) -> np.ndarray:
        """The explainer's; a storm has few answers and many that ask for them."""
        assert self.judges.explainer is not None
        if (job, tokens) not in self._distances:
            self._distances[job, tokens] = self.judges.explainer.distances(job, tokens)
        return self._distances[job, tokens]

    def _expected(self, streams: list[Stream]) -> list[list[int]]:
        """The tokens of each; none where there was no fault-free run of its own."""
        if self.judges.explainer is None:
            return self.judges.reference.tokens(stream.job for stream in streams)
        return [self._clean.get(stream.job.without_key(), []) for stream in streams]

    def judge_clocks(
        self, role: str, *, resume_s: float, notice_s: float | None = NOTICE_S
    ) -> None:
        """noticed, fenced and resumed after `role` was broken, against bounds in seconds."""
        report, start_s = self.report, self.broken_s
        if start_s is None:
            self.fail("clock", "nothing was broken")
            return
        title = f"holdfast {role}"
        since = [m for m in self.server.status()["drills"] if m["at_s"] >= start_s - _SLACK_S]
        ends = [m for m in since if m["title"] == title and m["event"] != "provoked"]
        gone = [m for m in ends if m["event"] == "exited"]
        back = [m for m in since if m["event"] == "promoted"]
        if not ends or not gone:
            self.fail("clock", f"the supervisor did not see the end of {role}")
            return
        report.noticed_s = max(0.0, ends[0]["at_s"] - start_s)
        report.fenced_s = max(0.0, gone[0]["at_s"] - start_s)
        # A stream whose last token was on its way already says nothing of the new worker.
        after_s = back[0]["at_s"] if back else gone[0]["at_s"]
        tokens = [at for s in self._streams for at in s.times if at >= after_s]
        if tokens:
            report.resumed_s = min(tokens) - start_s
        self.expect("clock", tokens, "no token came after the fault: it proved nothing")
        report.pause_s = max(self.gaps(), default=None)
        for name, value, bound_s in (
            ("noticed", report.noticed_s, notice_s),
            ("resumed", report.resumed_s, resume_s),
        ):
            if value is not None and bound_s is not None:
                late = f"{name} after {value:.3f} s; promised {bound_s:g} s"
                self.expect("clock", value <= bound_s, late)

    def gaps(self, streams: Sequence[Stream] | None = None) -> list[float]:
        """The longest wait between two tokens of each stream, in seconds."""
        chosen = self._streams if streams is None else streams
        times = [s.times for s in chosen if len(s.times) > 1]
        return [max(b - a for a, b in itertools.pairwise(t)) for t in times]

    def moved(self, name: str, **labels: str) -> float:
        """How far a counter went since the case began."""
        return _sum(self.server.metrics(), name, labels) - _sum(self._before, name, labels)

    async def judge_home(self, *, client_errors: bool = False) -> None:
        """Nothing is held by anybody, no fault was called the client's (unless the drill is one of
        the client's faults), nothing compiled."""

        def empty() -> bool:
            found = self.server.metrics()
            gauges = ("pages_held", "rows_running", "requests_waiting", "streams_open")
            return not any(found[name] for name in gauges)

        await self.until("every page, row and stream is given back", empty)
        for code in () if client_errors else CLIENT_CODES:
            count = self.moved("http_requests_total", code=code)
            self.expect("metric", not count, f"{count:g} requests were answered {code}")
        gaps = self.moved("token_gaps_total")
        self.expect("metric", not gaps, f"{gaps:g} token indexes out of order")
        self.count_up()
        compiles = self.report.compiles_after_ready
        self.expect("metric", not compiles, f"{compiles} compilations after ready")

    def count_up(self) -> None:
        """Counters that every report shows, where the server has them."""
        for name, metric in (
            ("pages_verified", "pages_verified_total"),
            ("pages_failed", "pages_failed_total"),
            ("tokens_recomputed", "tokens_recomputed_total"),
            ("compiles_after_ready", "compiles_after_ready_total"),
        ):
            if metric in _DECLARED:
                setattr(self.report, name, int(self.moved(metric)))

    def expect_moved(self, name: str, least: float = 1, **labels: str) -> None:
        moved = self.moved(name, **labels)
        shown = f"{name}{labels or ''}"
        self.expect("metric", moved >= least, f"{shown} moved by {moved:g}, not {least:g}")

    async def settle(self) -> None:
        """Whatever came of it: no stream is left, no order stands, what was planted is known."""
        for stream in self._streams:
            if stream.task is not None and not stream.task.done():
                await stream.cancel()
        with contextlib.suppress(OperatorError):
            self.server.provoke(do="forget")
            self.report.planted = self.report.planted or bool(self._planted())

    def _planted(self) -> list[dict[str, Any]]:
        return [m for m in self.moments("provoked", self._started_s) if m["kind"] in _PLANTS]


# What is broken under --sabotage alone.
_PLANTS = (
    "plant-page",
    "unfenced-writer",
    "narrow-envelope",
    "stray-store",
    "move-buffer-unseen",
    "stale-rows-unseen",
)
_DECLARED = {metric.name for metric in METRICS}


def _plain(key: str) -> str:
    return key.partition("{")[0]


def _sum(samples: dict[str, float], name: str, labels: dict[str, str]) -> float:
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for key, value in samples.items()
        if _plain(key) == name and all(one in key for one in wanted)
    )
