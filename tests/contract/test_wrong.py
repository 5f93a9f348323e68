"""Strategies that are wrong in small ways, to show that the suite finds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from contract.checks import CHECKS

from distrib.errors import UserError
from strategies import Strategy
from strategies.activations.norms import FORMULA, Formula
from strategies.approx_bp import ApproxBP
from strategies.core.edits import Swap, Wrap
from strategies.core.steps import PlainStep
from strategies.few_bit import FewBit
from strategies.pipelining.store import Store
from strategies.twobp import TwoBP


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-9)


class ScaledLayer:
    def forward(self, hidden, *args, **kwargs):
        return super().forward(Scaled.apply(hidden), *args, **kwargs)


@dataclass(frozen=True)
class ScaledGradients(Strategy):
    """The gradient below one layer is a billionth too large."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.layers.1", ScaledLayer)


class DroppingStep(PlainStep):
    def __call__(self, micro_batches, context):
        cut = [{**batch, "labels": batch["labels"].clone()} for batch in micro_batches]
        for batch in cut:
            batch["labels"][:, -1] = -100
        return super().__call__(cut, context)


@dataclass(frozen=True)
class DroppedToken(Strategy):
    """The last token of every row is not learned."""

    def step(self, model, engine, objective):
        return DroppingStep(engine, objective)


class OneDocument:
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class LeakedPacking(Strategy):
    """Documents of a packed row see each other."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model", OneDocument)


class LocalWeightStep(PlainStep):
    def __call__(self, micro_batches, context):
        mean = len(micro_batches)
        parts = [
            super(LocalWeightStep, self).__call__([b], replace(context, weight=self.objective.weight(b) * mean or 1))
            for b in micro_batches
        ]
        return replace(parts[0], loss=sum(p.loss for p in parts), tokens=sum(p.tokens for p in parts))


@dataclass(frozen=True)
class MeanOfMeans(Strategy):
    """Each micro-batch is averaged by itself, the oldest mistake of accumulation."""

    def step(self, model, engine, objective):
        return LocalWeightStep(engine, objective)


class Renamed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@dataclass(frozen=True)
class RenamedParameters(Strategy):
    """A wrapper module, which renames parameters."""

    def edits(self, model: Any, topology: Any) -> Any:
        yield Swap("model.layers.0.mlp", Renamed)


class Unseeded(PlainStep):
    def __call__(self, micro_batches, context):
        return super().__call__(micro_batches, replace(context, seed=torch.initial_seed()))


@dataclass(frozen=True)
class UnseededDropout(Strategy):
    """Randomness from the process, not from the context."""

    def step(self, model, engine, objective):
        return Unseeded(engine, objective)


@dataclass(frozen=True)
class StepsInReverse(FewBit):
    """Derivatives are looked up from the wrong end."""

    def edits(self, model, topology):
        for edit in super().edits(model, topology):
            steps = edit.settings["_ebbtide_steps"]
            yield replace(edit, settings={"_ebbtide_steps": replace(steps, levels=steps.levels[::-1])})


@dataclass(frozen=True)
class WrongNorms(ApproxBP):
    """Norms go backwards by a formula that is not theirs."""

    activations: bool = False
    centred: bool = False
    offset: float = 0.0

    def edits(self, model, topology):
        for edit in super().edits(model, topology):
            if FORMULA in edit.settings:
                eps = edit.settings[FORMULA].eps
                yield replace(edit, settings={FORMULA: Formula(self.centred, self.offset, eps)})


@dataclass(frozen=True)
class CentredNorms(WrongNorms):
    centred: bool = True


@dataclass(frozen=True)
class OffsetNorms(WrongNorms):
    offset: float = 1e-9


@dataclass(frozen=True)
class ForgottenWeight(TwoBP):
    """Of the weight gradients that wait, the first is never made."""

    schedule: str = "1f1b+2bp"

    def step(self, model, engine, objective):
        step = super().step(model, engine, objective)
        for part in step.parts.values():
            part.store = Forgetful()
        return step


class Forgetful(Store):
    def run(self, key):
        del self._waiting[key][:1]
        super().run(key)


WRONG = {
    ScaledGradients: {"gradients, full, one", "gradients, lora, packing", "gradients, tied, dpo"},
    DroppedToken: {"gradients, full, one", "gradients, lora, packing"},
    LeakedPacking: {"gradients, full, packing", "trains_in_any_loop"},
    MeanOfMeans: {"gradients, full, accumulation", "gradients, tied, prompt masks"},
    RenamedParameters: {"keeps_names"},
    UnseededDropout: {"repeats_bitwise"},
    StepsInReverse: {"gradients, full, one", "gradients, lora, packing", "trains_in_any_loop", "copies"},
    CentredNorms: {"gradients, full, one", "gradients, lora, dpo"},
    OffsetNorms: {"gradients, tied, packing"},
    ForgottenWeight: {"gradients, full, accumulation", "gradients, lora, packing", "gradients, tied, dpo"},
}
UNHARMED = {
    LeakedPacking: "gradients, full, accumulation",
    MeanOfMeans: "gradients, full, one",
    UnseededDropout: "gradients, full, accumulation",
    StepsInReverse: "generates",
    WrongNorms: "gradients, full, one",
    ForgottenWeight: "generates",
}


@pytest.mark.parametrize(("strategy", "name"), [(s, name) for s, names in WRONG.items() for name in sorted(names)])
def test_a_wrong_strategy_fails(strategy, name):
    with pytest.raises((AssertionError, UserError)):
        CHECKS[name](strategy)


@pytest.mark.parametrize(("strategy", "name"), UNHARMED.items())
def test_it_fails_for_its_mistake_alone(strategy, name):
    CHECKS[name](strategy)
