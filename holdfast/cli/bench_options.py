"""The options that benches share: repeats, the peer beside us, where rows go.

Must not import torch or a model's files.
"""

from __future__ import annotations

import enum
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.options import EngineOptions
from holdfast.cli.show import out
from holdfast.errors import OptionError

if TYPE_CHECKING:
    from holdfast.bench.peers.vllm_peer import Vllm
    from holdfast.bench.report import Figure
    from holdfast.cli.engine import Prepared

PEER_PANEL = "Peer"

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Append the figures to FILE, one a line."),
]
Repeats = Annotated[int, typer.Option(help="Runs of each side; the median counts.", min=1)]


class Peer(enum.StrEnum):
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """Another engine on the same work, after ours has ended."""

    peer: Annotated[
        Peer | None,
        typer.Option(
            rich_help_panel=PEER_PANEL,
            help="Also run this engine on the same work (transformers: offline only).",
        ),
    ] = None
    peer_python: Annotated[
        str,
        typer.Option(
            rich_help_panel=PEER_PANEL,
            help="The Python that has vllm.",
            show_default="this one",
        ),
    ] = sys.executable
    peer_path: Annotated[
        list[Path] | None,
        typer.Option(
            rich_help_panel=PEER_PANEL,
            help="A folder to put before that Python's PYTHONPATH; may be repeated.",
        ),
    ] = None
    peer_repeats: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PEER_PANEL,
            help="Its runs, where it is too slow for as many as ours.",
            show_default="as ours",
            min=1,
        ),
    ] = None
    peer_timeout_s: Annotated[
        float,
        typer.Option(
            rich_help_panel=PEER_PANEL, help="One process of it takes no longer.", min=1.0
        ),
    ] = 900.0

    def runs(self, repeats: int) -> int:
        """Runs of the peer when ours has `repeats`: never more."""
        return min(repeats, self.peer_repeats or repeats)

    def vllm(self, prepared: Prepared, engine: EngineOptions) -> Vllm | None:
        """None unless it is asked for. Raises OptionError when it cannot be imported there."""
        if self.peer is Peer.TRANSFORMERS:
            raise OptionError("--peer", "transformers is for `bench offline`; here it is vllm")
        if self.peer is None:
            return None
        from holdfast.bench.peers.vllm_peer import Vllm

        return Vllm(
            model=prepared.spec.path,
            load=engine.load.value,
            dtype=prepared.sizing.dtype,
            context_tokens=prepared.sizing.limits.context_tokens,
            python=self.peer_python,
            path=tuple(self.peer_path or ()),
            timeout_s=self.peer_timeout_s,
        ).found()  # Before our side takes its minutes.


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Raises OptionError unless `text` is positive numbers separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise OptionError(option, f"positive numbers separated by commas, got {text!r}")
    return found


def finish(figures: Sequence[Figure], json_file: Path | None) -> None:
    """Show the figures, and keep them when a file is named; nothing where none was taken."""
    if not figures:
        return
    from holdfast.bench import report
    from holdfast.bench.machine import environment

    out.print(report.show(figures), markup=False)
    if json_file is not None:
        report.append(json_file, figures, environment())


def model_name(prepared: Prepared) -> str:
    return prepared.spec.path.resolve().name


def safety_off(words: Iterable[str]) -> list[str]:
    """Names of the safety switches that a server's command line turns off."""
    given = " ".join(words).replace("=", " ").split()
    off = (("standby", "none"),)
    return [name for name, value in off if (f"--{name}", value) in itertools.pairwise(given)]
