"""Engines by name. Each file holds one; heavy parts (DeepSpeed) are imported when their engine is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from distrib.contracts import Engine
from distrib.errors import choose
from distrib.optim import OptimizerSpec
from distrib.topology import Topology

NAMES = ("ddp", "fsdp2", "zero")

Fill = Callable[[nn.Module, str], None]
"""Gives the meta parameters of one unit of a model their values, on the CPU."""


@dataclass(frozen=True)
class Settings:
    """What an engine must know beside the model. `optimizer` is None for a model that is only evaluated."""

    optimizer: OptimizerSpec | None = OptimizerSpec()
    bf16: bool = False
    compile: bool = False
    stage: int = 2
    offload: bool = False


def make(name: str, model: nn.Module, fill: Fill, topology: Topology, settings: Settings) -> Engine:
    """Fill and shard `model` in place, unit by unit."""
    match name:
        case "ddp":
            from distrib.engines.ddp import DDP

            return DDP(model, fill, topology, settings)
        case "fsdp2":
            from distrib.engines.fsdp2 import FSDP2

            return FSDP2(model, fill, topology, settings)
        case "zero":
            from distrib.engines.zero import Zero

            return Zero(model, fill, topology, settings)
    raise choose("engine.name", name, NAMES)
