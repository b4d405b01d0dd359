"""StopStrings: finds the first stop string in a text that arrives in pieces, and never leaks it.

Of several stop strings the one that is complete first wins; of those complete at the same
character, the longest. So the result does not depend on how the text was cut. What is held back is
only what could still be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.errors import require


class StopStrings:
    """One choice's matcher. `stops`: non-empty strings; none at all passes everything through."""

    __slots__ = ("_firsts", "_held", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        require(all(stops), "an empty stop string matches everywhere")
        self._stops = tuple(stops)
        self._firsts = {stop[0] for stop in stops}
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing may be fed after it."""

    @property
    def held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def feed(self, text: str) -> str:
        """Add `text`; returns what is safe to show. Look at `matched` afterwards."""
        if not self._stops:
            return text
        assert self.matched is None, "text after a stop string"
        text = self._held + text
        found: tuple[int, int] | None = None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (found is None or (at + len(stop), at) < found):
                found = (at + len(stop), at)
                self.matched = stop
        if found is not None:
            self._held = ""
            return text[: found[1]]
        keep = self._first_possible(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text ended: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_possible(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(text)
