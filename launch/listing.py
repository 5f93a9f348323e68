"""The list of strategies that this installation has."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

import strategies


def strategies_listed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in strategies.names():
        kind = strategies.get(name)
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        idea = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
        rows.append({"name": name, "fidelity": kind.fidelity.name.lower(), "fields": defaults, "idea": idea})
    return rows


def listed(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        given = " ".join(f"{key}={value}" for key, value in row["fields"].items())
        lines.append(f"{row['name']:16} {row['fidelity']:12} {given}".rstrip())
        lines.append(textwrap.fill(row["idea"], 110, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)
