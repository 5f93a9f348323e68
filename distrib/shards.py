"""What a rank holds of a model: its shards, whatever the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distrib.contracts import Engine
from distrib.files import size


def held(engine: Engine) -> str:
    """What lies in memory beside the step, in words. What an engine keeps elsewhere than torch does is not known."""
    optimizer = getattr(engine, "optimizer", None)
    states = [state for kept in optimizer.state.values() for state in kept.values()] if optimizer else None
    gradients = [parameter.grad for parameter in engine.model.parameters()]
    sizes = {"weights": _size(engine.model.parameters()), "gradients": _size(gradients), "optimizer": _size(states)}
    return f"beside what the step keeps: {', '.join(f'{name} {size}' for name, size in sizes.items())}"


def _size(tensors: Iterable[Any] | None) -> str:
    if tensors is None:
        return "unknown"
    return size(sum(_shard(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor)))


def _shard(tensor: Tensor) -> Any:
    local: Any = getattr(tensor, "ds_tensor", tensor.detach())
    return local.to_local() if isinstance(local, DTensor) else local


def weights_are_finite(engine: Engine) -> bool:
    shards = map(_shard, engine.model.parameters())
    local = [shard for shard in shards if shard.is_floating_point() and shard.numel()]
    if not local:
        return True
    largest = torch._foreach_norm(local, math.inf)
    return bool(torch.stack([one.float() for one in largest]).isfinite().all())
