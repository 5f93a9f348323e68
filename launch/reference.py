"""The reference of DPO and GRPO: the policy as it was before training, by its adapter switched off or a frozen copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

import strategies
from distrib.contracts import Batch, Context, Engine, Step, evaluating
from distrib.engines import Settings, make
from launch.models import Weights, build

if TYPE_CHECKING:
    from launch.recipe import Recipe

Annotate = Callable[[list[Batch], Context], None]


def annotator(recipe: Recipe, config: Any, engine: Engine, step: strategies.Prepared) -> Annotate:
    """What gives each micro-batch the reference's log-probabilities, when the objective compares with them."""
    if not _compares(recipe):
        return lambda batches, context: None
    if recipe.lora_r:
        return lambda batches, context: _without_adapter(engine.model, step, batches, context)
    frozen = _frozen_copy(recipe, config, engine, step)
    return lambda batches, context: _annotate(frozen.model, frozen, batches, context)


def _compares(recipe: Recipe) -> bool:
    return recipe.objective.name == "dpo" or (recipe.objective.name == "grpo" and recipe.objective.beta > 0)


def _annotate(model: nn.Module, step: Step, batches: list[Batch], context: Context) -> None:
    with evaluating(model):
        for batch, logprobs in zip(batches, step.logprobs(batches, context), strict=True):
            batch["reference_logprobs"] = logprobs


def _without_adapter(model: nn.Module, step: Step, batches: list[Batch], context: Context) -> None:
    with _adapter_off(model):
        _annotate(model, step, batches, context)


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    """PEFT's own switch also flips requires_grad, which sharding engines have taken note of."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _frozen_copy(recipe: Recipe, config: Any, engine: Engine, step: strategies.Prepared) -> strategies.Prepared:
    """In the same stages, where the model is a pipeline's."""
    model = build(recipe, config)
    model.requires_grad_(False)
    pipeline = [strategy for strategy in step.strategies if strategy.pipeline(engine.topology.world) > 1]
    plain = pipeline or [strategies.get("plain")()]
    strategies.edit(model, plain, engine.topology)
    settings = Settings(optimizer=None, bf16=recipe.bf16, stage=recipe.engine.stage, offload=recipe.engine.offload)
    weights = Weights(recipe, config, engine.topology)
    copy = make(recipe.engine.name, model, weights.fill, engine.topology, settings)
    return strategies.prepare(model, plain, engine=copy)
