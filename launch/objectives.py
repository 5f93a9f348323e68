"""The objective that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from strategies.core.objectives import DPO, GRPO, SFT, Objective

if TYPE_CHECKING:
    from launch.recipe import Recipe

KINDS: dict[str, Callable[..., Objective]] = {"sft": SFT, "dpo": DPO, "grpo": GRPO}


def make_objective(recipe: Recipe) -> Objective:
    return KINDS[recipe.objective.name](**recipe.objective.model_dump(exclude={"name"}))
