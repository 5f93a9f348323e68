"""What the two engines of torch share: the optimizer, the true global norm, clipping, checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from distrib.engines import Fill, Settings
from distrib.engines.context_parallel import Stripes
from distrib.engines.staged import Staged, Tied
from distrib.errors import NotFinite, UserError
from distrib.topology import Topology
from distrib.units import blocks

RECOMPILE_LIMIT = 64


class TorchEngine:
    """A model on one device or sharded over ranks, updated by a torch optimizer. Subclasses wrap and say when to
    exchange gradients."""

    name: str

    def __init__(self, model: nn.Module, fill: Fill, topology: Topology, settings: Settings) -> None:
        self.model = model
        self.topology = topology
        self.settings = settings
        self.stripes = Stripes.of(topology)
        self.staged = Staged(topology) if topology.stages > 1 else None
        self.module = self._place(fill)
        self._tied = Tied(model, topology) if self.staged else None
        if settings.compile:
            _compile_blocks(model)
        self.optimizer = None
        if settings.optimizer:
            self.optimizer = settings.optimizer.build(model.named_parameters())

    def _place(self, fill: Fill) -> nn.Module:
        """Fill the model's units, put them on the device, and return what a step calls."""
        raise NotImplementedError

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with torch.autocast(self.topology.device_type, torch.bfloat16, enabled=self.settings.bf16):
            yield

    @contextmanager
    def stages(self, trains: bool) -> Iterator[None]:
        """Around a pipeline's step, or its evaluation: weights stay gathered, and gradients cross ranks at its end
        alone, after the last weight gradient."""
        yield
        if self._tied and trains:
            self._tied.sum()

    def settle(self) -> None:
        """Within `stages`, after gradients were accumulated outside of a backward."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def gradients(self) -> Iterator[tuple[str, Tensor, str]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                placement = "replicate"
                if isinstance(gradient, DTensor):
                    split = "tensor" in (gradient.device_mesh.mesh_dim_names or ())
                    placement = "shard" if split or self.topology.tensor == 1 else "tensor"
                    gradient = gradient.to_local()
                if self._tied and parameter is self._tied.weight and self._tied.copy:
                    placement = "copy"
                yield name, gradient, placement

    def grad_norm(self) -> float:
        """Over every mesh dimension; a parameter that is shared or replicated counts once."""
        norms: dict[str, list[Tensor]] = {"shard": [], "tensor": [], "replicate": [], "copy": []}
        for _, gradient, placement in self.gradients():
            norms[placement].append(torch.linalg.vector_norm(gradient))
        squares = {kind: self._sum_of_squares(values) for kind, values in norms.items()}
        shared = squares["shard"] + squares["tensor"] / self.topology.tensor
        if self.staged:
            shared += squares.pop("replicate") * self.topology.stages / self.topology.world
        if self.staged or (self.topology.world > 1 and norms["shard"] + norms["tensor"]):
            dist.all_reduce(shared)
        return math.sqrt((shared + squares.get("replicate", 0.0)).item())

    def _sum_of_squares(self, norms: list[Tensor]) -> Tensor:
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.topology.device)
        return torch.stack(norms).double().square().sum()

    def step(self, learning_rate: float, max_grad_norm: float | None) -> float:
        assert self.optimizer is not None
        norm = self.grad_norm()
        if not math.isfinite(norm):
            self.zero_grad()
            raise NotFinite(f"the gradient's norm is {norm}")
        if max_grad_norm and norm > max_grad_norm:
            scale = max_grad_norm / (norm + 1e-6)
            torch._foreach_mul_([gradient for _, gradient, _ in self.gradients()], scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(ignore_frozen_params=self.optimizer is not None)
        state: dict[str, Any] = {"model": get_model_state_dict(self.model, options=options)}
        if self.optimizer:
            # By parameter, so that ranks may hold other ones than those that saved them.
            options = replace(options, flatten_optimizer_state_dict=True)
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return state

    def save(self, create: Callable[[str], Any]) -> None:
        import torch.distributed.checkpoint as dcp

        from distrib.engines.storage import SavePlanner, Writer

        with _without_a_group():
            dcp.save(self._state(), storage_writer=Writer(create), planner=SavePlanner())

    def load(self, folder: Path) -> None:
        """All of this engine's state; without an optimizer what a checkpoint has of the weights, since frozen
        ones are not in it."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        from distrib.engines.storage import Reader, only_data

        state = self._state()
        if self.optimizer:
            _check_same(state["model"], folder)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=self.optimizer is None)
        with _without_a_group(), only_data(folder):
            dcp.load(state, storage_reader=Reader(str(folder)), planner=planner)
        options = StateDictOptions(strict=False, flatten_optimizer_state_dict=True)
        set_model_state_dict(self.model, state["model"], options=options)
        if self.optimizer:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)

    def full_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if frozen and not tensor.requires_grad:
                continue
            full = tensor.detach()
            if isinstance(full, DTensor):
                # One dimension of the mesh after the other, as torch would, which warns that it does.
                full = full.redistribute(placements=[Replicate(), *full.placements[1:]]).full_tensor()
            if self.topology.main or (self.staged and self.topology.data_rank == 0):
                state[name] = full.cpu()
        return self.staged.on_first(state) if self.staged else state


def _check_same(weights: dict[str, Tensor], folder: Path) -> None:
    from distrib.engines.storage import Reader, only_data

    with only_data(folder):
        saved = Reader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in weights.items():
        size = getattr(saved.get(f"model.{name}"), "size", None)
        if size != tensor.shape:
            was = "absent" if size is None else f"{tuple(size)}"
            raise UserError(
                f"{folder.parent} does not hold what this recipe trains: {name} is {was} there, here "
                f"{tuple(tensor.shape)}; name a checkpoint of the same model"
            )


@contextmanager
def _without_a_group() -> Iterator[None]:
    """A single process without a process group is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _compile_blocks(model: nn.Module) -> None:
    """Each block by itself: alike ones share their code, and what is around them (gathering, the head) stays as it
    is."""
    # One code object serves all blocks in all modes (with and without gradients, masks, adapters): after torch's
    # limit of 8 versions, the rest would run uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for _, block in blocks(model):
        # For any length from the start: code that depends on the lengths seen before would round differently in a
        # resumed run.
        block.compile(dynamic=True)
