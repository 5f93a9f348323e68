"""The whole model beside a pipeline, as what its stages are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distrib.contracts import MODEL_INPUTS, Batch, Context, evaluating
from distrib.engines import Settings, make
from distrib.engines.torch_engine import TorchEngine
from distrib.errors import Refused
from distrib.topology import Topology
from distrib.units import units
from launch.models import Weights, build
from strategies.core.compare import TOLERANCES
from strategies.core.contract import Strategy
from strategies.core.objectives import Objective
from strategies.core.prepare import edit
from strategies.core.truth import statistics, true_gradients

if TYPE_CHECKING:
    from launch.assemble import Parts
    from strategies import Prepared

Source = Callable[[Any, Any, Topology], Weights]


class WholeModel:
    """The model in this process, with the weights that the stages began with."""

    def __init__(
        self, parts: Parts, dtype: torch.dtype | None, weights: Source, strategies: Sequence[Strategy] = ()
    ) -> None:
        self.topology = _alone(parts.topology)
        recipe = parts.recipe if dtype is None else parts.recipe.model_copy(update={"bf16": False})
        model = build(recipe, parts.config, dtype)
        if own := [strategy for strategy in strategies if strategy.own_forward]:
            edit(model, own, self.topology)
        source = weights(recipe, parts.config, self.topology)
        settings = Settings(optimizer=None, bf16=recipe.bf16)
        self.engine = make("ddp", model, source.fill, self.topology, settings)

    def true_gradients(
        self, stage: TorchEngine, objective: Objective, batches: list[Batch], context: Context, backward: bool
    ) -> Tensor:
        """Leaves them with the stage's engine; this replica's share of the loss."""
        loss = true_gradients(self.engine, objective, batches, context, backward)
        gradients = {name: p.grad for name, p in self.engine.model.named_parameters()}
        for name, parameter in stage.model.named_parameters():
            if backward and parameter.requires_grad:
                found = gradients[name]
                gradient = torch.zeros(parameter.shape, dtype=parameter.dtype) if found is None else found.clone()
                parameter.grad = _summed(gradient.to(parameter.device), parameter, stage)
        self.engine.zero_grad()
        return loss


def _summed(gradient: Tensor, like: nn.Parameter, stage: TorchEngine) -> Tensor:
    assert stage.staged is not None
    dist.all_reduce(gradient, group=stage.staged.replicas)
    if isinstance(like, DTensor):
        return distribute_tensor(gradient, like.device_mesh, like.placements)
    return gradient


def _alone(topology: Topology) -> Topology:
    return Topology(local_rank=topology.local_rank, device_type=topology.device_type)


def check_stages(parts: Parts, step: Prepared, batches: list[Batch]) -> None:
    """Refused where the stages do not give the log-probabilities of the whole model, which one rank of each pipeline
    runs, a unit at a time. Before any training: the weights are those that a run begins with."""
    context = Context(parts.recipe.seed, 0, 1.0)
    with evaluating(step.engine.model):
        found = step.logprobs(batches, context)
    if parts.topology.stage == parts.topology.stages - 1:
        wanted = _logprobs(parts, batches)
        tolerance = TOLERANCES[torch.bfloat16 if parts.recipe.bf16 else torch.float32]
        off = max(float((x - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True))
        if not off <= tolerance:
            raise Refused(
                f"model type {parts.config.model_type!r} in {parts.topology.stages} stages gives other "
                f"log-probabilities than as a whole, by {off:.1e}: its layers share more than their hidden states; "
                "choose another strategy"
            )
    dist.barrier()


def _logprobs(parts: Parts, batches: list[Batch]) -> list[Tensor]:
    """[B, T] a micro-batch, 0 where nothing is learned."""
    topology = _alone(parts.topology)
    model: Any = build(parts.recipe, parts.config).eval()
    source = Weights(parts.recipe, parts.config, topology)
    found = []
    autocast = torch.autocast(topology.device_type, torch.bfloat16, enabled=parts.recipe.bf16)
    with torch.no_grad(), autocast, _unit_by_unit(model, source, topology.device):
        for batch in batches:
            inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
            stats = statistics(model(**inputs, use_cache=False).logits, batch["labels"])
            logprobs_N = torch.zeros(batch["labels"].numel(), dtype=torch.float64, device=topology.device)
            logprobs_N[stats.token_n] = stats.logprob_n.double()
            found.append(logprobs_N.view(batch["labels"].shape))
    return found


@contextmanager
def _unit_by_unit(model: nn.Module, source: Weights, device: torch.device) -> Iterator[None]:
    """Each unit has weights while it runs, and those that another one shares from then on."""
    for buffer_owner in model.modules():
        for leaf, buffer in buffer_owner._buffers.items():
            if buffer is not None:
                buffer_owner._buffers[leaf] = buffer.to(device)
    with ExitStack() as stack:
        for name, unit in units(model):
            stack.enter_context(_visiting(model, name, unit, source, device))
        yield


@contextmanager
def _visiting(model: nn.Module, name: str, unit: nn.Module, source: Weights, device: torch.device) -> Iterator[None]:
    empty = {(module, leaf): p for module in unit.modules() for leaf, p in module._parameters.items() if p is not None}
    counts = [id(p) for module in model.modules() for p in module._parameters.values()]
    shared = any(counts.count(id(p)) > 1 for p in empty.values())

    def fill(_: nn.Module, __: Any) -> None:
        source.fill(model, name)
        unit.to(device)

    def forget(_: nn.Module, __: Any, ___: Any) -> None:
        if not shared:
            for (module, leaf), parameter in empty.items():
                module._parameters[leaf] = parameter

    handles = unit.register_forward_pre_hook(fill), unit.register_forward_hook(forget)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
