"""The keeper of a part of probe_faults.py, and how its samples are summed up."""

from __future__ import annotations

import json
import time
import traceback

import numpy as np
import probe_cuda as cuda
from probe_cuda import Child


def summary(samples) -> dict[str, float]:
    values = np.asarray(list(samples), dtype=float)
    if not len(values):
        return {"n": 0}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    found = {"min": values.min(), "p50": p50, "p90": p90, "p99": p99, "max": values.max()}
    return {"n": len(values), **{name: round(float(v), 4) for name, v in found.items()}}


def span(samples, digits: int = 1) -> str:
    """`median (smallest..largest)`, or the one value."""
    samples = [s for s in samples if s is not None]
    if not samples:
        return "-"
    median, low, high = float(np.median(samples)), min(samples), max(samples)
    if f"{low:.{digits}f}" == f"{high:.{digits}f}":
        return f"{median:.{digits}f}"
    return f"{median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


class Keeper:
    """Owns memory, starts children, records rows, and knows when its time is up."""

    def __init__(self, part: str, cubin: str, rows: str, seconds: float):
        self.part = part
        self.cubin, self.rows, self.end = cubin, rows, time.monotonic() + seconds
        self.gpu = cuda.Gpu(cubin)

    def left(self) -> float:
        return self.end - time.monotonic()

    def record(self, what: str, result: str, ok: bool | None = None, **detail) -> None:
        row = {"part": self.part, "what": what, "result": result, "ok": ok, **detail}
        with open(self.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"  {what}: {result}" + ("" if ok is None else f" [{'ok' if ok else 'NO'}]"), flush=True
        )

    def attempt(self, what: str, measure, *arguments, **fields) -> None:
        """Run one measurement; a failure becomes a row, and the part goes on."""
        if self.left() < 8:
            self.record(what, "skipped: no time left")
            return
        try:
            measure(*arguments, **fields)
        except Exception as error:
            traceback.print_exc()
            self.record(what, f"failed: {type(error).__name__}: {error}", False)

    def child(self, name: str = "worker", context: bool = True) -> Child:
        child = Child(self.cubin, name)
        if context:
            try:
                child.ask("context")
            except Exception:
                child.close()
                raise
        return child
