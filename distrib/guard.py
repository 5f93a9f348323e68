"""What becomes of a step whose numbers cannot be trained on: no update; then the run stops, skips it or goes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

MOST = 10
"""Steps in a row without an update, after which a run stops all the same."""
REMEMBERED, ENOUGH = 32, 8
"""Losses that tell what is usual: the latest ones, and how many it takes."""


@dataclass
class Guard:
    """The same on every rank, as it is asked about what all ranks have summed."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    spike: float | None = None
    losses: list[float] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Indices of steps that leave the weights alone."""

    def fault(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.spike is None or len(self.losses) < ENOUGH or loss <= self.spike * (usual := median(self.losses)):
            return None
        return f"the loss is {loss:.4g}, more than {self.spike:g} times the usual {usual:.4g}"

    def passed(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-REMEMBERED:]

    def leave_out(self, index: int) -> None:
        self.left_out.append(index)

    def gives_up(self, index: int) -> bool:
        return self.policy == "stop" or all(index - back in self.left_out for back in range(MOST))

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "left_out": list(self.left_out)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """What is known to be bad stays so."""
        self.losses = list(kept.get("losses", ()))
        self.left_out = sorted({*self.left_out, *kept.get("left_out", ())})
