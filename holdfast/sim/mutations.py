"""Mutations: real bugs of the field, each put into one production function to see it caught.

A mutation is a change of source text: the function's own source, in which `old` must stand exactly
once, recompiled with `new` in its place. So there are no hooks in production code, and a mutation
whose place has moved fails loudly (`MutationStale`) instead of testing nothing.

`hunt` runs worlds until one sees the mutation. The unmutated engine must pass all of them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.sim.simulator import Outcome, simulate
from holdfast.sim.world import PROFILES, draw


class MutationStale(Exception):
    """The text that a mutation changes is not there (once) any more."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`where`: module:Class.function or module:function. `bug`: the sentence it makes untrue."""

    name: str
    bug: str
    where: str
    old: str
    new: str


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The production function with the bug in it, for as long as the context lasts."""
    module_name, _, path = mutation.where.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name)
    function = original.fget if isinstance(original, property) else original
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutation.old) != 1:
        raise MutationStale(f"{mutation.name}: {source.count(mutation.old)} times in {path}")
    indent = " " * _indent_of(source, mutation.old)
    # New lines of a replacement continue at the indent of the line they replace.
    new = mutation.new.replace("\n    ", "\n" + indent).replace("\n" + indent * 2, "\n" + indent)
    source = source.replace(mutation.old, new).replace("@property\n", "")
    scope: dict[str, Any] = {}
    code = compile(source, f"<mutation {mutation.name}>", "exec", flags=0x100000, dont_inherit=True)
    exec(code, module.__dict__ | {"__class__": owner}, scope)
    changed: Any = _rebound(scope[function.__name__], module)
    if isinstance(original, property):
        changed = property(changed)
    # A module's function is also where others have imported it by name.
    places = [owner]
    if owner is module:
        places = [
            other
            for title, other in list(sys.modules.items())
            if title.startswith("holdfast.") and getattr(other, name, None) is original
        ]
    for place in places:
        setattr(place, name, changed)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, original)


def _indent_of(source: str, text: str) -> int:
    line = source[: source.index(text)].rsplit("\n", 1)[-1]
    return len(line) - len(line.lstrip())


def _rebound(function: Any, module: Any) -> Any:
    """The function with the module's own globals, so that it sees what others patch."""
    import types

    rebound = types.FunctionType(
        function.__code__, module.__dict__, function.__name__, function.__defaults__
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


def hunt(mutation: Mutation, seeds: int = 200, first: int = 0) -> tuple[int, Outcome] | None:
    """The first of `seeds` seeds that sees the bug in any profile, and how; None if none does."""
    with applied(mutation):
        for number in range(first, first + seeds):
            for profile in PROFILES:
                outcome = simulate(draw(number, profile))
                if outcome.violation is not None:
                    return number, outcome
    return None
