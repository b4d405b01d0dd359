"""The state table as Markdown, for docs/processes.md: `python -m holdfast.proc.lifecycle.document`
writes it there, between the marks."""

from __future__ import annotations

from pathlib import Path

from holdfast.proc.lifecycle.joints import JOINTS, Joint
from holdfast.proc.lifecycle.states import ALIVE, DYING, EMPTY, STATES, Role, State
from holdfast.proc.lifecycle.table import ROWS, Row, Rule, Step
from holdfast.proc.lifecycle.turns import TURNS

BEGIN, END = "<!-- state table: begin -->", "<!-- state table: end -->"


def document() -> str:
    """Three tables; a test compares them with the docs."""
    return "\n".join(
        [
            *_table(
                "### A process and an event",
                ("event", "who", "in state", "becomes", "and", "because"),
                [_row(row) for row in ROWS if not row.rule.never],
            ),
            *_table(
                "### What cannot be, and why",
                ("event", "who", "in state", "because"),
                [_cell(row) for row in ROWS if row.rule.never and row.states != EMPTY],
            ),
            "A word that comes when it cannot be is its speaker's fault: the speaker is broken.",
            "",
            *_table(
                "### What several processes allow together, in this order",
                ("rule", "phase", "who, in state", "while", "becomes", "and", "because"),
                [_joint(joint) for joint in JOINTS],
            ),
            *_table(
                "### The server",
                ("phase", "event", "becomes", "and"),
                [
                    (phase, turn, change.then or "", _and(change.do) or change.why)
                    for (phase, turn), change in TURNS.items()
                    if not change.never
                ],
            ),
        ]
    )


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [title, "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def _row(row: Row) -> tuple[str, ...]:
    rule = row.rule
    return (*_cell(row)[:3], _becomes(rule), _and(rule.do), rule.why or rule.reason)


def _cell(row: Row) -> tuple[str, ...]:
    return (row.event, _who(row.roles), _states(row.roles, row.states), row.rule.why)


def _joint(joint: Joint) -> tuple[str, ...]:
    here = f"{_who(joint.roles)}: {_states(joint.roles, joint.states)}" if joint.roles else ""
    others = [f"{role}: {_states((role,), states)}" for role, states in joint.also.items()]
    becomes = f"server: {joint.turn}" if joint.turn else _becomes(joint)
    why = joint.why or joint.reason
    conditions = "; ".join([*others, *joint.facts])
    return (joint.name, ", ".join(joint.phases), here, conditions, becomes, _and(joint.do), why)


def _becomes(rule: Rule | Joint) -> str:
    return (rule.then or "") + (f" ({rule.within})" if rule.within else "")


def _and(steps: tuple[Step, ...]) -> str:
    return "; ".join(steps)


def _who(roles: tuple[Role, ...]) -> str:
    return "any" if roles == tuple(Role) else ", ".join(roles)


def _states(roles: tuple[Role, ...], states: tuple[State, ...]) -> str:
    """Groups by their name; states that none of the roles has are left out."""
    had = {state for role in roles for state in STATES[role]}
    names = {(*ALIVE, *DYING): "any with a process", ALIVE: "any alive", DYING: "any dying"}
    if states in names:
        return names[states]
    missing = [state for state in State if state not in states]
    if len(missing) == 1:
        return f"any but {missing[0]}"
    return ", ".join(state for state in states if state in had)


def main() -> None:
    path = Path(__file__).parents[3] / "docs" / "processes.md"
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{document()}\n{END}{after}")


if __name__ == "__main__":
    main()
