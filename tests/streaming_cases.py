"""What the tests of streaming through engines run on every rank, and the truth they compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from contract import reference
from contract.checks import small
from engine_cases import TrainedAdapter, gathered
from torch import Tensor, nn

import strategies
from distrib.contracts import Batch, Context, Engine
from distrib.engines import Settings, make
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from distrib.units import units
from launch.models import build, load_config
from launch.recipe import Recipe

VOCABULARY = reference.VOCABULARY


def recipe(**changes: Any) -> Recipe:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY}
    shape |= {"eos_token_id": None, "initializer_range": 0.1} | changes.pop("config_overrides", {})
    return Recipe(config_overrides=shape, **changes)


@dataclass(frozen=True)
class Case:
    """One global batch: the micro-batches of every data-parallel rank, and how they are run."""

    recipe: Recipe
    dtype: torch.dtype | None
    per_rank: list[list[Batch]]
    weight: float
    strategy: str = "plain"
    fields: dict[str, Any] = field(default_factory=dict)
    objective: strategies.Objective = field(default_factory=strategies.SFT)
    step: int = 0


@dataclass(frozen=True)
class Found:
    loss: Tensor
    gradients: dict[str, Tensor]
    logprobs: list[Tensor]


def prepared(topology: Topology, case: Case) -> tuple[Engine, strategies.Prepared]:
    made_from, config = case.recipe, load_config(case.recipe)
    model = build(made_from, config, case.dtype)
    chosen = strategies.build([{"name": case.strategy, **small(case.strategy), **case.fields}])
    strategies.edit(model, chosen, topology)
    weights = TrainedAdapter(made_from, config, topology)
    settings = Settings(OptimizerSpec(), made_from.bf16, made_from.compile, made_from.engine.stage)
    engine = make(made_from.engine.name, model, weights.fill, topology, settings)
    return engine, strategies.prepare(model, chosen, case.objective, engine=engine)


def run(topology: Topology, case: Case) -> Found:
    """One step over the micro-batches of this rank, and their log-probabilities."""
    topology = replace(topology, context=case.recipe.engine.context_parallel)
    engine, step = prepared(topology, case)
    context = Context(seed=0, step=case.step, weight=case.weight)
    share = case.per_rank[topology.data_rank]
    result = step(share, context)
    gradients = gathered(engine)
    return Found(result.loss, gradients, step.logprobs(share, context))


def drawn_model(made_from: Recipe, dtype: torch.dtype) -> nn.Module:
    """In float64, with the weights that an engine draws in `dtype`."""
    config = load_config(made_from)
    model = build(made_from, config, dtype)
    weights = TrainedAdapter(made_from, config, Topology())
    for name, _ in units(model):
        weights.fill(model, name)
    return model.double()


def truth(case: Case, loss: reference.Loss = reference.sft) -> reference.Truth:
    """Every document of every rank alone, by autograd; the sums of the log-probabilities in the order of the ranks."""
    batches = [batch for batches in case.per_rank for batch in batches]
    return reference.truth(drawn_model(case.recipe, case.dtype or torch.float32), batches, loss, case.weight)
