"""Bars as SVG: ours, the peer's and the floor, a group a place. No library draws them.

Light and dark pages alike: text takes the page's colour, bars have fixed ones. Widths in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

OURS, PEER, FLOOR = "#2f6fde", "#b9bfca", "#d9822b"
TEXT, FAINT = "#6b7280", "#8b93a1"
BARS_WIDTH, NUMBERS_WIDTH = 430, 90
# Of a letter at 12 pixels in most fonts, a little generously: labels must not be cut.
LETTER_WIDTH = 6.8
BAR, GAP, GROUP_GAP, HEAD, FOOT = 15, 3, 14, 46, 12


@dataclass(frozen=True, slots=True)
class Group:
    """`shown` is the text at the bar's end."""

    label: str
    ours: float
    ours_shown: str
    peer: float | None = None
    peer_shown: str = ""
    floor: float | None = None


def draw(title: str, unit: str, groups: list[Group], *, peer: str, better: str) -> str:
    """The SVG text. better: "more" or "less". Bars begin at zero, all in one scale."""
    assert groups, "nothing to draw"
    values = [v for g in groups for v in (g.ours, g.peer, g.floor) if v is not None]
    scale = BARS_WIDTH / (max(values) or 1.0)
    left = max(80, round(20 + LETTER_WIDTH * max(len(group.label) for group in groups)))
    parts, y = [], HEAD
    for group in groups:
        top = y
        parts.append(_text(left - 10, y + BAR - 3, group.label, "end"))
        y = _bar(parts, left, y, group.ours * scale, OURS, group.ours_shown)
        if group.peer is not None:
            y = _bar(parts, left, y, group.peer * scale, PEER, group.peer_shown)
        if group.floor is not None:
            x = left + group.floor * scale
            parts.append(
                f'<line x1="{x:.1f}" y1="{top - 3}" x2="{x:.1f}" y2="{y}" '
                f'stroke="{FLOOR}" stroke-width="2"/>'
            )
        y += GROUP_GAP
    width, height = left + BARS_WIDTH + NUMBERS_WIDTH, y - GROUP_GAP + FOOT
    head = [_text(10, 17, f"{title}, {unit} ({better} is better)", "start", weight="bold")]
    keys = [(OURS, "holdfast")]
    keys += [(PEER, peer)] if any(g.peer is not None for g in groups) else []
    keys += [(FLOOR, "floor")] if any(g.floor is not None for g in groups) else []
    x = left
    for colour, name in keys:
        head.append(f'<rect x="{x}" y="25" width="10" height="10" fill="{colour}"/>')
        head.append(_text(x + 15, 34, name, "start", colour=FAINT))
        x += 30 + 8 * len(name)
    body = "\n".join(head + parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">\n'
        f"<title>{escape(title)}</title>\n{body}\n</svg>\n"
    )


def _bar(parts: list[str], left: int, y: int, width: float, colour: str, shown: str) -> int:
    """Draws it; where the next one begins."""
    parts.append(
        f'<rect x="{left}" y="{y}" width="{max(width, 1):.1f}" height="{BAR}" rx="2" '
        f'fill="{colour}"/>'
    )
    parts.append(_text(left + width + 6, y + BAR - 3, shown, "start", colour=FAINT))
    return y + BAR + GAP


def _text(
    x: float, y: float, text: str, anchor: str, *, colour: str = TEXT, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
