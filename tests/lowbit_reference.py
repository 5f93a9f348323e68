"""Quantized linears by the textbook: what each format rounds to, written out in float64, straight through the rounding
for autograd. Nothing of the product takes part.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rounds = Callable[[Tensor], Tensor]


def grid(mantissa: int, least: int, largest: float) -> Tensor:
    """The numbers of a float format from 0 on, in order, so that every other one is even."""
    small = [m * 2.0 ** (least - mantissa) for m in range(2**mantissa)]
    powers = range(least, least + 16)
    large = [(1 + m / 2**mantissa) * 2.0**p for p in powers for m in range(2**mantissa)]
    return torch.tensor([x for x in small + large if x <= largest], dtype=torch.float64)


E2M1 = grid(1, 0, 6)
E4M3 = grid(3, -6, 448)


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Of two as near the even one; beyond the largest, that."""
    size = x.abs().clamp(max=float(numbers[-1]))
    above = torch.searchsorted(numbers, size).clamp(min=1)
    low, high = numbers[above - 1], numbers[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.where(up, high, low) * x.sign()


def blocks_of(width: int, most: int) -> list[int]:
    """Powers of two that add up to the width, the largest first."""
    found: list[int] = []
    while (left := width - sum(found)) > 0:
        found.append(min(most, 2 ** int(math.log2(left))))
    return found


def hadamard_matrix(width: int, most: int = 32) -> Tensor:
    """Block-diagonal, its own inverse."""
    made = []
    for size in blocks_of(width, most):
        ones = torch.ones(1, 1, dtype=torch.float64)
        while len(ones) < size:
            ones = torch.kron(ones, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        made.append(ones / math.sqrt(size))
    return torch.block_diag(*made)


def by_blocks(x: Tensor, rows: int, columns: int, rounds: Rounds) -> Tensor:
    """Each block on its own."""
    made = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            made[i : i + rows, j : j + columns] = rounds(x[i : i + rows, j : j + columns])
    return made


def int4(x: Tensor) -> Tensor:
    """Parts of 32 numbers of a row have the least multiple of its scale, from 1 to 18, that they fit with."""
    scale = x.abs().amax(1, keepdim=True) / 126
    parts = [
        (part / (scale * multiple)).round() * scale * multiple
        for part in x.split(32, 1)
        for multiple in [(part.abs().amax(1, keepdim=True) / scale / 7).ceil().clamp(1, 18)]
    ]
    return torch.cat(parts, 1)


def fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 448
    return nearest(x / scale, E4M3) * scale


def fp4(x: Tensor) -> Tensor:
    def rounds(block: Tensor) -> Tensor:
        scale = block.abs().max() / 6
        return nearest(block / scale, E2M1) * scale

    return by_blocks(x, 1, 32, rounds)


def nvfp4(x: Tensor) -> Tensor:
    of_tensor = x.abs().max() / 6 / 448

    def rounds(block: Tensor) -> Tensor:
        made = []
        for largest in (6, 4):
            scale = nearest(block.abs().max() / largest / of_tensor, E4M3) * of_tensor
            made.append(nearest(block / scale, E2M1) * scale)
        return min(made, key=lambda rounded: (rounded - block).square().sum().item())

    return by_blocks(x, 1, 16, rounds)


def mxfp4(x: Tensor, rows: int) -> Tensor:
    def rounds(block: Tensor) -> Tensor:
        scale = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 6))
        return nearest(block / scale, E2M1) * scale

    return by_blocks(x, rows, 32, rounds)


def straight(x: Tensor, rounds: Rounds) -> Tensor:
    return x + (rounds(x.detach()) - x).detach()


def learned(x: Tensor) -> Tensor:
    """As before the first update of the scale. What is cut off has no gradient."""
    scale = 2 * x.detach().abs().mean() / math.sqrt(7)
    return straight((x / scale).clamp(-8, 7), torch.round) * scale


ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = {
    "int4": (lambda x: straight(x, int4), lambda w: straight(w, int4), True),
    "int4_learned": (learned, learned, True),
    "fp8": (lambda x: straight(x, fp8), lambda w: straight(w, fp8), False),
    "fp4": (lambda x: straight(x, fp4), lambda w: straight(w, fp4), False),
    "nvfp4": (lambda x: straight(x, nvfp4), lambda w: straight(w, nvfp4), False),
    "mxfp4": (lambda x: straight(x, lambda m: mxfp4(m, 1)), lambda w: straight(w, lambda m: mxfp4(m, 32)), False),
}
"""By precision: the input and the weight as they are rounded, and whether a Hadamard transform comes before."""


def linear(precision: str, x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    of_x, of_weight, spread = ROUNDED[precision]
    x_TI = x.reshape(-1, x.shape[-1])
    if spread:
        turn = hadamard_matrix(x.shape[-1])
        x_TI, weight_OI = x_TI @ turn, weight_OI @ turn
    return F.linear(of_x(x_TI), of_weight(weight_OI), bias).view(*x.shape[:-1], -1)


class Straight:
    """Mixed into a linear of a model that is the reference."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return linear(self.precision, x, self.weight, self.bias)


def straighten(model: nn.Module, precision_of: Callable[[str], str | None]) -> nn.Module:
    """In place, the linears whose names have a precision."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (precision := precision_of(name)):
            module.__class__ = type("Linear", (Straight, nn.Linear), {})
            module.precision = precision  # type: ignore[assignment]
    return model


def off(draws: Tensor, truth: Tensor) -> float:
    """How far their mean is from the truth, in what chance and float32 explain: the root mean square, in which every
    column counts the same, as else the few that are large decide alone."""
    draws = draws.double()
    explained = draws.var(0) / len(draws) + (1e-6 * truth).square()
    return ((draws.mean(0) - truth).square().mean(0) / explained.mean(0)).mean().sqrt().item()
