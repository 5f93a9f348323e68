"""What the tests of context parallelism run on every rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import all_families
import streaming_cases
import torch
from engine_cases import gathered
from streaming_cases import Case, Found
from tensor_cases import rows
from torch import Tensor

import strategies
from distrib.contracts import Context
from distrib.engines import Settings, context_parallel, make
from distrib.engines.context_parallel import Stripes
from distrib.engines.ddp import DDP
from distrib.errors import Refused
from distrib.topology import Topology
from distrib.units import blocks
from launch import sides
from strategies.core import prepare
from strategies.core.steps import seeded
from strategies.streaming import share, unshared
from strategies.streaming.share import Share

LENGTH = 512


def _prepared(model: Any, topology: Topology, side: str = "plain") -> strategies.Prepared:
    topology = replace(topology, context=topology.world)
    unshared.check(model.config, topology)
    sides.edit(side, model, topology)
    engine = make("fsdp2", model, lambda *_: None, topology, Settings(optimizer=None))
    return sides.prepare(side, model, engine=engine)


def of_family(topology: Topology, family: str, side: str = "plain") -> dict[str, Tensor] | str:
    """The gradients of one step, or why the family is refused."""
    try:
        step = _prepared(all_families.build(family), topology, side)
        step([rows()], Context(0, 0, float(rows()["labels"][:, 1:].numel())))
    except Refused as error:
        return str(error)
    return gathered(step.engine)


def kept_bytes(topology: Topology) -> int:
    """What the layers keep for the backward of one row: tensors with positions, whole or this rank's."""
    model: Any = all_families.build("llama", max_position_embeddings=LENGTH).float()
    ids = torch.arange(LENGTH)[None] % all_families.PADDING
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if {LENGTH, LENGTH // topology.world} & set(tensor.shape):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = [layer for _, layer in blocks(model)]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    layers[0].register_forward_pre_hook(lambda *_: hooks.__enter__())
    layers[-1].register_forward_hook(lambda *_: hooks.__exit__())
    _prepared(model, topology)({"input_ids": ids, "labels": ids}, Context(0, 0, 1.0))
    return sum(kept.values())


def drawn(topology: Topology) -> Tensor:
    """What dropout would draw in a step of this rank."""
    engine = make("ddp", torch.nn.Linear(1, 1), lambda *_: None, replace(topology, context=2), Settings(optimizer=None))
    with seeded(Context(0, 0, 1.0), engine, 0):
        return torch.rand(4)


BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "gradients of one rank alone": (DDP, "micro_batch", lambda self, last: self.module.no_sync()),
    "stretches instead of stripes": (Stripes, "take", lambda self, whole: whole.chunk(self.ranks, 1)[self.rank]),
    "positions of a rank": (Share, "_inputs", lambda self: {name: self.whole[name] for name in ("input_ids",)}),
    "documents that see each other": (share, "document_ids", lambda _: None),
    "nothing is exchanged": (context_parallel, "_received", lambda sent, stripes: sent),
}
"""What is in the place of what."""


def broken(topology: Topology, case: Case, mistake: str, looked_at: bool = False) -> Found | str:
    """What comes of it, or why it is refused where someone looks."""
    looks = () if looked_at else ((unshared, "refuse_unlike"), (prepare, "refuse_leaks"))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(*BROKEN[mistake]))
        for where, name in looks:
            stack.enter_context(mock.patch.object(where, name))
        try:
            return streaming_cases.run(topology, case)
        except Refused as error:
            return str(error)
