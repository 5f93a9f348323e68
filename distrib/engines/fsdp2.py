"""FSDP2: parameters, gradients and optimizer states sharded over ranks, one unit gathered at a time; under tensor
parallelism over the data-parallel ranks, what is left of a unit after it is split.

bf16: fp32 shards are the master weights; they are gathered in bf16 and their gradients reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from distrib.engines import Fill
from distrib.engines.tensor_parallel import TensorParallel
from distrib.engines.torch_engine import TorchEngine
from distrib.topology import ensure_group
from distrib.units import alone, blocks, ends, units


class FSDP2(TorchEngine):
    name = "fsdp2"
    _staging = False

    def _place(self, fill: Fill) -> nn.Module:
        ensure_group(self.topology)
        self._frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        # Ranks with other parts of a sequence have other gradients, as those with other rows do.
        sizes = {"data": self.topology.data_world * self.topology.context}
        if self.topology.tensor > 1:
            sizes["tensor"] = self.topology.tensor
        if self.staged:
            self._mesh = self.staged.mesh
        else:
            mesh = init_device_mesh(self.topology.device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            self._mesh = mesh["data"]
        self._parallel = TensorParallel(self.model, mesh["tensor"]) if "tensor" in sizes else None
        # What shares a parameter with others is gathered with them: with the model, at last.
        lone = {name: alone(self.model, block) for name, block in blocks(self.model)}
        outer = ends(self.model)
        for name, unit in units(self.model):
            fill(self.model, name)
            unit.to(self.topology.device)
            if name in lone and self._parallel:
                self._parallel.split(name, unit)
            if lone.get(name):
                self._shard(unit)
        for end in outer:
            self._shard(end)
        self._shard(self.model)
        for buffer_owner in self.model.modules():
            for leaf, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[leaf] = buffer.to(self.topology.device)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 averages; every engine sums.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return self.model

    def _shard(self, unit: nn.Module | list[nn.Module]) -> None:
        policy = MixedPrecisionPolicy()
        if self.settings.bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        # A stage's weights stay gathered while its micro-batches come and go.
        fully_shard(unit, mesh=self._mesh, mp_policy=policy, reshard_after_forward=False if self.staged else None)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        # Unsynchronised gradients are whole on every rank: cheap for adapters only.
        assert isinstance(self.model, FSDPModule)
        if self._staging:
            yield
            return
        self.model.set_requires_gradient_sync(last or not self._frozen)
        self.model.set_is_last_backward(last)
        yield
        if last and self._parallel:
            self._parallel.sum_gradients(self.model)

    @contextmanager
    def stages(self, trains: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        with super().stages(trains):
            self._staging = True
            self._exchange(False)
            yield
            self._exchange(True)
            self._staging = False
            root = fully_shard.state(self.model)  # type: ignore[attr-defined]
            for group in _groups(self.model):
                group.post_backward()
            root._root_post_backward_final_callback()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _exchange(self, now: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(now)
        self.model.set_reshard_after_backward(now)
        self.model.set_is_last_backward(now)

    def settle(self) -> None:
        for group in _groups(self.model):
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def _groups(model: nn.Module) -> Iterator[Any]:
    """What FSDP2 gathers and reduces at once; known after the first forward."""
    for state in fully_shard.state(model)._state_ctx.all_states:  # type: ignore[attr-defined]
        # Older versions of torch have one a module, or none.
        yield from filter(
            None, getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        )
