"""What one rank holds of weights, gradients and optimizer under each engine, predicted from the engines' settings.

A traced run has the whole model on one device. `ddp` is just that; for the engines that shard, the run's weights and
gradients are replaced by the rank's share, the units that are gathered at the time, and the buffers of reductions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distrib.trace import CLASSES, Place
from launch.forecast import Regime
from launch.recipe_file import global_batch

if TYPE_CHECKING:
    from torch import nn

    from distrib.optim import OptimizerSpec
    from launch.recipe import Engine, Recipe

WEIGHTS, GRADIENTS, OPTIMIZER, WORKSPACE = (
    CLASSES.index(name) for name in ("weights", "gradients", "optimizer", "workspace")
)
SINGLE = 4
# DeepSpeed's defaults, in elements: what stages 1 and 2 reduce at a time, and what stage 3 keeps gathered.
REDUCE_BUCKET = 500_000_000
MOST_GATHERED = 1_000_000_000


@dataclass(frozen=True)
class Unit:
    """Elements of what is gathered at once; those of a 4-bit base are bytes, whatever the precision."""

    elements: int = 0
    trainable: int = 0
    packed: int = 0

    def bytes_in(self, element: int) -> int:
        """With so many bytes for each element that has a precision."""
        return element * (self.elements - self.packed) + self.packed


@dataclass(frozen=True)
class Sizes:
    """Of the whole model. `weight_bytes` has its buffers."""

    weight_bytes: int
    whole: Unit
    shapes: Sequence[tuple[int, ...]]
    """Of the trainable parameters."""
    layer: Unit
    embedding: Unit
    head: Unit

    @property
    def trainable(self) -> int:
        return sum(map(math.prod, self.shapes))


def sizes_of(model: Any) -> Sizes:
    from strategies.streaming.backbone import find_layers

    parameters = list(model.parameters())
    layers = [_unit(layer) for _, layer in find_layers(model)]
    return Sizes(
        weight_bytes=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        whole=_unit(model),
        shapes=[tuple(parameter.shape) for parameter in parameters if parameter.requires_grad],
        layer=max(layers, key=lambda unit: unit.elements),
        embedding=_unit(model.get_input_embeddings()),
        head=_unit(model.get_output_embeddings()),
    )


def _unit(module: nn.Module) -> Unit:
    parameters = list(module.parameters())
    return Unit(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters if not p.is_floating_point()),
    )


@dataclass(frozen=True)
class Share:
    """Bytes of one rank. `weights` and `gradients` are there all the time, `gradient_part` of a run's gradients beside;
    `gathered` and `buffers` come on top in a phase of the run. `temporary` is the update's own."""

    weights: float
    optimizer: float
    temporary: float
    as_run: bool = False
    """Weights are those of the run, with the copies that it makes."""
    gradient_part: float = 1.0
    gradients: float = 0.0
    all_gradients: float = 0.0
    """At the update."""
    gathered: dict[str, float] = field(default_factory=dict)
    buffers: dict[str, float] = field(default_factory=dict)

    def of(self, place: Place, bytes_NC: NDArray[Any]) -> NDArray[Any]:
        """A run's moments on this rank."""
        held = bytes_NC.copy()
        if not self.as_run:
            held[:, WEIGHTS] = self.weights + self.gathered.get(place.phase, 0.0)
        held[:, GRADIENTS] = self.gradients + self.gradient_part * held[:, GRADIENTS]
        held[:, OPTIMIZER] = self.optimizer
        held[:, WORKSPACE] += self.buffers.get(place.phase, 0.0)
        return held

    def update(self) -> NDArray[Any]:
        """The optimizer's step."""
        held = np.zeros(len(CLASSES))
        held[[WEIGHTS, GRADIENTS, OPTIMIZER]] = self.weights, self.all_gradients, self.optimizer
        held[WORKSPACE] = self.temporary
        return held


def accumulates(recipe: Recipe, world: int) -> bool:
    return global_batch(recipe, world) > recipe.per_device_train_batch_size * world


def regime_of(engine: Engine, recipe: Recipe, world: int) -> Regime:
    """DDP's gradients lie in its buckets, which stay."""
    cast = recipe.bf16 and engine.name != "ddp"
    return Regime(cast, held=accumulates(recipe, world) or (engine.name == "ddp" and world > 1))


def share_of(engine: Engine, recipe: Recipe, sizes: Sizes, spec: OptimizerSpec, world: int, device_type: str) -> Share:
    match engine.name:
        case "ddp":
            optimizer = optimizer_bytes(spec, sizes.shapes, device_type)
            whole = SINGLE * sizes.trainable
            # What accumulates lies beside the buckets until it is copied into them.
            beside = whole if world > 1 and accumulates(recipe, world) else 0
            return Share(sizes.weight_bytes, *optimizer, as_run=True, gradients=beside, all_gradients=whole)
        case "fsdp2":
            return _fsdp2(recipe, sizes, spec, world, device_type)
    return _zero(engine, recipe, sizes, spec, world, device_type)


def _fsdp2(recipe: Recipe, sizes: Sizes, spec: OptimizerSpec, world: int, device_type: str) -> Share:
    """A unit is gathered while it computes, and the next one is on its way; its gradients are whole, in the precision
    of the products, until they are reduced in float32."""
    element = 2 if recipe.bf16 else SINGLE
    shards = [(-(-shape[0] // world), *shape[1:]) for shape in sizes.shapes if shape]
    layer, embedding, head = sizes.layer, sizes.embedding, sizes.head
    # Unsynchronised gradients of adapters are whole on every rank.
    frozen = sizes.trainable < sizes.whole.elements
    kept = 1.0 if frozen and accumulates(recipe, world) else 1 / world
    return Share(
        sizes.weight_bytes / world,
        *optimizer_bytes(spec, shards, device_type),
        gradient_part=SINGLE / element * kept,
        all_gradients=SINGLE * sizes.trainable * kept,
        gathered={
            "start": embedding.bytes_in(element) + layer.bytes_in(element),
            "forward": 2 * layer.bytes_in(element),
            "head": head.bytes_in(element) + layer.bytes_in(element),
            "backward": 2 * layer.bytes_in(element),
        },
        buffers={
            "head": (element + SINGLE) * head.trainable,
            "backward": (element + SINGLE) * layer.trainable,
        },
    )


def _zero(engine: Engine, recipe: Recipe, sizes: Sizes, spec: OptimizerSpec, world: int, device_type: str) -> Share:
    """Weights in the precision of the products; float32 copies of the trained ones, their gradients and the optimizer
    over the ranks, or in host memory. Gradients on their way are in buckets."""
    element = 2 if recipe.bf16 else SINGLE
    part = -(-sizes.trainable // world)
    bucket = 2 * REDUCE_BUCKET if device_type == "cuda" else min(REDUCE_BUCKET, sizes.trainable)
    weights, gathered = sizes.whole.bytes_in(element), {}
    if engine.stage == 3:
        bucket = min(bucket, REDUCE_BUCKET)
        most = MOST_GATHERED + sizes.layer.elements
        whole = min(weights, element * most)
        gathered = dict.fromkeys(("start", "forward", "head", "backward"), float(whole))
        weights = 0 if engine.offload else -(-weights // world)
    gradients = SINGLE * (sizes.trainable if engine.stage == 1 else part)
    states, temporary = optimizer_bytes(spec, [(part,)], device_type)
    if engine.offload:
        gradients = states = temporary = part = 0
    return Share(
        weights + SINGLE * part,
        states,
        temporary,
        gradient_part=0.0,
        gradients=gradients,
        all_gradients=gradients,
        gathered=gathered,
        buffers={"backward": float(element * bucket), "head": float(element * sizes.head.trainable)},
    )


def optimizer_bytes(spec: OptimizerSpec, shapes: Sequence[tuple[int, ...]], device_type: str) -> tuple[int, int]:
    """Of the states, and of what a step allocates beside, by making one without data."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from distrib.tracker import Tracker, tracking

    tracker = Tracker(number=0.5)
    with tracking(FakeTensorMode(), tracker):
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        held_bytes = tracker.live_bytes
        optimizer = spec.build((str(index), parameter) for index, parameter in enumerate(parameters))
        if device_type == "cuda":
            # The default there, which takes all parameters at once.
            for group in optimizer.param_groups:
                if not group.get("fused"):
                    group["foreach"] = True
        optimizer.step()
        states_bytes = tracker.live_bytes - held_bytes
        tracker.restart()
        optimizer.step()
        return states_bytes, tracker.peak_bytes()
