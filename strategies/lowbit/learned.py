"""The linear of "Training Transformers with 4-bit Integers" (2306.11987): one learned scale a matrix, as in LSQ, and
backward products of sampled rows. It is arithmetic in float: what it would be on a device with INT4 products.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from strategies.lowbit.backends.reference import Reference
from strategies.lowbit.draws import seed_of
from strategies.lowbit.estimators import sampled_for_input, sampled_for_weight
from strategies.lowbit.formats import SPLIT, TENSOR, Scaled

LEAST, MOST = -8.0, 7.0
RATE = 1e-3
"""Of an update by Adam, relative to the scale."""
_BETAS = 0.9, 0.999
_GRADIENT = Scaled(SPLIT, TENSOR)


@dataclass
class Sizes:
    """The scales of one model's matrices, [2] for input and weight of each linear; they are learned by Adam in steps of
    a run. Till the first step has ended each rank has that of its own first input."""

    sizes: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    """[2, 2] of each linear: first and second."""
    updates: int = 0

    def of(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        if name not in self.sizes:
            first = [2 * matrix.detach().float().abs().mean() / MOST**0.5 for matrix in (x, weight)]
            self.sizes[name] = torch.stack(first).clamp_(min=torch.finfo(torch.float32).tiny)
            self.gradients[name] = torch.zeros_like(self.sizes[name])
        return self.sizes[name]

    def begin(self, step: int) -> None:
        """Of a run. Gradients since the step before are of what was only tried, as is everything before the first."""
        if step == 0:
            self.forget()
        for gradient in self.gradients.values():
            gradient.zero_()

    def learn(self, world: int) -> None:
        """After a step; every rank calls it."""
        names = sorted(self.sizes)
        if not names:
            return
        found = torch.stack([torch.stack([self.sizes[name], self.gradients[name]]) for name in names])
        if world > 1:
            dist.all_reduce(found)
        self.updates += 1
        for name, (size, gradient) in zip(names, found, strict=True):
            self._update(name, size / world, gradient)

    def _update(self, name: str, size: Tensor, gradient: Tensor) -> None:
        first, second = self.moments.setdefault(name, torch.zeros(2, 2, device=size.device))
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        mean, square = (m / (1 - beta**self.updates) for m, beta in zip((first, second), _BETAS, strict=True))
        self.sizes[name] = size * torch.exp(-RATE * mean / (square.sqrt() + torch.finfo(torch.float32).tiny))

    def state(self) -> dict[str, Any]:
        kept = {name: [self.sizes[name].tolist(), moments.flatten().tolist()] for name, moments in self.moments.items()}
        return {"updates": self.updates, "sizes": kept}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self.forget()
        self.updates = state["updates"]
        for name, (size, moments) in state["sizes"].items():
            self.sizes[name] = torch.tensor(size, device=device)
            self.gradients[name] = torch.zeros_like(self.sizes[name])
            self.moments[name] = torch.tensor(moments, device=device).view(2, 2)

    def forget(self) -> None:
        self.sizes, self.gradients, self.moments, self.updates = {}, {}, {}, 0


def learned_product(x_TI: Tensor, weight_OI: Tensor, name: str, sizes: Sizes, draws: Any) -> Tensor:
    """By autograd, with the gradients of the paper."""
    size = sizes.of(name, x_TI, weight_OI)
    x_TI, weight_OI = (
        _Rounded.apply(matrix, size, name, sizes, index)  # type: ignore[no-untyped-call]
        for index, matrix in enumerate((x_TI, weight_OI))
    )
    return _Sampled.apply(x_TI, weight_OI, name, draws)  # type: ignore[no-untyped-call, no-any-return]


def true_product(x_TI: Tensor, weight_OI: Tensor, name: str, sizes: Sizes) -> Tensor:
    """The same, straight through the rounding for autograd."""
    size = sizes.of(name, x_TI, weight_OI)
    return F.linear(*(_straight(matrix, by) for matrix, by in zip((x_TI, weight_OI), size, strict=True)))


def _straight(x: Tensor, size: Tensor) -> Tensor:
    bounded = (x / size).clamp(LEAST, MOST)
    return (bounded + (bounded.round() - bounded).detach()) * size


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, name: str, sizes: Sizes, index: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.by, ctx.gradient, ctx.index = size[index], sizes.gradients[name], index
        made: Tensor = (x.float() / ctx.by).clamp(LEAST, MOST).round() * ctx.by
        return made.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        scaled = x.float() / ctx.by
        bounded = scaled.clamp(LEAST, MOST)
        inside = scaled == bounded
        by_size = (by * torch.where(inside, bounded.round() - scaled, bounded)).sum(dtype=torch.float32)
        ctx.gradient[ctx.index] += by_size / (x.numel() * MOST) ** 0.5
        return (by * inside).to(x.dtype), None, None, None, None


class _Sampled(torch.autograd.Function):
    """Factors as they are rounded; a gradient is split, and its rows are sampled."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, name: str, draws: Any) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.name, ctx.draws = name, draws
        return x_TI @ weight_OI.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_TO: Tensor) -> Any:
        x_TI, weight_OI = ctx.saved_tensors
        key = ctx.draws.next(ctx.name)
        quantize = Reference().quantize
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            split = quantize(by_TO, _GRADIENT, seed_of(*key, "by input"))
            by_x = sampled_for_input(split, seed_of(*key, "rows by input")).to(x_TI.dtype) @ weight_OI
        if ctx.needs_input_grad[1]:
            split = quantize(by_TO.T, _GRADIENT, seed_of(*key, "by weight"))
            by_weight = sampled_for_weight(split, x_TI, seed_of(*key, "rows by weight")).to(x_TI.dtype) @ x_TI
        return by_x, by_weight, None, None
