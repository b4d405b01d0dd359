"""Every drill there is, in the order of `holdfast drill list` and `run all`."""

from __future__ import annotations

from holdfast.drill import faults, graphs, input, load, pages, processes
from holdfast.drill.drill import Drill
from holdfast.errors import OptionError

_FAMILIES: tuple[Drill, ...] = (
    *faults.DRILLS,
    *processes.DRILLS,
    *pages.DRILLS,
    *load.DRILLS,
    *input.DRILLS,
    *graphs.DRILLS,
)

_NEEDS = [drill.needs for drill in _FAMILIES]
# Neighbours share a server, so those with equal needs are neighbours.
DRILLS = tuple(sorted(_FAMILIES, key=lambda drill: _NEEDS.index(drill.needs)))


def chosen(name: str) -> tuple[Drill, ...]:
    """The drill of this name, or all. Raises OptionError."""
    found = tuple(drill for drill in DRILLS if name in ("all", drill.name))
    if not found:
        names = ", ".join(drill.name for drill in DRILLS)
        raise OptionError("NAME", f"no drill is called {name!r}; there are all, {names}")
    return found
