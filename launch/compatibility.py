"""Which strategies go together, and on which engines: what `train` says of each pair before it builds anything.

`python -m launch.compatibility FILE` renews the tables between the markers of a page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import strategies
from distrib.errors import UserError
from distrib.topology import Topology
from launch.assemble import checked
from launch.recipe import Recipe

OK = "ok"
RANKS = Topology(world=2, local_world=2)
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero 1": {"name": "zero", "stage": 1},
    "zero 2": {"name": "zero", "stage": 2},
    "zero 3": {"name": "zero", "stage": 3},
    "tensor_parallel": {"name": "fsdp2", "tensor_parallel": 2},
    "context_parallel": {"name": "ddp", "context_parallel": 2},
}
"""A column each: an engine as a recipe has it."""
START, END = "<!-- tables: start -->", "<!-- tables: end -->"

Verdicts = dict[str, dict[str, str]]


def verdict(names: Iterable[str], engine: Mapping[str, Any] = ENGINES["ddp"]) -> str:
    """`ok`, or `refused: ` and why: of strategies together, with the fields they have by themselves, on two ranks."""
    asked = {"strategy": [{"name": name} for name in names], "engine": dict(engine)}
    try:
        checked(Recipe.model_validate(asked), RANKS)
    except UserError as error:
        return f"refused: {error}"
    return OK


def pairs() -> Verdicts:
    """Of each strategy with each other one."""
    names = strategies.names()
    found: Verdicts = {name: {} for name in names}
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            found[name][other] = found[other][name] = verdict([name, other])
    return {name: {other: row[other] for other in names if other != name} for name, row in found.items()}


def engines() -> Verdicts:
    """Of each strategy on each engine."""
    return {name: {label: verdict([name], engine) for label, engine in ENGINES.items()} for name in strategies.names()}


def tables() -> str:
    """As Markdown, with the reasons as footnotes."""
    notes: dict[str, int] = {}
    parts = [_table(strategies.names(), pairs(), notes), _table(list(ENGINES), engines(), notes)]
    return "\n".join([*parts, *(f"[^{number}]: {why}" for why, number in notes.items()), ""])


def _table(columns: Sequence[str], rows: Verdicts, notes: dict[str, int]) -> str:
    def cell(said: str | None) -> str:
        if said is None or said == OK:
            return "yes" if said else "–"
        return f"no[^{notes.setdefault(said.removeprefix('refused: '), len(notes) + 1)}]"

    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| **{name}** | {' | '.join(cell(row.get(column)) for column in columns)} |")
    return "\n".join(lines) + "\n"


def rewrite(page: str) -> str:
    """The page with the tables between its markers renewed."""
    before, rest = page.split(START)
    return f"{before}{START}\n{tables()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewrite(target.read_text()))
