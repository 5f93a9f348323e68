"""Strategies that are wrong on purpose, for the tests of verify, and what those run on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from engine_cases import TrainedAdapter, gathered
from torch import Tensor, nn

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import Settings, make
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from launch.models import build, load_config
from launch.recipe import Recipe
from strategies import Fidelity, Strategy
from strategies.core import registry
from strategies.core.edits import Drop, Swap, Wrap
from strategies.core.truth import true_gradients
from strategies.streaming.draws import Published, Taken
from strategies.streaming.step import ChunkedStep


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> Any:
        return by_x * ctx.factor, None


class ScaledLinear:
    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Scaled.apply(self.weight, self.factor))


class OnlyInTraining(ScaledLinear):
    def forward(self: Any, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else nn.functional.linear(x, self.weight)


class NegatedNorm:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return Scaled.apply(self.weight, -1.0) * wide.to(hidden.dtype)


@dataclass(frozen=True)
class ScaledWeight(Strategy):
    """One weight's gradient is a thousandth too large."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.layers.1.mlp.down_proj", ScaledLinear, {"factor": 1.001})


@dataclass(frozen=True)
class ScaledInTraining(Strategy):
    """One weight's gradient is twice too large, but not in evaluation."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.layers.0.self_attn.o_proj", OnlyInTraining, {"factor": 2.0})


@dataclass(frozen=True)
class WrongSign(Strategy):
    """The last norm's weight goes the other way."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.norm", NegatedNorm)


@dataclass(frozen=True)
class LostChunk(Strategy):
    """Of several chunks the second is never walked back."""

    chunk: int = 1024

    def step(self, model: Any, engine: Any, objective: Any) -> Any:
        def draw(count: int, *_: Any) -> list[Taken]:
            return [Taken(index) for index in range(count) if index != 1]

        return ChunkedStep(model, engine, objective, self.chunk, False, draw)


@dataclass(frozen=True)
class Biased(Strategy):
    """Calls itself unbiased, with the weights of a biased draw."""

    fidelity = Fidelity.UNBIASED
    chunk: int = 1024

    def step(self, model: Any, engine: Any, objective: Any) -> Any:
        return ChunkedStep(model, engine, objective, self.chunk, False, Published(0.5, scale_loss=False))


@dataclass(frozen=True)
class BeyondItsBound(Strategy):
    """Promises a tenth and is off by a fifth."""

    fidelity = Fidelity.APPROXIMATE
    bound = 0.1

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.layers.1.mlp.up_proj", ScaledLinear, {"factor": 1.2})


@dataclass(frozen=True)
class WithinItsBound(BeyondItsBound):
    """Promises a quarter and is off by a fifth."""

    bound = 0.25


@dataclass(frozen=True)
class Unstated(Strategy):
    """Approximate, and does not say how much."""

    fidelity = Fidelity.APPROXIMATE


WRONG = {
    "scaled_weight": (ScaledWeight, "model.layers.1.mlp.down_proj.weight"),
    "scaled_in_training": (ScaledInTraining, "model.layers.0.self_attn.o_proj.weight"),
    "wrong_sign": (WrongSign, "model.norm.weight"),
    "lost_chunk": (LostChunk, "model."),
    "biased": (Biased, "model."),
    "beyond_its_bound": (BeyondItsBound, "model.layers.1.mlp.up_proj.weight"),
}
OFFERED = {name: kind for name, (kind, _) in WRONG.items()} | {"within": WithinItsBound, "unstated": Unstated}


def offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a distribution brought them."""
    entries = [EntryPoint(name, f"verify_cases:{kind.__name__}", registry.GROUP) for name, kind in OFFERED.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


class Shrunk(nn.Module):
    """Another module with parameters of the same names, which halves what it is to give."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(old, name)
            made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            made.weight = linear.weight
            setattr(self, name, made)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2
        return made


@dataclass(frozen=True)
class EveryEdit(Strategy):
    """A swap, a wrap and a drop, all of which change the gradient."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Swap("model.layers.0.mlp", Shrunk)
        yield Drop("model.layers.1.mlp.act_fn")
        yield Wrap("model.layers.1.self_attn.o_proj", ScaledLinear, {"factor": 3.0})


def true_and_edited(
    topology: Topology, made_from: Recipe, dtype: torch.dtype, per_rank: list[list[Batch]]
) -> list[dict[str, Tensor]]:
    """Gradients by the model before its edits, as edited, and before its edits again; one after the other in the same
    engine, so that what one leaves behind is in the next."""
    config = load_config(made_from)
    model = build(made_from, config, dtype)
    chosen = [EveryEdit()]
    strategies.edit(model, chosen, topology)
    settings = Settings(OptimizerSpec(), made_from.bf16, False, made_from.engine.stage, made_from.engine.offload)
    fill = TrainedAdapter(made_from, config, topology).fill
    engine = make(made_from.engine.name, model, fill, topology, settings)
    step = strategies.prepare(model, chosen, engine=engine)
    batches = per_rank[topology.rank]
    context = Context(0, 0, 40.0)

    def true() -> Any:
        return true_gradients(engine, strategies.SFT(), batches, context)

    found = []
    for run in (true, lambda: step(batches, context), true):
        run()
        found.append(gathered(engine))
        engine.zero_grad()
    return found
