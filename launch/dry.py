"""The largest micro-batch run forwards without data, for strategies that may refuse it for its size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import strategies
from distrib.topology import Topology
from distrib.tracker import Tracker, materialise, tracking
from launch.models import build

if TYPE_CHECKING:
    from launch.recipe import Recipe


def refuse_size(
    recipe: Recipe,
    config: Any,
    chosen: Sequence[strategies.Strategy],
    rows: int,
    length: int,
    topology: Topology | None = None,
) -> None:
    """Raises what the strategies would say in the first step, of a pipeline on this rank's layers."""
    topology = topology or Topology()
    cast = recipe.bf16 and recipe.engine.name == "zero"
    fake = FakeTensorMode()
    model = build(recipe, config, torch.bfloat16 if cast else None).train()
    strategies.edit(model, chosen, topology)
    materialise(model, fake)
    with ExitStack() as stack:
        stack.enter_context(tracking(fake, Tracker()))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16 and not cast))
        ids = torch.zeros(rows, length, dtype=torch.int64)
        model(input_ids=ids, **({"labels": ids} if topology.stages == 1 else {"hidden_only": True}))
