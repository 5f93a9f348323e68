"""The list of strategies that this installation has, and what each goes together with."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import MISSING
from typing import Any

import strategies
from launch import compatibility
from strategies.core.registry import defaults_of


def strategies_listed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pairs, engines = compatibility.pairs(), compatibility.engines()
    for name in strategies.names():
        kind = strategies.get(name)
        defaults = {key: None if value is MISSING else value for key, value in defaults_of(kind).items()}
        idea = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
        row = {"name": name, "fidelity": kind.fidelity.name.lower(), "fields": defaults, "idea": idea}
        rows.append({**row, "with": pairs[name], "engines": engines[name]})
    return rows


def listed(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        given = " ".join(f"{key}={value}" for key, value in row["fields"].items())
        lines.append(f"{row['name']:16} {row['fidelity']:12} {given}".rstrip())
        together, on = (", ".join(_ok(row[key])) or "none" for key in ("with", "engines"))
        texts = (row["idea"], f"With: {together}. On: {on}.")
        lines += [textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="    ") for text in texts]
    return "\n".join(lines)


def _ok(verdicts: dict[str, str]) -> list[str]:
    return [name for name, said in verdicts.items() if said == compatibility.OK]
