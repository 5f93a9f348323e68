"""What a run is told in numbers, and those of one of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distrib.checkpoint import Progress
from distrib.energy import Reading
from distrib.optim import Schedule


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. `rows` ends the data in the middle of the last step; None when it has no end."""

    run: Path
    steps: int
    global_batch: int
    rows: int | None
    schedule: Schedule
    seed: int
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    save_total_limit: int | None
    eval_steps: int | None
    profile_steps: tuple[int, int] | None = None
    save_best: bool = False
    save_async: bool = True
    on_save_error: Literal["stop", "continue"] = "stop"
    strategy: Sequence[str] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    failure: tuple[str, float] | None = None
    """Why and when the ranks before these failed."""


@dataclass(frozen=True)
class Totals:
    """What all ranks together have in one global batch."""

    weight: float
    tokens: int
    nonpad_tokens: int
    loss_tokens: int
    stop: bool
    written: bool
    ids: list[int]


@dataclass(frozen=True)
class Figures:
    """Of one update."""

    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Mark:
    """Where an account begins."""

    reading: Reading
    progress: Progress
