"""When a run goes over to its target precision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Schedule:
    """The last `share` of the steps are in the target precision: all products, or with `forward_only` the forward's.
    Once begun it stays, also when the run is made longer."""

    share: float
    forward_only: bool
    since: int | None = None
    """The first such step."""

    def begin(self, step: int, steps: int | None) -> None:
        if self.since is None and self.share and steps and step >= steps * (1 - self.share):
            self.since = step

    @property
    def plain(self) -> bool:
        return self._begun and not self.forward_only

    @property
    def forward_plain(self) -> bool:
        return self._begun and self.forward_only

    @property
    def _begun(self) -> bool:
        return self.share == 1 or self.since is not None
