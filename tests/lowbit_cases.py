"""What the tests of 4-bit linears under engines run on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from engine_cases import gathered
from streaming_cases import Case, prepared
from torch import Tensor

import launch.train
from distrib.contracts import Context
from distrib.engines.local import Local
from distrib.topology import Topology
from launch.recipe import Recipe
from strategies import Prepared
from strategies.core.truth import true_gradients
from strategies.lowbit.linear import units


@dataclass(frozen=True)
class Drawn:
    """Of several steps: this rank's first loss, and each step's gradients."""

    loss: float
    gradients: list[dict[str, Tensor]]


def draw(topology: Topology, case: Case, steps: int) -> Drawn:
    engine, step = prepared(topology, case)
    share = case.per_rank[topology.rank]
    losses, found = [], []
    for number in range(steps):
        losses.append(float(step(share, Context(0, number, case.weight)).loss))
        found.append(gathered(engine))
        engine.zero_grad()
    return Drawn(losses[0], found)


def true(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Of the forward as it is rounded, in one process."""
    engine, _ = prepared(Topology(), case)
    batches = [batch for share in case.per_rank for batch in share]
    loss = true_gradients(engine, case.objective, batches, Context(0, 0, case.weight))
    return float(loss), gathered(engine)


def drawn_as(rank: int, case: Case) -> dict[str, Tensor]:
    """By that rank alone, without the others."""
    engine, step = prepared(Topology(), case)
    units(engine.model)[0][0].shared.draws.rank = rank
    step(case.per_rank[rank], Context(0, 0, case.weight))
    return gathered(engine)


def train_and_look(made_from: Recipe, topology: Topology) -> dict[str, Any]:
    """After a run: what checkpoints keep of the strategies, the account, and what the model says of some tokens in
    evaluation."""
    kept: dict[str, Any] = {}
    finish = launch.train._finish

    def look(recipe: Recipe, config: Any, run: Any, step: Prepared, progress: Any) -> dict[str, Any]:
        kept.update(state=step.state(), accounts=step.accounts())
        if topology.world == 1:
            ids = torch.arange(7)[None] + 99
            with torch.no_grad():
                kept["logits"] = Local(step.model.eval()).model(input_ids=ids).logits.numpy()
                step.model.train()
        return finish(recipe, config, run, step, progress)

    launch.train._finish = look
    launch.train.train(made_from, topology)
    return kept
