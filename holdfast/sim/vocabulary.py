"""The simulation's tokenizer: a table of ids to bytes in which everything awkward happens often.

Texts over a small alphabet, so that short stop strings hit; ids without text; ids that end in the
middle of a character of two, three or four bytes, and ids that go on there or do not. Fixed: a
trace must not depend on anything but its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from holdfast.api.detokenize import TableDetokenizer

VOCAB = 251
# Characters of more than one byte; every fragment in the table is a piece of one of them.
WIDE = ("é", "€", "🙂")
ALPHABET = ("a", "b", "c", *WIDE)
STOPS_MAX = 3


def _table() -> tuple[bytes, ...]:
    rng = Random(20_261)
    table = []
    for _ in range(VOCAB):
        kind = rng.random()
        if kind < 0.15:
            table.append(b"")
        elif kind < 0.6:
            table.append("".join(rng.choices("abc", k=rng.randint(1, 3))).encode())
        elif kind < 0.7:
            table.append(rng.choice(WIDE).encode())
        else:
            wide = rng.choice(WIDE[:2]).encode()
            cut = rng.randint(1, len(wide) - 1)
            piece = rng.choice([wide[:cut], wide[cut:]])
            # A fragment alone, or with a letter on the side where it is not cut.
            letter = rng.choice([b"", b"", b"a", b"b"])
            table.append(letter + piece if piece == wide[:cut] else piece + letter)
    table[VOCAB - 2 :] = "🙂".encode()[:2], "🙂".encode()[2:]
    return tuple(table)


TABLE = _table()


class Vocabulary:
    """What api.output needs of a tokenizer."""

    def detokenizer(
        self, before: Sequence[int] = (), *, skip_special: bool = True
    ) -> TableDetokenizer:
        return TableDetokenizer(TABLE)


def draw_stops(rng: Random) -> tuple[str, ...]:
    """One to three short stop strings; often one is a part of another, or goes on where it ends."""
    first = "".join(rng.choices(ALPHABET, weights=(4, 4, 4, 2, 2, 1), k=rng.randint(1, 4)))
    stops = [first]
    for _ in range(rng.randint(0, STOPS_MAX - 1)):
        letter = rng.choice(ALPHABET[:4])
        stops.append(
            rng.choice([first + letter, letter + first, first[-1] + letter, letter + letter])
        )
    return tuple(dict.fromkeys(stops))
