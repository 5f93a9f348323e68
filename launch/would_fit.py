"""What would have fitted, for whom memory has run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distrib.errors import OutOfMemory

if TYPE_CHECKING:
    from launch.recipe import Recipe

LEANEST = "streambp:offload=true"
ASK = "`ebbtide plan` says what would fit"


@contextmanager
def saying_what_would_fit(recipe: Recipe, world: int) -> Iterator[None]:
    try:
        yield
    except OutOfMemory as error:
        # Starting again with half as many sequences needs no advice.
        if recipe.on_oom == "halve":
            raise
        raise OutOfMemory(f"{error}; {would_fit(recipe, world)}") from None


def would_fit(recipe: Recipe, world: int) -> str:
    """By plan, at so many sequences at once as the recipe has; where plan cannot tell, how to ask it for others."""
    from launch.device import device_of
    from launch.plan import Planner
    from launch.sides import side_of

    own = side_of([section.model_dump() for section in recipe.strategy])
    try:
        planner = Planner(recipe, device_of({}, world))
        rows = [planner.row(side, recipe.engine) for side in dict.fromkeys([own, LEANEST])]
    except Exception:
        # Whatever it stumbles over, memory that ran out is what has to be said.
        return ASK
    known = [f"{row['strategy']} {row['max_length']}" for row in rows if row.get("max_length") is not None]
    if not known:
        return ASK
    return (
        f"by plan, so many tokens would fit, {recipe.per_device_train_batch_size} sequences at once: {', '.join(known)}"
    )
