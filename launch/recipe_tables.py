"""`docs/recipes.md`: of every recipe what it is for, the card that it names, and what its plan says of that.

A recipe's first comments say it, and have the command of the plan: `python -m launch.recipe_tables docs/recipes.md
[RECIPE ...]` plans these recipes, or all, and renews their sections.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.plan_show import GIB

START, END = "<!-- recipes: start -->\n", "<!-- recipes: end -->\n"
PLAN = "ebbtide plan "
COMMANDS = ("ebbtide ", "torchrun ")


def comments(path: Path) -> tuple[str, list[str]]:
    """What a recipe's first comments say, and the commands among them."""
    lines = [line[2:] for line in re.match(r"(?:# .*\n)*", path.read_text())[0].splitlines()]  # type: ignore[index]
    said = [line for line in lines if not line.startswith(COMMANDS)]
    return " ".join(said), [line for line in lines if line.startswith(COMMANDS)]


def planned(path: Path) -> dict[str, Any]:
    """The plan that the recipe's own command makes, of the recipe's own strategy."""
    from launch import sides
    from launch.device import device_of, split_words
    from launch.plan import plan
    from launch.recipe_file import load_recipe

    (command,) = (line for line in comments(path)[1] if line.startswith(PLAN))
    words, overrides = split_words(command.removeprefix(PLAN).split()[1:])
    recipe = load_recipe(str(path), overrides)
    own = sides.side_of([section.model_dump() for section in recipe.strategy])
    return plan(recipe, device_of(words, recipe.nproc), own)


def row_of(path: Path, result: dict[str, Any]) -> tuple[str, dict[str, int], str]:
    """What was planned, the bytes of the device that holds most by class, and whether they fit."""
    from launch.recipe_file import load_recipe

    row = result["rows"][0]
    if "pipeline" in result:
        given = next(one for one in load_recipe(str(path)).strategy if one.name == "twobp")
        schedule = given.model_dump().get("schedule", "h1")
        row = next(row for row in result["rows"] if row["schedule"] == schedule)
    if "why" in row:
        return f"{row['status']}: {row['why']}", {}, row["status"]
    if "pipeline" in result:
        rank = max(row["ranks"], key=lambda one: sum(one.values()))
        return f"schedule {row['schedule']}, {row['micro_batches']} micro-batches", rank, row["status"]
    longest = f"{row['max_length']:,} tokens" + (", all that the model takes" if row["limit"] == "model" else "")
    return f"{row['strategy']}, {row['engine']}; the longest that fits: {longest}", row["bytes"], row["status"]


def section(path: Path) -> str:
    text, commands = comments(path)
    result = planned(path)
    what, held, status = row_of(path, result)
    device = result["device"]
    if not any(command.startswith("torchrun") for command in commands):
        commands.append(f"ebbtide train recipes/{path.name}")
    lines = [f"## {path.stem}", "", text, "", "```", *commands, "```", ""]
    lines += [
        f"{result['max_length']:,} tokens on {device['count']} x {device['memory_bytes'] / 1e9:.0f} GB; {what}.",
        "",
        f"| GiB a device | {' | '.join(held)} | total | to use | |",
        f"|---|{'---|' * (len(held) + 3)}",
        f"| | {' | '.join(_gib(size) for size in held.values())} | {_gib(sum(held.values()))} "
        f"| {_gib(device['usable_bytes'])} | {status} |",
        "",
    ]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def tabled(folder: Path) -> list[Path]:
    """The recipes that name a card."""
    return sorted(path for path in folder.glob("*.yaml") if any(one.startswith(PLAN) for one in comments(path)[1]))


def rewrite(page: str, paths: Sequence[Path]) -> str:
    """The page with these recipes' sections renewed, or added."""
    before, rest = page.split(START)
    kept, after = rest.split(END)
    found = {one.split("\n", 1)[0]: f"## {one}" for one in kept.split("## ")[1:]}
    found |= {path.stem: section(path) + "\n" for path in paths}
    return f"{before}{START}{''.join(found[name] for name in sorted(found))}{END}{after}"


if __name__ == "__main__":
    target, *given = map(Path, sys.argv[1:])
    for one in given or tabled(Path("recipes")):
        target.write_text(rewrite(target.read_text(), [one]))
