"""Append rows measured without a peer, with a peer's figures of the same machine kind beside them.

    python3 tools/gpu/with_peers.py ROWS.jsonl [--peers FILE] [--into FILE]

A row that has a peer keeps it. The peer's options say that it was measured apart. FILE of --peers:
bench/results/peers_h200.json; rows go to the end of bench/results/h200.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
KEY = ("bench", "model", "work", "batch", "concurrency", "metric")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--peers", type=Path, default=RESULTS / "peers_h200.json")
    parser.add_argument("--into", type=Path, default=RESULTS / "h200.jsonl")
    asked = parser.parse_args()
    peers = json.loads(asked.peers.read_text())
    figures = {key(one): one["value"] for one in peers["figures"]}
    with asked.into.open("a") as file:
        for line in asked.rows.read_text().splitlines():
            row = json.loads(line)
            value = figures.get(key(row))
            if row["peer"] is None and value is not None:
                named = {name: peers[name] for name in ("name", "version", "options")}
                row["peer"] = named | {"value": value, "runs": [value]}
                row["ratio"] = round(row["value"] / value, 4)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
