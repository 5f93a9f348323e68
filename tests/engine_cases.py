"""What the engine tests run on every rank, and the reference they compare with: plain autograd on one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from contract.checks import small
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import strategies
from distrib.contracts import Batch, Context, Engine
from distrib.engines import Settings, make
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from distrib.units import units
from launch.models import Weights, build, load_config
from launch.recipe import Recipe
from strategies.lowbit.frozen import four_bit

IGNORE = -100


def recipe(**changes: Any) -> Recipe:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50}
    overrides = shape | changes.pop("config_overrides", {})
    return Recipe(config_overrides=overrides, **changes)


def ragged_rows(count: int = 4, seed: int = 0) -> list[tuple[list[int], int]]:
    """(tokens, length of the prompt, which is not learned) of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 5 + 4 * index
        rows.append((torch.randint(50, (length,), generator=generator).tolist(), 1 + index))
    return rows


def padded(rows: list[tuple[list[int], int]], learn: bool = True) -> Batch:
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE)
    for index, (tokens, prompt) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        if learn:
            labels[index, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "labels": labels}


class TrainedAdapter(Weights):
    """LoRA's B starts at zero, which would hide every mistake in A's gradient: here it does not."""

    def fill(self, model: nn.Module, unit_name: str) -> None:
        super().fill(model, unit_name)
        for name, parameter in model.get_submodule(unit_name).named_parameters(prefix=unit_name):
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data.normal_(std=0.1, generator=generator)


def make_engine(
    topology: Topology, made_from: Recipe, dtype: torch.dtype | None, strategy: str = "plain"
) -> tuple[Engine, strategies.Prepared]:
    config = load_config(made_from)
    model = build(made_from, config, dtype)
    chosen = strategies.build([{"name": strategy, **small(strategy)}])
    asked = made_from.engine
    topology = replace(topology, tensor=asked.tensor_parallel, context=asked.context_parallel)
    strategies.edit(model, chosen, topology)
    weights = TrainedAdapter(made_from, config, topology)
    settings = Settings(OptimizerSpec(), made_from.bf16, made_from.compile, made_from.engine.stage)
    engine = make(made_from.engine.name, model, weights.fill, topology, settings)
    return engine, strategies.prepare(model, chosen, engine=engine)


def gathered(engine: Engine) -> dict[str, Tensor]:
    """Every trainable parameter's whole gradient, by its name in the model."""
    if engine.name == "zero":
        return {name: gradient.clone() for name, gradient, _ in engine.gradients()}
    whole = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            whole[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return whole


def reference(made_from: Recipe, rows: list[tuple[list[int], int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy over all learned tokens, a row at a time, by autograd alone: in float64, of
    weights that were drawn in `dtype`."""
    config = load_config(made_from)
    model = build(made_from, config, dtype)
    weights = TrainedAdapter(made_from, config, Topology())
    for name, _ in units(model):
        weights.fill(model, name)
    model.double()
    learned = sum(len(tokens) - prompt for tokens, prompt in rows)
    for tokens, prompt in rows:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        (F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(tokens[prompt:]), reduction="sum") / learned).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def packed_bytes(topology: Topology, made_from: Recipe) -> int:
    """What this rank has of a 4-bit base."""
    engine, _ = make_engine(topology, made_from, torch.float32)
    held = [p for _, linear in four_bit(engine.model) for p in (linear.weight, linear.scales)]
    local = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in held]
    return sum(p.nbytes for p in local)


def gradients(
    topology: Topology,
    made_from: Recipe,
    dtype: torch.dtype,
    per_rank: list[list[Batch]],
    strategy: str = "plain",
) -> dict[str, Tensor]:
    """One step over the micro-batches of this rank, or of this group of ranks."""
    engine, step = make_engine(topology, made_from, dtype, strategy)
    weight = sum(float((batch["labels"] != IGNORE).sum()) for batches in per_rank for batch in batches)
    step(per_rank[engine.topology.data_rank], Context(seed=0, step=0, weight=weight))
    return gathered(engine)
