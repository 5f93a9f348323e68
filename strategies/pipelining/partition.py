"""Which stage has which part of a model, by the pipeline plan that its configuration declares.

The plan names the layers; whatever else has weights stands before or after them, in the order of the model. A stage
holds adjacent layers; the first one holds what stands before as well, the last one what stands after, and both of them
what embedding and head share.

That a plan is declared does not make it true: layers may hand each other something beside their hidden states. So a
pipeline is held to the whole model's logits before it trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distrib.errors import Refused
from strategies.core.edits import Drop, whole
from strategies.lowbit.frozen import numbers

LAYERS = "layers"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Partition:
    """Names of modules: `layers` in order, of which stage s has those in [bounds[s], bounds[s + 1]); and in proportion
    to what a token costs, `costs` of each stage."""

    layers: list[str]
    before: list[str]
    after: list[str]
    bounds: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    def layers_of(self, stage: int) -> list[str]:
        return self.layers[self.bounds[stage] : self.bounds[stage + 1]]

    def names(self, stage: int) -> list[str]:
        """Of all that a stage has."""
        own = self.before * (stage == 0) + self.layers_of(stage) + self.after * (stage == self.stages - 1)
        return list(dict.fromkeys(own))

    def entrance(self, stage: int) -> str | None:
        """The module in whose place a stage receives its hidden states."""
        return self.layers[self.bounds[stage] - 1] if stage else None

    def drops(self, own: Sequence[int]) -> Iterator[Drop]:
        """What a rank with these stages does not have."""
        kept = {name for stage in own for name in self.names(stage)}
        for name in dict.fromkeys(self.before + self.layers + self.after):
            if name not in kept:
                yield Drop(name, elsewhere=True)


def refuse_no_plan(config: Any) -> None:
    if LAYERS not in (getattr(config, "base_model_pp_plan", None) or {}):
        raise Refused(
            f"model type {config.model_type!r} declares no pipeline plan (base_model_pp_plan) in this version of "
            "Transformers: its layers may share more than their hidden states"
        )


def refuse_layers(layers: int, stages: int, given: Sequence[int] | None) -> None:
    if layers < stages:
        raise Refused(f"a pipeline of {stages} stages for {layers} layers: each stage needs one; set fewer stages")
    if given is not None and (len(given) != stages or min(given) < 1 or sum(given) != layers):
        raise Refused(
            f"strategy.layers={list(given)}: give {stages} numbers of at least 1, one a stage, whose sum is the "
            f"model's {layers} layers"
        )


def partition(model: Any, stages: int, given: Sequence[int] | None = None) -> Partition:
    """`given` are the numbers of layers of the stages; else the dearest stage is as cheap as can be."""
    if stages == 1 and given is None:
        return Partition([], [], [], (0, model.config.num_hidden_layers), (1.0,))
    refuse_no_plan(model.config)
    backbone = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    if own := [name for module in (model, backbone) for name, _ in module.named_parameters(recurse=False)]:
        raise Refused(f"{type(model).__name__}: its {own[0]} belongs to no stage of a pipeline")
    layers = [f"{prefix}.{LAYERS}.{index}" for index in range(len(backbone.layers))]
    refuse_layers(len(layers), stages, given)
    before, after = _around(model, backbone, prefix)
    costs = [_cost(layer, model.config) for layer in backbone.layers]
    head = _cost(model.get_output_embeddings(), model.config)
    bounds = (0, *itertools.accumulate(given)) if given is not None else balance(costs, stages, head)
    sums = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
    made = Partition(layers, before, after, bounds, (*sums[:-1], sums[-1] + head))
    _refuse_copies(model, made)
    return made


def _refuse_copies(model: Any, made: Partition) -> None:
    """Two stages may share the weight that embedding and head share, and no other: their gradients are not added."""
    tied = getattr(whole(model.get_input_embeddings()), "weight", None)
    homes: dict[int, int] = {}
    for stage in range(made.stages):
        for name in made.names(stage):
            for leaf, parameter in whole(model.get_submodule(name)).named_parameters(prefix=name):
                home = homes.setdefault(id(parameter), stage)
                if home != stage and parameter is not tied:
                    raise Refused(
                        f"{type(model).__name__}: {leaf} would be on two stages of the pipeline, {home} and {stage}: "
                        "they can share nothing but a tied embedding (strategy.layers says where stages begin)"
                    )


def _around(model: Any, backbone: nn.Module, prefix: str) -> tuple[list[str], list[str]]:
    """The parts with weights outside of the layers; those that share a weight with the other end are in both lists."""
    parts: dict[str, nn.Module] = {}
    names = [name for name, _ in backbone.named_children()]
    place = names.index(LAYERS)
    for name in names[:place] + names[place + 1 :]:
        parts[f"{prefix}.{name}"] = whole(backbone.get_submodule(name))
    first = {name for name in parts if names.index(name.removeprefix(f"{prefix}.")) < place}
    parts |= {name: whole(child) for name, child in model.named_children() if child is not backbone}
    held = {name: {id(p) for p in part.parameters()} for name, part in parts.items()}
    before = {name for name in first if held[name]}
    # A norm without weights runs once as well; the plan tells it from what every stage needs, as rotations.
    planned = {f"{prefix}.{name}" for name in model.config.base_model_pp_plan or ()}
    after = {name for name in parts if (held[name] or name in planned) and name not in first}
    shared = {name for one in before for other in after if held[one] & held[other] for name in (one, other)}
    return [name for name in parts if name in before | shared], [name for name in parts if name in after | shared]


def _cost(module: nn.Module, config: Any) -> float:
    """In proportion to the products of one token; of experts, only those that it visits."""
    experts = next((count for name in EXPERTS if (count := getattr(config, name, None))), 1)
    visited = min(1.0, (getattr(config, "num_experts_per_tok", None) or 1) / experts)
    shares = {2: 1.0, 3: visited}
    return sum(size * shares.get(parameter.ndim, 0.0) for parameter, size in numbers(whole(module)))


def balance(costs: Sequence[float], stages: int, head: float) -> tuple[int, ...]:
    """Bounds of adjacent groups, the dearest as cheap as can be; the head is the last one's."""
    sums = [0.0, *itertools.accumulate(costs)]
    # Of the stages so far, which have the layers before `stop`: the dearest one's cost, and their bounds.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        own = head if stage == stages - 1 else 0.0
        best = {
            stop: min(
                (max(dearest, sums[stop] - sums[start] + own), (*bounds, stop))
                for start, (dearest, bounds) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, len(costs) - (stages - 1 - stage) + 1)
        }
    return best[len(costs)][1]
