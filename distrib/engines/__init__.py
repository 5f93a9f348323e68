"""Engines by name. Each file holds one; heavy parts (DeepSpeed) are imported when their engine is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from distrib.contracts import Engine
from distrib.errors import Refused, choose
from distrib.optim import OptimizerSpec
from distrib.topology import Topology

NAMES = ("ddp", "fsdp2", "zero")
NOT_ZEROS = {
    "adagrad": "DeepSpeed cannot take its groups",
    "adamw4bit": "its blocks are parts of rows, which DeepSpeed flattens",
}
"""Optimizers that `zero` does not run, and why."""

Fill = Callable[[nn.Module, str], None]
"""Gives the meta parameters of one unit of a model their values, on the CPU."""


@dataclass(frozen=True)
class Settings:
    """What an engine must know beside the model. `optimizer` is None for a model that is only evaluated."""

    optimizer: OptimizerSpec | None = field(default_factory=OptimizerSpec)
    bf16: bool = False
    compile: bool = False
    stage: int = 2
    offload: bool = False


def check(name: str, settings: Settings, topology: Topology) -> None:
    """Refuse what an engine cannot do with these settings, before anything is built."""
    if name not in NAMES:
        raise choose("engine.name", name, NAMES)
    if settings.optimizer:
        settings.optimizer.check(sharded=name != "ddp")
        if name == "zero" and (why := NOT_ZEROS.get(settings.optimizer.name)):
            raise Refused(
                f"optimizer.name={settings.optimizer.name!r} with engine.name='zero': {why}; choose "
                "adamw, or engine ddp or fsdp2"
            )
    if topology.tensor > 1:
        _check_tensor(name, settings, topology)
    if topology.stages > 1:
        _check_stages(name, topology)
    if topology.context > 1:
        _check_context(name, settings, topology)
    if settings.compile and name == "zero":
        raise Refused("compile=true with engine.name='zero': choose ddp or fsdp2, or compile=false")
    if settings.compile:
        _check_compiler(topology.device_type)


def _check_tensor(name: str, settings: Settings, topology: Topology) -> None:
    asked = f"engine.tensor_parallel={topology.tensor}"
    if name != "fsdp2":
        raise Refused(f"{asked} with engine.name={name!r}: set engine.name=fsdp2")
    if topology.world % topology.tensor:
        raise Refused(f"{asked} with a world of {topology.world}: start a multiple of {topology.tensor} ranks")
    if settings.compile:
        raise Refused(f"compile=true with {asked}: set compile=false")
    if settings.optimizer and settings.optimizer.name == "adamw4bit":
        raise Refused(
            f"optimizer.name='adamw4bit' with {asked}: its blocks are parts of whole rows; choose adamw, or set "
            "engine.tensor_parallel=1"
        )


def _check_stages(name: str, topology: Topology) -> None:
    asked = f"a pipeline of {topology.stages} stages"
    if name == "zero":
        raise Refused(f"{asked} with engine.name='zero': choose ddp or fsdp2")
    if topology.tensor > 1:
        raise Refused(f"{asked} with engine.tensor_parallel={topology.tensor}: set engine.tensor_parallel=1")
    if topology.world % topology.stages:
        raise Refused(f"{asked} with a world of {topology.world}: start a multiple of {topology.stages} ranks")


def _check_context(name: str, settings: Settings, topology: Topology) -> None:
    asked = f"engine.context_parallel={topology.context}"
    if name == "zero":
        raise Refused(f"{asked} with engine.name='zero': choose ddp or fsdp2")
    if topology.tensor > 1:
        raise Refused(f"{asked} with engine.tensor_parallel={topology.tensor}: set one of them to 1")
    if topology.stages > 1:
        raise Refused(f"{asked} with a pipeline of {topology.stages} stages: set engine.context_parallel=1")
    if topology.world % topology.context:
        raise Refused(f"{asked} with a world of {topology.world}: start a multiple of {topology.context} ranks")
    if settings.compile:
        raise Refused(f"compile=true with {asked}: set compile=false")


def _check_compiler(device_type: str) -> None:
    """torch.compile builds with a host compiler, and would say so in a page of text in the first step."""
    variable, known = ("CC", ("gcc", "clang", "cc")) if device_type == "cuda" else ("CXX", ("g++", "clang++"))
    given = os.environ.get(variable)
    if not any(shutil.which(compiler) for compiler in ([given] if given else known)):
        raise Refused(
            f"compile=true without a compiler ({variable}={given!r}): install {known[0]}, set {variable}, or set "
            "compile=false"
        )


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
