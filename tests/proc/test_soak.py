"""Zero false restarts: a saturated server restarts nothing. tools/soak.py, as long as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# 45 outside CI; there is no time for more than one there.
MINUTES = float(os.environ.get("HOLDFAST_SOAK_MINUTES", "1"))


def test_a_saturated_server_restarts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--minutes", str(MINUTES)]
    path = tmp_path / "soak.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "--json", str(path)],
        env=env,
        timeout=60 * MINUTES + 600,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    report = json.loads(path.read_text())
    assert report["wrong"] == [] and ran.returncode == 0
    assert report["whole"] > 0 and report["epoch"] == 1
    assert report["standby_kills"] > 0, "a standby that warms up beside the load is part of it"
