from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from distrib.contracts import Engine, Step
from distrib.topology import Topology
from strategies.core.contract import Claim, Fidelity, Strategy
from strategies.core.objectives import Objective
from strategies.streaming.router import refuse_router_loss


@dataclass(frozen=True)
class SpaCOPublished(Strategy):
    """BIASED. SpaCO with the weights of its paper (2505.16710): a fixed `share` of the chunks, drawn without
    replacement, what flows through keys and values scaled by 1/share, at most 2, and the loss not at all.

    Paths through several chunks come out too light and the whole gradient is about `share` times too small, which
    Adam does not see. `scale_loss` makes up for the latter. Less variance than `spaco`, for a gradient that points
    elsewhere: its bias was 0.5 to 0.9 of the gradient, with `scale_loss` 0 to 0.3. Wrong to use where exactness is
    wanted even on average.
    """

    fidelity = Fidelity.APPROXIMATE
    compiles = False
    claims = frozenset({Claim.CHUNKS})
    exact_with: ClassVar[dict[str, Any]] = {"share": 1.0}
    bound = 1.0
    chunk: int = 1024
    share: float = 0.5
    scale_loss: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: a number of positions")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: a share of the chunks, above 0")

    def check(self, config: Any, topology: Topology) -> None:
        refuse_router_loss("spaco_published", config)

    def step(self, model: nn.Module, engine: Engine, objective: Objective) -> Step:
        from strategies.streaming.draws import Published
        from strategies.streaming.step import ChunkedStep

        draw = Published(self.share, self.scale_loss)
        return ChunkedStep(model, engine, objective, self.chunk, self.offload, draw)
