from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distrib.errors import choose
from distrib.topology import Topology
from strategies.core.contract import Claim, Strategy
from strategies.core.edits import Edit, Wrap
from strategies.recomputation.block import UNIT, Recomputation, RecomputedBlock, Unit, kind_of
from strategies.recomputation.policies import EVERYWHERE, RULES, Rules
from strategies.streaming.backbone import find_layers

AUTO = "auto"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Recompute(Strategy):
    """Part of what each layer keeps for its backward is thrown away and computed again there, operator by operator
    (selective recomputation, 2205.05198). Exact, to the bit.

    `policy` names what runs again: `norms`, `activations`, `attention` (scores and softmax), `mlp`, `full`, `none`, or
    several; or, by a pattern of module names, what does inside them; on every `every`-th layer. `auto` chooses: the
    operators that cost least time so that what all layers hold until the backward fits `budget`, bytes ("12GiB") or a
    share of what plain training holds. `offload` puts what is still kept into host memory. Wrong to use where
    activations fit: `plain` runs nothing twice; and where layer inputs alone do not: `streambp` with `offload`.
    """

    compiles = False
    claims = frozenset({Claim.LAYERS})
    tensor_parallel = True
    context_parallel = True
    policy: str | list[str] | dict[str, str | list[str]] = field(default_factory=lambda: ["norms", "activations"])
    every: int = 1
    budget: float | str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: 1 for every layer, 2 for every other one")
        if (self.policy == AUTO) != (self.budget is not None):
            given = f"policy={self.policy!r} with budget={self.budget!r}"
            raise ValueError(f"{given}: a budget belongs to policy auto and auto needs one, as '12GiB' or 0.4")
        if self.policy == AUTO and self.every != 1:
            raise ValueError(f"every={self.every} with policy auto, which chooses the layers itself: leave it out")
        self.rules()
        self.most()

    def rules(self) -> Rules:
        """Names of policies by pattern."""
        if self.policy == AUTO:
            return {}
        given = self.policy if isinstance(self.policy, dict) else {EVERYWHERE: self.policy}
        rules = {pattern: [names] if isinstance(names, str) else names for pattern, names in given.items()}
        for name in (name for names in rules.values() for name in names):
            if name not in RULES:
                raise choose("strategy.policy", name, [*RULES, AUTO])
        return rules

    def most(self) -> int | float | None:
        """The budget in bytes, as a share of what plain training holds, or none."""
        if not isinstance(self.budget, str):
            if self.budget is not None and not 0 < self.budget <= 1:
                raise ValueError(f"budget={self.budget}: a share of what plain training holds, or bytes as '12GiB'")
            return None if self.budget is None else float(self.budget)
        found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(?:i?B)?\s*", self.budget, re.IGNORECASE)
        if not found or found[1].count(".") > 1 or found[1] == ".":
            raise ValueError(f"budget={self.budget!r}: bytes as '12GiB' or '300MiB', or a share of what plain holds")
        return int(float(found[1]) * _UNITS[found[2].upper()])

    @property
    def sized(self) -> bool:
        return self.policy == AUTO

    def account(self, model: nn.Module) -> dict[str, Any] | None:
        units = [vars(module)[UNIT] for module in model.modules() if UNIT in vars(module)]
        account = units[0].shared.account if units else None
        return account.as_dict() if account else None

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        layers = find_layers(model)
        if not layers:
            return
        rules = self.rules()
        kinds = tuple(kind_of(layer, name, rules) for name, layer in layers)
        shared = Recomputation(rules, self.every, self.most(), self.offload, not topology.main, kinds)
        for index, (name, _) in enumerate(layers):
            yield Wrap(name, RecomputedBlock, {UNIT: Unit(shared, index, name)})
