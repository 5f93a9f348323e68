"""Optimizers and learning-rate schedules. A schedule is a pure function of the step, so resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrib.errors import Refused, choose
from distrib.optim4bit import AdamW4bit

ELEMENTWISE = {"adamw", "adamw4bit", "adam", "sgd", "nadam", "radam", "adamax", "adagrad", "rmsprop"}


@dataclass(frozen=True)
class OptimizerSpec:
    """`name` is one of torch.optim's, lower case, or `adamw4bit`. Weight decay leaves vectors (norms, biases) alone."""

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    def check(self, sharded: bool) -> None:
        if sharded and self.name not in ELEMENTWISE:
            raise Refused(
                f"optimizer.name={self.name!r} looks at whole matrices, which a sharding engine splits: "
                f"choose {', '.join(sorted(ELEMENTWISE))}, or engine ddp"
            )

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
        # ZeRO-3 leaves an empty tensor behind and the shape beside it.
        dimensions = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trainable]
        matrices = [parameter for parameter, count in zip(trainable, dimensions, strict=True) if count > 1]
        vectors = [parameter for parameter, count in zip(trainable, dimensions, strict=True) if count <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return _make(self, [group for group in groups if group["params"]])


def _make(spec: OptimizerSpec, groups: list[dict[str, Any]]) -> Optimizer:
    optim = torch.optim
    match spec.name:
        case "adamw":
            return optim.AdamW(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)
        case "adamw4bit":
            return AdamW4bit(groups, lr=0.0, betas=spec.betas, eps=spec.eps)
        case "adam":
            return optim.Adam(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)
        case "nadam":
            return optim.NAdam(groups, lr=0.0, betas=spec.betas, eps=spec.eps)
        case "radam":
            return optim.RAdam(groups, lr=0.0, betas=spec.betas, eps=spec.eps)
        case "adamax":
            return optim.Adamax(groups, lr=0.0, betas=spec.betas, eps=spec.eps)
        case "sgd":
            return optim.SGD(groups, lr=0.0, momentum=spec.momentum)
        case "adagrad":
            return optim.Adagrad(groups, lr=0.0, eps=spec.eps)
        case "rmsprop":
            return optim.RMSprop(groups, lr=0.0, eps=spec.eps, momentum=spec.momentum)
        case "adafactor":
            return optim.Adafactor(groups, lr=0.0)
    raise choose("optimizer.name", spec.name, [*sorted(ELEMENTWISE), "adafactor"])


DECAY = 0.2
"""The share of the steps at the end in which `warmup_stable_decay` falls."""


@dataclass(frozen=True)
class Schedule:
    """Linear warmup, then cosine or linear decay to zero at `steps`, a linear one in the last steps alone, or none."""

    learning_rate: float
    steps: int
    warmup: int = 0
    kind: str = "cosine"

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.kind:
            case "cosine":
                return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
            case "linear":
                return self.learning_rate * max(0.0, 1.0 - done)
            case "warmup_stable_decay":
                left = max(0, self.steps - step) / max(1.0, DECAY * self.steps)
                return self.learning_rate * min(1.0, left)
        return self.learning_rate
