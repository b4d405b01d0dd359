"""Report: rows of what drills_h200.py found, printed as they come and kept in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Report:
    """Rows of (part, what, figure, target, ok), printed as they come and again at the end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def add(self, part: str, what: str, figure: str, ok: bool = True, **facts: Any) -> None:
        self.rows.append({"part": part, "what": what, "figure": figure, "ok": ok, **facts})
        print(self.line(self.rows[-1]), flush=True)
        self.save()

    def line(self, row: dict[str, Any]) -> str:
        mark = "ok  " if row["ok"] else "FAIL"
        return f"{mark} {row['part']:<7} {row['what']:<44} {row['figure']}"

    def save(self) -> None:
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1)
        (self.out / "results.json").write_text(text)
