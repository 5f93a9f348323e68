from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from distrib.contracts import Engine, Step
from distrib.engines.torch_engine import TorchEngine
from distrib.errors import Refused
from distrib.topology import Topology
from strategies.core.contract import Strategy
from strategies.core.edits import Drop
from strategies.core.objectives import Objective
from strategies.pipelining.partition import Partition, partition, refuse_layers, refuse_no_plan
from strategies.pipelining.schedule import Source
from strategies.streaming.router import refuse_router_loss


@dataclass(frozen=True)
class TwoBP(Strategy):
    """A pipeline over ranks whose backward is in two parts: the input's gradient at once, for the stage before, and the
    weights' gradients later, where a stage would wait (2405.18047). Exact.

    Each rank has some of the layers; `gradient_accumulation_steps` are its micro-batches, the more the better. It costs
    the memory of what waits, and nothing else: `h1` holds no more than 1F1B does. Wrong to use where a model fits one
    device and the links are slow: data parallelism has no bubbles.
    """

    compiles = False
    stages: int | None = None
    schedule: str = "h1"
    pending: int | None = None
    layers: list[int] | None = None
    runtime: Literal["ebbtide", "torch"] = "ebbtide"

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"stages={self.stages}: a number of ranks, or leave it out for all of them")
        if self.pending is not None and (self.pending < 0 or self.schedule != "h1"):
            raise ValueError(f"pending={self.pending} with schedule {self.schedule}: 0 or more, and of h1 alone")

    def pipeline(self, world: int) -> int:
        return world if self.stages is None else self.stages

    def source(self, world: int) -> Source:
        return Source(self.schedule, self.pipeline(world), self.pending)

    def check(self, config: Any, topology: Topology) -> None:
        stages = self.pipeline(topology.world)
        if topology.world % stages or (stages == 1 and topology.world > 1):
            raise Refused(
                f"strategy.stages={stages} with {topology.world} ranks: a number above 1 that divides them, or other "
                "ranks (nproc, or torchrun's)"
            )
        if self.runtime == "torch" and stages == 1:
            raise Refused("strategy.runtime='torch' with one rank: PyTorch's pipelines take two or more (nproc)")
        refuse_router_loss("twobp", config)
        if (count := self.source(topology.world).stages) > 1:
            refuse_no_plan(config)
            refuse_layers(config.num_hidden_layers, count, self.layers)

    def partition(self, model: nn.Module, topology: Topology) -> Partition:
        return partition(model, self.source(topology.world).stages, self.layers)

    def drops(self, model: nn.Module, topology: Topology) -> Iterable[Drop]:
        source = self.source(topology.world)
        return self.partition(model, topology).drops(source.own(topology.stage)) if source.stages > 1 else ()

    def step(self, model: nn.Module, engine: Engine, objective: Objective) -> Step:
        from strategies.core.prepare import causal_lm
        from strategies.pipelining.step import PipelineStep

        assert isinstance(engine, TorchEngine)
        inner = causal_lm(model)
        parts = self.partition(inner, engine.topology)
        source = replace(self.source(engine.topology.world), costs=parts.costs)
        return PipelineStep(inner, engine, objective, parts, source, self.runtime == "torch")
