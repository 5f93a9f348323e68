from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from distrib.topology import Topology
from strategies.core.contract import Claim, Fidelity, Strategy
from strategies.core.edits import Edit

BOUNDS = {1: 2.0, 2: 0.75, 3: 0.4, 4: 0.2}
"""By bits. The most seen of any parameter was 1.2, 0.37, 0.21 and 0.12, on models of 2 to 24 layers."""


@dataclass(frozen=True)
class FewBit(Strategy):
    """GELU, SiLU and their like keep their derivative in a few bits an element instead of their input (2202.00441).

    The forward is the model's own; gradients are approximate, the closer the more `bits`. Wrong to use where gradients
    must be exact.
    """

    fidelity = Fidelity.APPROXIMATE
    bound = BOUNDS[4]
    compiles = False
    claims = frozenset({Claim.ACTIVATIONS})
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BOUNDS:
            raise ValueError(f"bits={self.bits}: choose 1, 2, 3 or 4")
        object.__setattr__(self, "bound", BOUNDS[self.bits])

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        from strategies.activations.coded import coded_activations

        return coded_activations(model, self.bits)
