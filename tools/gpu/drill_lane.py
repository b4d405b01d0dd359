"""Play cases of drills on a GPU, one after another, until a moment: a lane of drills_h200.py.

    python3 tools/gpu/drill_lane.py FILE SECONDS [--graphs] [--sabotage] DRILL[:CASE] ...

FILE is written anew after each case, in the form of `holdfast drill run --json`, so that a run that
is cut off keeps what it has.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from holdfast.drill.registry import DRILLS
from holdfast.drill.report import Report, document, line
from holdfast.drill.runner import Plan, Runner

DEVICE, THREADS = "cuda", 2


def main() -> int:
    path, end_s = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    flags = {word for word in sys.argv[3:] if word.startswith("--")}
    drills = {drill.name: drill for drill in DRILLS}
    reports: list[Report] = []
    runner = Runner(Plan(drills=DRILLS, device=DEVICE, threads=THREADS, graphs="--graphs" in flags))
    try:
        for asked in [word for word in sys.argv[3:] if word not in flags]:
            name, _, case = asked.partition(":")
            for each in [case] if case else drills[name].cases:
                if time.monotonic() > end_s:
                    print(f"not run: {name} {each}: the time is up", flush=True)
                    continue
                report = runner.play(drills[name], each, sabotage="--sabotage" in flags)
                print(line(report), flush=True)
                for failure in report.failures:
                    print(f"    {failure.kind}: {failure.text}", flush=True)
                reports.append(report)
                facts = document(reports, device=DEVICE, model="holdfast-tiny")
                path.write_text(json.dumps(facts, indent=1) + "\n")
    finally:
        runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
