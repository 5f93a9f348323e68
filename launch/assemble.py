"""What a recipe names, put together: first what can be wrong without weights, then the model and its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import strategies
from distrib.contracts import Window
from distrib.engines import check as check_engine
from distrib.engines import make, tensor_parallel
from distrib.errors import Refused
from distrib.topology import Topology
from launch import sides
from launch.data import Data, open_data
from launch.models import Weights, build, check_vocabulary, load_config, refuse_packing
from launch.objectives import make_objective
from launch.recipe_file import global_batch
from launch.settings import settings_of
from launch.tokenizer import load_tokenizer
from strategies.core.compare import Promise
from strategies.core.objectives import Objective
from strategies.lowbit.frozen import numbers

if TYPE_CHECKING:
    import torch

    from launch.recipe import Recipe


def checked(recipe: Recipe, topology: Topology) -> tuple[Any, list[strategies.Strategy], Topology]:
    """The model's configuration, the strategies, and the ranks as these want them: or what is refused without weights
    and data."""
    chosen = strategies.build([section.model_dump() for section in recipe.strategy])
    topology = strategies.staged(chosen, replace(topology, tensor=recipe.engine.tensor_parallel))
    config = load_config(recipe)
    check_engine(recipe.engine.name, settings_of(recipe), topology)
    if topology.tensor > 1:
        tensor_parallel.check(config, topology)
    strategies.check(chosen, config, topology, recipe.compile)
    if recipe.verify:
        # An approximation that states no bound cannot be held to it.
        Promise.of(chosen)
    if recipe.packing:
        refuse_packing(config)
    if recipe.eval_samples and topology.stages > 1:
        raise Refused(f"eval_samples={recipe.eval_samples}: a pipeline does not generate; set eval_samples=0")
    return config, chosen, topology


@dataclass(frozen=True)
class Parts:
    """Checked against each other; no weights yet."""

    recipe: Recipe
    topology: Topology
    config: Any
    chosen: list[strategies.Strategy]
    objective: Objective
    tokenizer: Any
    data: Data
    global_batch: int

    @classmethod
    def of(cls, recipe: Recipe, topology: Topology) -> Parts:
        config, chosen, topology = checked(recipe, topology)
        objective = make_objective(recipe)
        tokenizer = load_tokenizer(recipe)
        check_vocabulary(config, tokenizer)
        rows = global_batch(recipe, topology.data_world)
        data = open_data(recipe, tokenizer, topology)
        if any(strategy.sized for strategy in chosen):
            from launch.dry import refuse_size

            lines, length = data.longest(recipe.per_device_train_batch_size)["input_ids"].shape
            refuse_size(recipe, config, chosen, lines, length, topology)
        return cls(recipe, topology, config, chosen, objective, tokenizer, data, rows)

    def model(
        self,
        dtype: torch.dtype | None = None,
        weights: Callable[[Recipe, Any, Topology], Weights] = Weights,
        baseline: str | None = None,
    ) -> strategies.Prepared:
        """The step of the edited model in its engine; in `dtype` alone where that is given. A baseline (of
        `launch.sides`) takes the place of the strategies."""
        recipe = self.recipe if dtype is None else self.recipe.model_copy(update={"bf16": False})
        model = build(recipe, self.config, dtype)
        if baseline:
            sides.edit(baseline, model, self.topology)
        else:
            strategies.edit(model, self.chosen, self.topology)
        source = weights(recipe, self.config, self.topology)
        engine = make(recipe.engine.name, model, source.fill, self.topology, settings_of(recipe))
        if baseline:
            return sides.prepare(baseline, model, self.objective, engine)
        return strategies.prepare(model, self.chosen, self.objective, engine)

    def window(self, start: int, stop: int) -> Window:
        """This rank's share of the rows [start, stop)."""
        rank, world = self.topology.data_rank, self.topology.data_world
        return self.data.window(start, stop, rank, world, self.recipe.per_device_train_batch_size)


def described(parts: Parts) -> dict[str, Any]:
    """The model, for people who compare."""
    built = build(parts.recipe, parts.config)
    sizes = [(size, parameter.requires_grad) for parameter, size in numbers(built)]
    precision = "bfloat16" if parts.recipe.bf16 else "float32"
    if parts.recipe.load_in_4bit:
        precision += f", frozen layers in {parts.recipe.bnb_4bit_quant_type}"
    return {
        "name": parts.recipe.model_name_or_path,
        "type": parts.config.model_type,
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trained in sizes if trained),
        "dtype": precision,
    }
