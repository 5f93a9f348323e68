"""Around an engine whose model is one stage of a pipeline: who else has the stage, and who shares a tied weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from distrib.topology import Topology


class Staged:
    """Made by all ranks together. `replicas` are the ranks of this stage, `pipeline` the stages of this replica."""

    def __init__(self, topology: Topology) -> None:
        sizes = (topology.stages, topology.data_world)
        mesh = init_device_mesh(topology.device_type, sizes, mesh_dim_names=("stage", "data"))
        self.topology = topology
        self.mesh = mesh["data"]
        self.replicas = mesh["data"].get_group()
        self.pipeline = mesh["stage"].get_group()

    def sum_over_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """A parameter without a gradient has one of zeros: another replica may have sent it rows."""
        if self.topology.data_world == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, group=self.replicas, async_op=True))
        for work in waiting:
            work.wait()

    def on_first(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of all stages, on rank 0; nothing elsewhere. What two stages share is the first one's."""
        every = [rank * self.topology.data_world for rank in range(self.topology.stages)]
        rank = self.topology.rank
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        everyone: list[Any] = [None] * self.topology.world
        dist.all_gather_object(everyone, shapes)
        if rank in every[1:]:
            for tensor in state.values():
                dist.send(tensor.contiguous(), 0)
        if rank != 0:
            return {}
        for sender in every[1:]:
            for name, (shape, dtype) in everyone[sender].items():
                received = torch.empty(shape, dtype=dtype)
                dist.recv(received, sender)
                state.setdefault(name, received)
        return state


class Tied:
    """The weight that embedding and head share, where they are on two ranks: each has a copy, and half of its
    gradient. Every rank makes one."""

    def __init__(self, model: Any, topology: Topology) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        shared = getattr(embedding, "weight", None)
        shared = shared if shared is not None and shared is getattr(head, "weight", None) else None
        holds: list[Any] = [None] * topology.world
        dist.all_gather_object(holds, shared is not None)
        self.weight: nn.Parameter | None = None
        for replica in range(topology.data_world):
            ends = [rank for rank in range(replica, topology.world, topology.data_world) if holds[rank]]
            group = dist.new_group(ends) if len(ends) == 2 else None
            if group and topology.rank in ends:
                self.weight, self.copy, self._group = shared, topology.rank == ends[1], group

    def sum(self) -> None:
        if self.weight is None or not self.weight.requires_grad:
            return
        gradient = self.weight.grad = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        dist.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient, group=self._group)
