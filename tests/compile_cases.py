"""What the tests of compiled blocks run on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import torch
from engine_cases import IGNORE, gathered, make_engine, padded
from torch import Tensor, nn
from torch._dynamo.utils import counters

from distrib.contracts import Batch, Context, evaluating
from distrib.topology import Topology
from launch.recipe import Recipe
from launch.reference import _adapter_off

TRACED = "aot_eager"
"""Traces, guards and differentiates as the default does, without building kernels, which takes most of the time."""


def packed(rows: list[tuple[list[int], int]]) -> Batch:
    """The rows one after the other, in one."""
    ids = torch.tensor([[token for tokens, _ in rows for token in tokens]])
    learned = [token if index >= prompt else IGNORE for tokens, prompt in rows for index, token in enumerate(tokens)]
    positions = [index for tokens, _ in rows for index in range(len(tokens))]
    return {"input_ids": ids, "labels": torch.tensor([learned]), "position_ids": torch.tensor([positions])}


@contextmanager
def fresh(backend: str = "inductor") -> Iterator[None]:
    """Nothing compiled before or left behind; dropout from the generators that uncompiled code reads; whoever runs
    into torch's limit of versions fails, where torch itself would go on uncompiled."""
    from torch._dynamo import config
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    counters.clear()
    compile = nn.Module.compile
    nn.Module.compile = partialmethod(compile, backend=backend)
    try:
        with inductor.patch(fallback_random=True), config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        nn.Module.compile = compile
        torch._dynamo.reset()


def graphs() -> int:
    """How many pieces of code were compiled. A block that had to be cut into pieces is a failure."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def step_gradients(
    topology: Topology, made_from: Recipe, per_rank: list[list[Batch]], backend: str = "inductor"
) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step in training mode, and the number of compiled graphs."""
    with fresh(backend):
        engine, step = make_engine(topology, made_from, torch.float32)
        engine.module.train()
        weight = sum(float((batch["labels"] != IGNORE).sum()) for batches in per_rank for batch in batches)
        step(per_rank[topology.rank], Context(seed=0, step=0, weight=weight))
        return gathered(engine), graphs()


def graphs_over_lengths(made_from: Recipe, lengths: range) -> list[int]:
    """Graphs compiled up to each length, when every batch is trained on, evaluated and compared with the model
    without its adapter, in ones and in twos."""
    known = []
    with fresh(TRACED):
        engine, step = make_engine(Topology(), made_from, torch.float32)
        context = Context(seed=0, step=0, weight=1.0)
        for length in lengths:
            for rows in (1, 2):
                batch = padded([([1 + index % 40 for index in range(length)], 1)] * rows)
                engine.module.train()
                step([batch], context)
                with evaluating(engine.model), _adapter_off(engine.model):
                    step.logprobs([batch], context)
                with evaluating(engine.model):
                    step.logprobs([batch], context)
            known.append(graphs())
    return known
