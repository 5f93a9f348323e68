"""Small models cut into stages by hand, for the tests of pipelines, and what runs them on a rank."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from datetime import timedelta
from functools import partial
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn

from distrib.pipeline.executor import Links, run
from distrib.pipeline.ops import Schedule
from distrib.pipeline.record import Span
from distrib.pipeline.torch_runtime import TorchRuntime
from distrib.topology import Topology

WIDTH = 3
HUNG_S = 5.0


class Part:
    """A stage of a plain model; the backward is split by asking autograd twice."""

    def __init__(self, layers: nn.Sequential, inputs: list[Tensor], first: bool, last: bool) -> None:
        self.layers, self.inputs, self.first, self.last = layers, inputs, first, last
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.later: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.losses: dict[int, float] = {}

    def border(self, micro_batch: int) -> tuple[torch.Size, torch.dtype]:
        return self.inputs[micro_batch].shape, torch.float64

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        assert (received is None) == self.first
        entered = self.inputs[micro_batch] if received is None else received.requires_grad_()
        left = self.layers(entered)
        if self.last:
            left = loss(left)
            self.losses[micro_batch] = left.item()
        self.held[micro_batch] = entered, left
        return None if self.last else left

    def backward(self, micro_batch: int, received: Tensor | None, whole: bool) -> Tensor | None:
        entered, left = self.held.pop(micro_batch)
        if whole:
            left.backward(received)
            return entered.grad
        self.later[micro_batch] = left, received
        return None if self.first else torch.autograd.grad(left, entered, received, retain_graph=True)[0]

    def weights(self, micro_batch: int) -> None:
        left, received = self.later.pop(micro_batch)
        left.backward(received, inputs=list(self.layers.parameters()))


def loss(left: Tensor) -> Tensor:
    return left.sin().sum()


def model(stages: int) -> list[nn.Sequential]:
    torch.manual_seed(0)
    make = nn.Linear
    return [nn.Sequential(make(WIDTH, WIDTH), nn.Tanh(), make(WIDTH, WIDTH)).double() for _ in range(stages)]


def inputs(rows: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(count, WIDTH, dtype=torch.float64) for count in rows]


def gradients(layers: nn.Module) -> list[Any]:
    return [p.grad.tolist() for p in layers.parameters()]


def whole(stages: int, rows: list[int]) -> tuple[list[list[Any]], list[float]]:
    """Gradients of every stage, and the losses, without a pipeline."""
    parts = model(stages)
    losses = [loss(nn.Sequential(*parts)(batch)) for batch in inputs(rows)]
    sum(losses).backward()
    return [gradients(part) for part in parts], [value.item() for value in losses]


_LINKS: dict[Any, Links] = {}


def links(topology: Topology, schedule: Schedule) -> Links:
    """Groups are made once for all tests whose stages have the same homes."""
    key = tuple(sorted(schedule.homes.items()))
    if key not in _LINKS:
        _LINKS[key] = Links.make(schedule, [range(topology.world)], topology.device)
    return _LINKS[key]


def parts(topology: Topology, schedule: Schedule, rows: list[int]) -> dict[int, Part]:
    layers, last = model(schedule.stages), schedule.stages - 1
    mine = [stage for stage, rank in schedule.homes.items() if rank == topology.rank]
    return {stage: Part(layers[stage], inputs(rows), stage == 0, stage == last) for stage in mine}


def trained(topology: Topology, schedule: Schedule, rows: list[int], by_torch: bool = False) -> dict[int, Any]:
    """Of this rank's stages: gradients, and losses by micro-batch."""
    stages = parts(topology, schedule, rows)
    if by_torch:
        TorchRuntime(schedule, stages, topology.device)()
    else:
        run(schedule, stages, links(topology, schedule))
    return {index: (gradients(part.layers), part.losses) for index, part in stages.items()}


def trained_two(topology: Topology, schedule: Schedule, rows: list[list[int]]) -> dict[int, Any]:
    """Two pipelines in one job, whose ranks alternate, each with micro-batches of its own."""
    pipelines = [range(0, topology.world, 2), range(1, topology.world, 2)]
    made = Links.make(schedule, pipelines, topology.device)
    stages = parts(replace(topology, rank=made.place), schedule, rows[topology.rank % 2])
    run(schedule, stages, made)
    return {index: (gradients(part.layers), part.losses) for index, part in stages.items()}


def evaluated(topology: Topology, training: Schedule, forwards: Schedule, rows: list[int]) -> dict[int, float]:
    """Over the groups of training; the losses, where the last stage is."""
    stages = parts(topology, forwards, rows)
    run(forwards, stages, links(topology, training))
    return next((part.losses for part in stages.values() if part.last), {})


def recorded(topology: Topology, schedule: Schedule, rows: list[int]) -> list[Span]:
    spans: list[Span] = []
    run(schedule, parts(topology, schedule, rows), links(topology, schedule), spans)
    return spans


def misshapen(topology: Topology, schedule: Schedule) -> str:
    """What rank 0 says of a stage whose output is not what it announced."""
    stages = parts(topology, schedule, [2])
    made = links(topology, schedule)
    if topology.rank:
        return ""
    stages[0].forward = lambda micro_batch, received: torch.zeros(7)
    try:
        run(schedule, stages, made)
    except RuntimeError as error:
        return str(error)
    return ""


def broken(made_from: tuple[Schedule, str, int, float], topology: Topology) -> None:
    """One rank does what it should not, in the forward of micro-batch 1."""
    schedule, fault, rank, timeout_s = made_from
    stages = parts(topology, schedule, [2] * schedule.micro_batches)
    for part in stages.values() if topology.rank == rank else ():
        part.forward = partial(_FAULTS[fault], part.forward)
    timeout = timedelta(seconds=timeout_s)
    run(schedule, stages, Links.make(schedule, [range(topology.world)], topology.device, timeout))


def _raise(forward: Any, micro_batch: int, received: Tensor | None) -> Any:
    if micro_batch == 1:
        raise ValueError("a stage's own mistake")
    return forward(micro_batch, received)


def _die(forward: Any, micro_batch: int, received: Tensor | None) -> Any:
    if micro_batch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(micro_batch, received)


def _hang(forward: Any, micro_batch: int, received: Tensor | None) -> Any:
    if micro_batch == 1:
        sleep(HUNG_S)
    return forward(micro_batch, received)


_FAULTS = {"raise": _raise, "die": _die, "hang": _hang}
