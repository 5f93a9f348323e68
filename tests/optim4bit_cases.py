"""Steps of AdamW in four bits, in one process and over shards of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distrib.optim import OptimizerSpec
from distrib.optim4bit import AdamW4bit
from distrib.topology import Topology

RATE, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1


def adamw4bit(parameters: list[nn.Parameter]) -> AdamW4bit:
    spec = OptimizerSpec("adamw4bit", betas=BETAS, eps=EPS, weight_decay=DECAY)
    made = spec.build((str(index), parameter) for index, parameter in enumerate(parameters))
    assert isinstance(made, AdamW4bit)
    for group in made.param_groups:
        group["lr"] = RATE
    return made


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(tensors: list[Tensor], place: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """Weights and states after some steps, whole."""
    parameters = [nn.Parameter(place(tensor)) for tensor in tensors]
    optimizer = adamw4bit(parameters)
    for step in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = place(drawn(tuple(parameter.shape), 10 * step + index))
        optimizer.step()
    states = [optimizer.state[parameter] | {"weight": parameter.detach()} for parameter in parameters]
    return [{k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()} for state in states]


def stepped_in_shards(topology: Topology, tensors: list[Tensor]) -> list[dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (topology.world,))
    return stepped(tensors, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
