"""A page before it is HTML or Markdown: titles, paragraphs, facts, tables, plots. Both say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distrib.redaction import one_line

LONGEST_NAME = 28


class Cell(NamedTuple):
    """A table's cell: what it shows, and what it is sorted by; cells without an order come last."""

    text: str
    order: float | str | None


@dataclass(frozen=True)
class Notice:
    text: str


@dataclass(frozen=True)
class Facts:
    named: Mapping[str, str]


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Listing:
    label: str
    text: str


@dataclass(frozen=True)
class Plots:
    """SVG, for HTML alone; their text equivalents are in them and in the tables."""

    drawn: Sequence[str]


Block = str | Notice | Facts | Items | Table | Listing | Plots


@dataclass(frozen=True)
class Document:
    title: str
    sections: Sequence[tuple[str, Sequence[Block]]]
    """The first goes without a title."""


def markdown(document: Document) -> str:
    parts = [f"# {_escaped(document.title)}"]
    for title, blocks in document.sections:
        parts += [f"## {_escaped(title)}" if title else "", *map(_markdown, blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Notice(text):
            return f"**{_escaped(text)}**"
        case Facts(named):
            return "\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in named.items())
        case Items(texts):
            return "\n".join(f"- {_escaped(text)}" for text in texts)
        case Table(_, head, rows):
            lines = [_row(head), "|---" * len(head) + "|", *(_row([cell.text for cell in row]) for row in rows)]
            return "\n".join(lines)
        case Listing(label, text):
            return "\n".join([f"{_escaped(label)}:", "", *("    " + line for line in text.splitlines())])
        case Plots():
            return ""
    return _escaped(block)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", one_line(text))


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: the first column to the left, the others to the right; a long name gets a line of its own."""
    lines = [[one_line(cell) for cell in line] for line in [head, *rows]]
    first_width, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first_width = min(first_width, LONGEST_NAME)
    made = []
    for name, *rest in lines:
        if len(name) > first_width:
            made.append(name)
            name = ""
        made.append("  ".join([name.ljust(first_width), *map(str.rjust, rest, widths)]))
    return "\n".join(made)
