from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from distrib.contracts import Engine, Step
from distrib.topology import Topology
from strategies.core.contract import Claim, Strategy
from strategies.core.objectives import Objective
from strategies.streaming.router import refuse_router_loss
from strategies.streaming.unshared import refuse_latents


@dataclass(frozen=True)
class SeCO(Strategy):
    """The whole model runs chunk by chunk: first without a graph, recording keys and values, then right to left,
    with one chunk's graph alive (2505.16710). Exact.

    It costs one more forward, and holds keys, values and their gradients of all layers where checkpointing holds
    layer inputs: less with few key/value heads, more with many. Wrong to use under sharding engines with slow links,
    which gather the weights once a chunk.
    """

    compiles = False
    context_parallel = True
    claims = frozenset({Claim.CHUNKS})
    chunk: int = 1024
    offload: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: a number of positions")

    def check(self, config: Any, topology: Topology) -> None:
        refuse_router_loss("seco", config)
        refuse_latents("seco", config, topology)

    def step(self, model: nn.Module, engine: Engine, objective: Objective) -> Step:
        from strategies.streaming.step import ChunkedStep

        return ChunkedStep(model, engine, objective, self.chunk, self.offload)
