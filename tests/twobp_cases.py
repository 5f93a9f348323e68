"""What the tests of pipelines run on every rank, and the truth they compare with: autograd on each document alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from contract import reference
from engine_cases import TrainedAdapter, gathered
from ranks import own_groups
from streaming_cases import drawn_model
from torch import Tensor

import strategies
from distrib.contracts import Batch, Context, Engine
from distrib.engines import Settings, make
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from launch.models import build, load_config
from launch.recipe import Recipe
from strategies.pipelining.store import Store

LAYERS = 5


def recipe(**changes: Any) -> Recipe:
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": None}
    shape |= {"vocab_size": reference.VOCABULARY, "initializer_range": 0.1} | changes.pop("config_overrides", {})
    return Recipe(config_overrides=shape, **changes)


@dataclass(frozen=True)
class Case:
    """One global batch: the micro-batches of every replica, and how they are run."""

    recipe: Recipe
    strategies: list[dict[str, Any]]
    per_replica: list[list[Batch]]
    dtype: torch.dtype = torch.float64
    objective: strategies.Objective = field(default_factory=strategies.SFT)

    @property
    def total(self) -> float:
        batches = [batch for batches in self.per_replica for batch in batches]
        return float(sum(self.objective.weight(batch) for batch in batches))


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    loss: float
    gradients: dict[str, Tensor]
    logprobs: list[Tensor]
    replica: int
    norm: float
    accounts: dict[str, Any]


def prepared(topology: Topology, case: Case) -> tuple[Engine, strategies.Prepared]:
    config = load_config(case.recipe)
    model = build(case.recipe, config, case.dtype)
    chosen = strategies.build(case.strategies)
    topology = strategies.staged(chosen, topology)
    strategies.edit(model, chosen, topology)
    weights = TrainedAdapter(case.recipe, config, topology)
    settings = Settings(OptimizerSpec(), case.recipe.bf16)
    engine = make(case.recipe.engine.name, model, weights.fill, topology, settings)
    return engine, strategies.prepare(model, chosen, case.objective, engine=engine)


def run(topology: Topology, case: Case) -> Found:
    with _groups(case):
        return _run(topology, case)


def _groups(case: Case) -> AbstractContextManager[None]:
    return own_groups() if case.recipe.engine.name == "ddp" else nullcontext()


def _run(topology: Topology, case: Case) -> Found:
    """Two steps over micro-batches of this rank's replica, of which the first is forgotten, and log-probabilities."""
    engine, step = prepared(topology, case)
    share = case.per_replica[engine.topology.data_rank]
    context = Context(seed=0, step=0, weight=case.total)
    step(share, context)
    engine.zero_grad()
    result = step(share, context)
    gradients = gathered(engine)
    norm = engine.grad_norm()  # type: ignore[attr-defined]
    engine.zero_grad()
    return Found(
        float(result.loss), gradients, step.logprobs(share, context), engine.topology.data_rank, norm, step.accounts()
    )


def waited(topology: Topology, case: Case) -> list[int]:
    """How many products each W of a step on this rank has to do."""
    counts: list[int] = []

    class Counting(Store):
        def run(self, key: Hashable) -> None:
            counts.append(len(self._waiting[key]))
            super().run(key)

    # Another case's DeepSpeed may have put its own in this place.
    with _groups(case), patch("torch.nn.functional.linear", torch._C._nn.linear):
        engine, step = prepared(topology, case)
        for part in step.step.parts.values():  # type: ignore[attr-defined]
            part.store = Counting()
        step(case.per_replica[engine.topology.data_rank], Context(seed=0, step=0, weight=case.total))
    return counts


def truth(case: Case, loss: reference.Loss = reference.sft) -> reference.Truth:
    batches = [batch for batches in case.per_replica for batch in batches]
    return reference.truth(drawn_model(case.recipe, case.dtype), batches, loss, case.total)


def errors(found: Sequence[Found], wanted: reference.Truth) -> dict[str, float]:
    """The largest differences from the truth, relative: of gradients on any rank, their norm, the loss, and
    log-probabilities. Together the ranks have every parameter."""
    names = {name for one in found for name in one.gradients}
    assert names == wanted.gradients.keys()
    gradients = max(
        float((gradient.double() - wanted.gradients[name]).norm() / wanted.gradients[name].norm())
        for one in found
        for name, gradient in one.gradients.items()
    )
    replicas = {one.replica: one for one in found}
    right = torch.stack([gradient.norm() for gradient in wanted.gradients.values()]).norm()
    logprobs = [x for number in sorted(replicas) for x in replicas[number].logprobs]
    return {
        "gradients": gradients,
        "norm": max(abs(one.norm - float(right)) / float(right) for one in found),
        "loss": abs(sum(one.loss for one in replicas.values()) - float(wanted.loss)) / abs(float(wanted.loss)),
        "logprobs": max(float((x - y).abs().max()) for x, y in zip(logprobs, wanted.logprobs, strict=True)),
    }
