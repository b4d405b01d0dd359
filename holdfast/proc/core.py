"""The core process: maps the journal and the counters, makes the brain, runs its loop.

Started by the supervisor. A new core after a dead one reads the journal first (`recover`); its api
links and its worker link come over the control channel, before and after it is ready. No torch.
"""

from __future__ import annotations

import gc
import sys
import time

from holdfast.core import journal
from holdfast.core.brain import Brain
from holdfast.core.clocks import StepClocks
from holdfast.core.loop import CoreLoop
from holdfast.core.metrics import Metrics
from holdfast.core.report import FaultReports
from holdfast.errors import HoldfastError
from holdfast.proc import memfd
from holdfast.proc.child import EXIT_OPERATOR, Boot, boot
from holdfast.proc.starvation import Starvation

METRICS_SLOT = 0


def make_brain(start: Boot) -> tuple[Brain, int]:
    """The brain of a core process, and how many live requests it took over from the journal."""
    config, limits = start.config, start.limits
    buffer = memfd.attach(start.fds["journal"])
    recovered = journal.recover(buffer) if config["recover"] else {}
    brain = Brain(
        limits,
        journal.Journal(buffer, limits),
        Metrics(memfd.attach(start.fds["metrics"]), METRICS_SLOT),
        epoch=config["epoch"],
        tag=config["tag"],
        scrub_pages_s=config["scrub_pages_s"],
    )
    if config["recover"]:
        brain.restore(recovered, time.monotonic())
    return brain, brain.live


def main() -> int:
    start = boot()
    control = start.control()
    try:
        brain, recovered = make_brain(start)
    except HoldfastError as error:
        control.fault(error)
        return EXIT_OPERATOR
    # What is alive now stays alive; collections in the step then have little to walk.
    gc.collect()
    gc.freeze()
    control.ready(recovered=recovered)
    metrics, starvation = brain.metrics, Starvation()
    clocks = StepClocks(
        start.config["step_timeout_s"],
        margin_s=start.config["step_margin_s"],
        starved=starvation.starved,
        rested=starvation.rested,
    )
    return CoreLoop(
        brain,
        control,
        spent=lambda seconds: metrics.observe("brain_seconds", seconds),
        clocks=clocks,
        watch=starvation.watch,
        reports=FaultReports(brain, tokens=start.config["fault_tokens"]),
    ).run()


if __name__ == "__main__":
    sys.exit(main())
