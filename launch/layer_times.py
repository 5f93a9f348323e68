"""What the parts of a model take of the device that is here: forwards and backwards as a rank runs them, timed on a few
layers with random weights, and the optimizer's step on as many of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distrib.contracts import Context
from distrib.topology import Topology
from launch import sides
from launch.forecast import Depths, Regime, Whole, shallow
from launch.models import build
from launch.settings import settings_of
from launch.stages import draw

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distrib.optim import OptimizerSpec
    from launch.recipe import Recipe

BUDGET_S = 5.0
LEAST, MOST = 3, 15
"""Repetitions."""
ELEMENTS = 2**24
"""With which an optimizer is timed: a part of them stands for the rest."""


class LayerTimes(NamedTuple):
    """Seconds of forward and backward of one layer, on average, and of all that is not in layers."""

    layer: tuple[float, float]
    rest: tuple[float, float]


class _Timed(Whole):
    """Notes when a backward begins."""

    began = 0.0

    def backward(self, loss: Tensor) -> None:
        self.began = _moment(self.topology)
        super().backward(loss)


def _moment(topology: Topology) -> float:
    if topology.device_type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


class Layers:
    """Two models of a few layers: what the deeper one takes more are its layers. `seconds` runs both once."""

    def __init__(
        self, recipe: Recipe, config: Any, side: str, regime: Regime, depths: Depths, device_type: str
    ) -> None:
        short, deep = (depths.short, depths.short + depths.period) if depths.times else (1, depths.full)
        self.counts = sorted({short, deep})
        self.depth = depths.full
        configs = [shallow(config, depths.full, count) for count in self.counts]
        self.runs = [_run(recipe, made, side, regime, device_type) for made in configs]
        for run in self.runs:
            run()

    def seconds(self) -> list[tuple[float, float]]:
        return [run() for run in self.runs]

    def times(self, rounds: list[list[tuple[float, float]]]) -> LayerTimes:
        """By the medians of several rounds of `seconds`."""
        middle = [[median(one[place][way] for one in rounds) for way in (0, 1)] for place in range(len(self.counts))]
        if len(middle) == 1:
            forward, backward = (one / self.depth for one in middle[0])
            return LayerTimes((forward, backward), (0.0, 0.0))
        few, many = self.counts
        forward, backward = (max(0.0, b - a) / (many - few) for a, b in zip(*middle, strict=True))
        rest = [max(0.0, a - few * one) for a, one in zip(middle[0], (forward, backward), strict=True)]
        return LayerTimes((forward, backward), (rest[0], rest[1]))


def layer_times(recipe: Recipe, config: Any, side: str, regime: Regime, depths: Depths, device_type: str) -> LayerTimes:
    layers, start = Layers(recipe, config, side, regime, depths, device_type), perf_counter()
    rounds = [layers.seconds()]
    times = max(LEAST, min(MOST, int(BUDGET_S / (perf_counter() - start))))
    return layers.times(rounds + [layers.seconds() for _ in range(times - 1)])


def _run(recipe: Recipe, config: Any, side: str, regime: Regime, device_type: str) -> Callable[[], tuple[float, float]]:
    """Of one micro-batch; gradients are there before, as after the first of several."""
    model: nn.Module = build(recipe, config, torch.bfloat16 if regime.cast else None).train()
    sides.edit(side, model)
    draw(model, device_type)
    topology = Topology(device_type=device_type)
    settings = settings_of(recipe.model_copy(update={"bf16": recipe.bf16 and not regime.cast}))
    engine = _Timed(model, lambda *_: None, topology, settings)
    step = sides.prepare(side, model, engine=engine)
    ids = torch.zeros(recipe.per_device_train_batch_size, recipe.max_length, dtype=torch.int64, device=device_type)
    batch = {"input_ids": ids, "labels": ids}

    def run() -> tuple[float, float]:
        start = _moment(topology)
        step(batch, Context(0, 0, 1.0))
        end = _moment(topology)
        return engine.began - start, end - engine.began

    return run


def update_s(spec: OptimizerSpec, shapes: list[tuple[int, ...]], device_type: str) -> float:
    """Seconds of the optimizer for each element that it updates."""
    taken: list[tuple[int, ...]] = []
    for shape in shapes:
        if not taken or sum(torch.Size(one).numel() for one in taken) < ELEMENTS:
            taken.append(shape)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device_type)) for shape in taken]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = spec.build((str(index), parameter) for index, parameter in enumerate(parameters))
    topology, found = Topology(device_type=device_type), []
    for _ in range(LEAST + 1):
        start = _moment(topology)
        optimizer.step()
        found.append(_moment(topology) - start)
    return median(found[1:]) / sum(parameter.numel() for parameter in parameters)
