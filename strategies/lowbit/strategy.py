"""What `int4` and `fp4` share: which linears get which precision, and what a run keeps of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from distrib.contracts import Context
from distrib.errors import Refused, choose
from distrib.topology import Topology
from strategies.core.contract import Claim, Fidelity, Strategy
from strategies.core.edits import Edit, Wrap, base_name, original_class
from strategies.lowbit.backends.reference import How
from strategies.lowbit.draws import Draws
from strategies.lowbit.linear import UNIT, LowBitLinear, Shared, Unit, units
from strategies.lowbit.precision import PLAIN, PRECISIONS
from strategies.lowbit.schedule import Schedule
from strategies.recomputation.policies import mixes_tokens
from strategies.streaming.backbone import find_layers

HOW = ("native", "exact-via-int8", "emulated")


@dataclass(frozen=True)
class Preset:
    """Precisions of what mixes tokens and of the rest of a layer; the last `plain_layers` of the layers stay as they
    are, one at least where it is not 0, and so does everything in the last `target_share` of the steps."""

    attention: str
    mlp: str
    plain_layers: float = 0.0
    target_share: float = 0.0


@dataclass(frozen=True)
class LowBit(Strategy):
    fidelity = Fidelity.UNBIASED
    exact_with: ClassVar = {"target_share": 1.0, "target_forward": False}
    own_forward = True
    compiles = False
    claims = frozenset({Claim.LINEARS})
    presets: ClassVar[dict[str, Preset]]
    preset: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    target_share: float | None = None
    target_forward: bool = False

    def __post_init__(self) -> None:
        if self.preset not in self.presets:
            raise choose("strategy.preset", self.preset, self.presets)
        for name in self.rules.values():
            if name not in PRECISIONS:
                raise choose("strategy.rules", name, PRECISIONS)
        if self.target_share is not None and not 0 <= self.target_share <= 1:
            raise ValueError(f"target_share={self.target_share}: a share of the steps, from 0 to 1")

    @property
    def share(self) -> float:
        return self.presets[self.preset].target_share if self.target_share is None else self.target_share

    def check(self, config: Any, topology: Topology) -> None:
        if topology.stages > 1 and any((chosen := PRECISIONS[name]) and chosen.learned for name in self._names()):
            raise Refused(f"strategy.preset={self.preset!r} in a pipeline: its stages do not share learned scales")

    def _names(self) -> set[str]:
        """Of precisions that are asked for."""
        preset = self.presets[self.preset]
        return {preset.attention, preset.mlp, *self.rules.values()}

    def products(self, device: torch.device) -> Counter[How]:
        """How those of one linear run there, in every precision that is asked for."""
        shared = Shared(Draws(0, 1), Schedule(self.share, self.target_forward))
        found: Counter[How] = Counter()
        for name in self._names():
            if (chosen := PRECISIONS[name]) is not None:
                found.update(Unit(shared, "", chosen, name, turned=False).products(device, trained=True))
        return found

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        shared = Shared(Draws(topology.rank, topology.world), Schedule(self.share, self.target_forward))
        unused = set(self.rules)
        for name, module, precision in self._linears(model):
            for pattern in self.rules:
                if fnmatchcase(base_name(name), pattern):
                    unused.discard(pattern)
                    precision = self.rules[pattern]
            if (chosen := PRECISIONS[precision]) is not None:
                unit = Unit(shared, base_name(name), chosen, precision, original_class(module) is not nn.Linear)
                yield Wrap(name, LowBitLinear, {UNIT: unit}, must_run=False)
        if unused:
            raise Refused(f"strategy.rules: {sorted(unused)[0]!r} is the name of no linear in a layer")

    def _linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        """Those in the layers, but for adapters and routers, with what the preset has for them."""
        preset = self.presets[self.preset]
        layers = find_layers(model)
        share = preset.plain_layers
        plain = min(max(1, round(share * len(layers))), len(layers) - 1) if share else 0
        routed = _routed(model)
        for index, (prefix, layer) in enumerate(layers):
            mixing = {path for path, module in layer.named_modules() if path and mixes_tokens(original_class(module))}
            for path, module in layer.named_modules():
                if not _is_linear(module) or "lora_" in path or getattr(module, "out_features", None) in routed:
                    continue
                parents = path.split(".")
                attends = any(".".join(parents[:depth]) in mixing for depth in range(1, len(parents)))
                kind = preset.attention if attends else preset.mlp
                yield f"{prefix}.{path}", module, kind if index < len(layers) - plain else PLAIN

    @contextmanager
    def running(self, model: nn.Module, context: Context) -> Iterator[None]:
        shared = _shared(model)
        if shared is None:
            yield
            return
        shared.draws.begin(context.seed, context.step)
        shared.schedule.begin(context.step, context.steps)
        if context.steps is not None:
            shared.sizes.begin(context.step)
        yield
        if context.steps is not None:
            shared.sizes.learn(shared.draws.world)

    def state(self, model: nn.Module) -> dict[str, Any]:
        shared = _shared(model)
        return {} if shared is None else {"since": shared.schedule.since, **shared.sizes.state()}

    def restore(self, model: nn.Module, state: dict[str, Any]) -> None:
        if state and (shared := _shared(model)) is not None:
            shared.schedule.since = state["since"]
            shared.sizes.restore(state, next(model.parameters()).device)

    def account(self, model: nn.Module) -> dict[str, Any] | None:
        """How many products of one pass run how."""
        found: Counter[str] = Counter()
        formats: Counter[str] = Counter()
        for unit, module in units(model):
            weight: Any = module.weight
            found.update(unit.products(weight.device, weight.requires_grad))
            formats[unit.label] += 1
        shared = _shared(model)
        since = None if shared is None else shared.schedule.since
        return {"gemm": {how: found[how] for how in HOW}, "linears": dict(formats), "target_since": since}


def _shared(model: nn.Module) -> Shared | None:
    return next((unit.shared for unit, _ in units(model)), None)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return original_class(module) in (nn.Linear, Conv1D)


def _routed(model: Any) -> set[int]:
    """What a router gives to each token: a number for each expert, or one for the expert that all share."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {1} | {number for name in names if isinstance(number := getattr(model.config, name, None), int)}
