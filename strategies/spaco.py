from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from distrib.contracts import Engine, Step
from distrib.topology import Topology
from strategies.core.contract import Claim, Fidelity, Strategy
from strategies.core.objectives import Objective
from strategies.streaming.router import refuse_router_loss

log = logging.getLogger("ebbtide")


@dataclass(frozen=True)
class SpaCO(Strategy):
    """SeCO that walks back each chunk with probability `p` only, and weighs what is left so that the gradient is the
    true one in expectation (after 2505.16710, whose own weights are biased: see `spaco_published`).

    It saves most of the backwards, and pays in variance: about sqrt(1/p - 1) times the gradient of a sequence, as if
    each sequence were trained with probability p. `keep: answers` always takes the chunks that have tokens to learn;
    a list keeps chunks by number, negative ones from the end. Wrong to use where chunks disagree and fewer sequences
    under `seco` would do as well.
    """

    fidelity = Fidelity.UNBIASED
    compiles = False
    claims = frozenset({Claim.CHUNKS})
    exact_with: ClassVar[dict[str, Any]] = {"p": 1.0}
    chunk: int = 1024
    p: float = 0.5
    keep: Literal["none", "answers"] | list[int] = "none"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: a number of positions")
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: a probability above 0")

    @property
    def noise(self) -> float:
        return math.sqrt(1 / self.p - 1)

    def check(self, config: Any, topology: Topology) -> None:
        refuse_router_loss("spaco", config)

    def step(self, model: nn.Module, engine: Engine, objective: Objective) -> Step:
        from strategies.streaming.draws import Sticky
        from strategies.streaming.sequence import ChunkedBatch
        from strategies.streaming.step import ChunkedStep

        def must(batch: ChunkedBatch) -> list[bool]:
            if self.keep == "answers":
                return batch.learned()
            count = len(batch.bounds)
            kept = [] if self.keep == "none" else [index % count for index in self.keep if -count <= index < count]
            return [index in kept for index in range(count)]

        if engine.topology.main and self.p < 1:
            log.info("spaco: p=%g gives each sequence's gradient a relative std of about %.2g", self.p, self.noise)
        return ChunkedStep(model, engine, objective, self.chunk, self.offload, Sticky(self.p), must)
