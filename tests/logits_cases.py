"""What the tests of logits under engines run on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from engine_cases import gathered, make_engine
from torch import Tensor

from distrib.contracts import Batch
from distrib.topology import Topology
from launch.recipe import Recipe
from strategies import SFT
from strategies.core.lazy_logits import Reading
from strategies.core.steps import arguments


@dataclass(frozen=True)
class Seen:
    """`formed` counts the logits of a training forward and backward; `read` are those read of it afterwards, and
    `evaluated` those of a forward without gradients; `next_losses` are those of the steps after these."""

    formed: int
    read: Tensor
    evaluated: Tensor
    gradients: dict[str, Tensor]
    next_losses: list[float]


def read(topology: Topology, made_from: Recipe, dtype: torch.dtype, batch: Batch, strategy: str, reading: bool) -> Seen:
    engine, _ = make_engine(topology, made_from, dtype, strategy)

    def train() -> Any:
        with engine.micro_batch(last=True):
            output = engine.module(**arguments(batch, SFT(), weight=10.0))
            engine.backward(output.loss)
        return output

    formed = []
    form = Reading.form
    Reading.form = lambda *args: formed.append(1) or form(*args)  # type: ignore[assignment,func-returns-value,method-assign]
    try:
        output = train()
        unread, gradients, found = len(formed), gathered(engine), torch.empty(0)
        if reading:
            with torch.no_grad():
                found = output.logits[:, :-1].clone()
        losses = []
        for _ in range(2):
            engine.step(1e-2, None)
            losses.append(float(train().loss.detach()))
        with torch.no_grad():
            evaluated = engine.module(**arguments(batch, SFT(), weight=10.0)).logits.detach().clone()
    finally:
        Reading.form = form  # type: ignore[method-assign]
    return Seen(unread, found, evaluated, gradients, losses)
