"""What the tests of scaling run on every rank: steps of a small model, of which the last is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from wire import Wire

import strategies
from distrib.contracts import Context
from distrib.engines import make
from distrib.topology import Topology
from launch.models import Weights, build, load_config
from launch.recipe import Recipe
from launch.settings import settings_of

STEPS = 3
"""DDP makes its buckets anew after the first one, ZeRO-3 learns the order of its weights in two."""
Seen = Counter[tuple[str, int, int]]


def step(topology: Topology, recipe: Recipe) -> tuple[Seen, dict[str, int]]:
    """The messages of a step, and the bytes of what lasts."""
    chosen = strategies.build([section.model_dump() for section in recipe.strategy])
    topology = strategies.staged(chosen, topology)
    config = load_config(recipe)
    model = build(recipe, config)
    strategies.edit(model, chosen, topology)
    engine = make(recipe.engine.name, model, Weights(recipe, config, topology).fill, topology, settings_of(recipe))
    prepared = strategies.prepare(model, chosen, engine=engine)
    ids = torch.arange(recipe.max_length)[None] % config.vocab_size
    batches = [{"input_ids": ids, "labels": ids}] * recipe.gradient_accumulation_steps
    for index in range(STEPS):
        wire = Wire()
        with wire:
            prepared(batches, Context(0, index, float(ids.numel() * len(batches) * topology.data_world)))
            engine.step(1e-3, 1.0)
    return wire.seen, lasting(engine)


def lasting(engine: Any) -> dict[str, int]:
    """On this rank: the weights that the engine keeps in the products' precision, and the optimizer's states."""
    optimizer = engine.module.optimizer.optimizer if engine.name == "zero" else engine.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "weights": _bytes([getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: list[Any]) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
