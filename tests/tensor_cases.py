"""What the tests of tensor parallelism run on every rank, and one process to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import all_families
import torch
import torch.distributed as dist
import torch.nn.functional as F
from engine_cases import IGNORE, gathered, make_engine
from torch import Tensor
from torch.distributed.tensor import DTensor

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import Settings, make, tensor_parallel
from distrib.errors import Refused
from distrib.topology import Topology
from distrib.units import blocks
from launch import sides
from launch.recipe import Recipe
from strategies.core.compare import own_parts

LENGTH = 512


def norms(topology: Topology, made_from: Recipe, batches: list[Batch]) -> tuple[float, float]:
    """Of the whole gradient, as it is clipped by and as it is compared."""
    engine, step = make_engine(topology, made_from, torch.float64)
    step(batches, Context(0, 0, float(sum((batch["labels"] != IGNORE).sum() for batch in batches))))
    total = sum((part.square().sum() for _, part in own_parts(engine)), torch.zeros(()))
    dist.all_reduce(total)
    return engine.grad_norm(), float(total.sqrt())  # type: ignore[attr-defined]


def rows() -> Batch:
    """Of an odd length, all of it learned."""
    ids = torch.randint(all_families.PADDING, (2, 13), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def plain_gradients(family: str) -> dict[str, Tensor]:
    model: Any = all_families.build(family)
    batch = rows()
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].double()
    F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to each gradient, or to a thousandth of the largest, since some are 0 but for rounding."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[n] - expected[n]).norm()) / max(float(expected[n].norm()), floor) for n in expected)


def of_family(topology: Topology, family: str, side: str = "plain") -> dict[str, Tensor] | str:
    """Or why it is refused."""
    topology = replace(topology, tensor=topology.world)
    try:
        model: Any = all_families.build(family)
        tensor_parallel.check(model.config, topology)
        step = _prepared(model, topology, side)
    except Refused as error:
        return str(error)
    for _ in range(2):
        # What a step leaves behind must not reach the next one.
        step.engine.zero_grad()
        step([rows()], Context(0, 0, float(rows()["labels"][:, 1:].numel())))
    return gathered(step.engine)


def sharded(topology: Topology, family: str) -> dict[str, Tensor]:
    """Each rank has all rows: the gradients of their mean."""
    model: Any = all_families.build(family)
    sides.edit("plain", model, topology)
    engine = make("fsdp2", model, lambda *_: None, topology, Settings(optimizer=None))
    step = sides.prepare("plain", model, engine=engine)
    step([rows()], Context(0, 0, float(topology.world * rows()["labels"][:, 1:].numel())))
    return gathered(engine)


def dropped(topology: Topology) -> tuple[Tensor, Tensor]:
    """What dropout leaves of a part in the first block, and a number drawn after the blocks."""
    topology = replace(topology, tensor=topology.world)
    model: Any = all_families.build("gpt_neox", hidden_dropout=0.5)
    _prepared(model, topology)
    model.train()
    found = []
    block = model.gpt_neox.layers[0]
    block.post_mlp_dropout.register_forward_hook(lambda _, __, output: found.append(output != 0))
    torch.manual_seed(0)
    model(input_ids=torch.arange(16)[None] % all_families.PADDING, use_cache=False)
    return found[0], torch.rand(())


def _prepared(model: Any, topology: Topology, side: str = "plain") -> strategies.Prepared:
    sides.edit(side, model, topology)
    engine = make("fsdp2", model, lambda *_: None, topology, Settings(optimizer=None))
    return sides.prepare(side, model, engine=engine)


def kept_bytes(topology: Topology, family: str) -> int:
    """What the layers keep for the backward of one row: tensors with positions, whole or this rank's."""
    topology = replace(topology, tensor=topology.world)
    model: Any = all_families.build(family, max_position_embeddings=LENGTH).float()
    if topology.tensor > 1:
        _prepared(model, topology)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if {LENGTH, LENGTH // topology.tensor} & set(local.shape):
            storage = local.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = [layer for _, layer in blocks(model)]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    layers[0].register_forward_pre_hook(lambda *_: hooks.__enter__())
    layers[-1].register_forward_hook(lambda *_: hooks.__exit__())
    ids = torch.arange(LENGTH)[None] % all_families.PADDING
    model(input_ids=ids, use_cache=False)
    return sum(kept.values())


def moves(topology: Topology, family: str) -> dict[str, int]:
    """How often a step gathers and scatters."""
    step = _prepared(all_families.build(family), replace(topology, tensor=topology.world))
    with counted("gather", "scatter_sum") as counts:
        step([rows()], Context(0, 0, 1.0))
    return counts


@contextmanager
def counted(*names: str) -> Iterator[dict[str, int]]:
    counts = dict.fromkeys(names, 0)
    before = {name: getattr(tensor_parallel.Cut, name) for name in names}

    def counting(name: str) -> Any:
        def call(self: Any, tensor: Tensor) -> Tensor:
            counts[name] += 1
            return before[name](self, tensor)

        return call

    for name in names:
        setattr(tensor_parallel.Cut, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(tensor_parallel.Cut, name, before[name])
