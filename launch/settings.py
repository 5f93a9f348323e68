"""What a recipe asks of its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distrib.engines import Settings
from distrib.optim import OptimizerSpec

if TYPE_CHECKING:
    from launch.recipe import Recipe


def settings_of(recipe: Recipe) -> Settings:
    spec = OptimizerSpec(**recipe.optimizer.model_dump(), weight_decay=recipe.weight_decay)
    engine = recipe.engine
    return Settings(spec, recipe.bf16, recipe.compile, engine.stage, engine.offload)
