"""A plan as a table, and as a recipe that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrib.errors import UserError
from distrib.files import write_text
from distrib.trace import CLASSES
from launch.recipe import Recipe
from launch.recipe_file import dump_recipe

GIB = 2**30


def show(result: dict[str, Any]) -> None:
    device, speed = result["device"], result["flops_per_s"]
    print(
        f"{result['model']}, {result['max_length']} tokens, on {device['count']} x {device['type']} with "
        f"{device['memory_bytes'] / GIB:.1f} GiB, {device['usable_bytes'] / GIB:.1f} of it to use; GiB a device:"
    )
    head = ["strategy", "engine", *CLASSES, "total", "", "longest", "tokens/s"]
    lines = [head, *(_cells(row) for row in result["rows"] if "bytes" in row)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(cells).rstrip())
    for row in result["rows"]:
        if "why" in row:
            print(f"{row['strategy']} ({row['engine']}) is {row['status']}: {row['why']}")
    rate = f"{speed / 1e12:.3g} TFLOP/s, {result['flops_source']}; forward and backward alone" if speed else "not known"
    print(f"speed: {rate}" if speed else f"speed: {rate} of a device that is elsewhere; give device.flops, as 400T")
    advice = result["recommendation"]
    chosen = f"{advice['strategy']} ({advice['engine']}), {advice['max_length']} tokens: " if advice["strategy"] else ""
    print(f"recommended: {chosen}{advice['reason']}")


def _cells(row: dict[str, Any]) -> list[str]:
    speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
    memory = [f"{row['bytes'][name] / GIB:.2f}" for name in CLASSES]
    mark = "" if row["fidelity"] == "exact" else f" ({row['fidelity']})"
    longest = f"{row['max_length']}{'*' if row['limit'] == 'model' else ''}"
    total = f"{row['total_bytes'] / GIB:.2f}"
    return [row["strategy"] + mark, row["engine"], *memory, total, row["status"], longest, speed]


def check_fit(file: Path) -> None:
    """Before anything is counted."""
    if file.exists():
        raise UserError(f"--fit {file}: is there already; name another file")
    if not file.parent.is_dir():
        raise UserError(f"--fit {file}: {file.parent} is not a folder")


def write_fit(file: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    """The recipe with what is recommended."""
    changes = result["recommendation"]["recipe"]
    if changes is None:
        raise UserError(f"--fit {file}: {result['recommendation']['reason']}")
    whole = recipe.model_dump(exclude_unset=True) | changes
    write_text(file, dump_recipe(Recipe.model_validate(whole)))
