"""Runner: gives each case of a drill a server and a stage, and collects the reports.

Owns the server that runs at the moment and when it is fit for the next case: same needs, not
spoiled, a standby prepared, and few ends of its worker lately, since restarts are paced on purpose
and a drill measures the first one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from holdfast.api.text import Tokenizer
from holdfast.drill.drill import Drill
from holdfast.drill.oracle import Explainer, Reference
from holdfast.drill.report import Failure, Report
from holdfast.drill.server import DrillServer
from holdfast.drill.stage import WARM_S, Judges, Stage
from holdfast.errors import HoldfastError, OptionError
from holdfast.model.spec import ModelSpec, resolve_model

# A server gives up at the sixth end of a worker within a minute (proc.lifecycle.policy); until then
# a prepared standby takes over without a pause.
WORKER_ENDS_MAX = 5
# Of one case, waits included: whatever happens, the next one has its turn.
CASE_S_MAX = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `drill run` was asked for. streams: None is each drill's own. kind: cases with
    this word in their name. explain: judge tokens as on a GPU, where equality is not exact.
    graphs: every server replays decode steps, also those of drills that do not ask for it."""

    drills: tuple[Drill, ...]
    model: str | None = None
    device: str = "cpu"
    streams: int | None = None
    sabotage: bool = False
    kind: str | None = None
    threads: int = 1
    explain: bool = False
    graphs: bool = False

    def cases(self) -> Iterator[tuple[Drill, str]]:
        """Raises OptionError when no case is of that kind."""
        found = [
            (drill, case)
            for drill in self.drills
            for case in drill.cases
            if self.kind is None or self.kind in case.split("/")
        ]
        if not found:
            raise OptionError("NAME", f"no drill chosen has a case for kind {self.kind!r}")
        return iter(found)


class Runner:
    """`run` all, or `play` one case after another; `close` in any case."""

    def __init__(self, plan: Plan) -> None:
        spec = ModelSpec.load(resolve_model(plan.model))
        explainer = None
        if plan.explain or plan.device != "cpu":
            dtype = "float32" if plan.device == "cpu" else "bfloat16"
            explainer = Explainer(spec, device=plan.device, dtype=dtype)
        self._plan = plan
        self._judges = Judges(
            Tokenizer.load(spec.path, vocab_size=spec.vocab_size),
            Reference(plan.model, plan.threads),
            explainer,
        )
        self._server: DrillServer | None = None

    def run(self, ended: Callable[[Report], None]) -> list[Report]:
        """Every case, one after another; `ended` is told of each."""
        reports = []
        for drill, case in self._plan.cases():
            reports.append(
                self.play(drill, case, streams=self._plan.streams, sabotage=self._plan.sabotage)
            )
            ended(reports[-1])
        return reports

    def close(self) -> None:
        self._drop_server()
        self._judges.reference.close()

    def play(
        self, drill: Drill, case: str, *, streams: int | None = None, sabotage: bool = False
    ) -> Report:
        """One case on a fit server. What breaks the drill itself is a failure of it, too."""
        report = Report(drill.name, case, sabotage, caught=drill.caught)
        report.sabotage_kind = drill.sabotage_kind
        started_s = time.monotonic()
        try:
            server = self._fit(drill, sabotage)
            started_s = time.monotonic()
            count = streams or drill.streams
            stage = Stage(server, report, self._judges, count, device=self._plan.device)
            asyncio.run(_play(drill, stage))
            server.spend(drill.ends)
            unfit = report.failures and not sabotage
            if not server.alive or unfit or (sabotage and drill.spoils):
                self._drop_server()
        except (HoldfastError, OSError) as error:
            report.failures.append(Failure("server", f"{type(error).__name__}: {error}"))
            self._drop_server()
        report.seconds = time.monotonic() - started_s
        return report

    def _fit(self, drill: Drill, sabotage: bool) -> DrillServer:
        """A server that is up, warm and not worn by the drills before."""
        server, needs = self._server, drill.needs
        if sabotage and drill.needs_sabotaged is not None:
            needs = drill.needs_sabotaged
        if self._plan.graphs:
            needs = replace(needs, graphs=True)
        worn = server is not None and (
            not server.alive
            or server.needs != needs
            or server.recent_ends + drill.ends > WORKER_ENDS_MAX
        )
        if worn:
            self._drop_server()
        if self._server is None:
            plan = self._plan
            self._server = DrillServer(
                needs, model=plan.model, device=plan.device, threads=plan.threads
            )
        if not self._server.wait_warm(WARM_S):
            raise OptionError(drill.name, f"no standby was prepared within {WARM_S:g} s")
        # Of the case before: what its last second counted is not this one's.
        self._server.tell()
        return self._server

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


async def _play(drill: Drill, stage: Stage) -> None:
    try:
        async with asyncio.timeout(CASE_S_MAX):
            await drill.play(stage)
    except TimeoutError:
        stage.fail("wait", f"not over within {CASE_S_MAX:g} s")
    finally:
        await stage.settle()


def passed(reports: Sequence[Report]) -> bool:
    return bool(reports) and all(report.passed for report in reports)
