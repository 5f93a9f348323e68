from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from distrib.topology import Topology
from strategies.core.contract import Claim, Fidelity, Strategy
from strategies.core.edits import Edit

BITS = 2


@dataclass(frozen=True)
class ApproxBP(Strategy):
    """GELU, SiLU and their like go backwards as a step function of four levels, the derivative of a sum of ReLUs, which
    takes 2 bits an element; norms go backwards from their output, which the next products keep anyway (2406.16282).

    The forward is the model's own. Activation functions' gradients are approximate, those of norms exact (with
    `activations: false` all are). Wrong to use where gradients must be close: `few_bit` keeps more bits.
    """

    fidelity = Fidelity.APPROXIMATE
    compiles = False
    claims = frozenset({Claim.ACTIVATIONS})
    bound = 0.75
    exact_with: ClassVar[dict[str, Any]] = {"activations": False}
    activations: bool = True

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        from strategies.activations.coded import coded_activations
        from strategies.activations.norms import shared_norms

        norms = list(shared_norms(model))
        activations = list(coded_activations(model, BITS if self.activations else None))
        return [*norms, *activations] if norms or self.activations else []
