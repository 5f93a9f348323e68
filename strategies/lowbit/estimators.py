"""Leverage-score sampling of a bit-split gradient, after "Training Transformers with 4-bit Integers" (2306.11987).

A gradient in SPLIT is 14 hi + lo, two INT4 matrices: for T tokens, 2T rows. Of them T are kept on average, those that
matter more likely, and divided by their probability: the products are right on average, and the INT4 arithmetic is
that of one matrix. What is kept comes back as float32, hi and lo summed.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.lowbit.draws import random_bits, uniform
from strategies.lowbit.formats import SPLIT
from strategies.lowbit.tensor import Quantized

_CHANCES = 2**16


def sampled_for_input(by_TO: Quantized, seed: int) -> Tensor:
    """[T, O], to be multiplied with the weight."""
    parts = split(by_TO)
    weights = sample(_lengths(parts, 2), seed)
    return (parts * weights[:, :, None]).sum(0)


def sampled_for_weight(by_OT: Quantized, x_TI: Tensor, seed: int) -> Tensor:
    """[O, T], to be multiplied with x, which is without the scales that the gradient has in it."""
    parts = split(by_OT)
    weights = sample(_lengths(parts, 1) * _lengths(x_TI, 1), seed)
    return (parts * weights[:, None, :]).sum(0)


def split(whole: Quantized) -> Tensor:
    """[2, rows, columns]: 14 hi and lo, with their scales."""
    assert whole.scaled.format is SPLIT
    numbers = whole.numbers()[:, : whole.shape[1]]
    hi = torch.round(numbers / 14) * 14
    return torch.stack([hi, numbers - hi]) * whole.row_scales()


def _lengths(x: Tensor, dim: int) -> Tensor:
    """float64, as squares of small numbers are nothing in float32: their rows would never be drawn."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return lengths


def sample(sizes: Tensor, seed: int) -> Tensor:
    """[2, T]: for each row 1 / p with probability p, else 0. p = min(1, c size), with c such that all p add up to T."""
    T = sizes.shape[1]
    # For any m, the sum of min(1, c size) is at most 2T - m + c (the sum of the m least), and equal for one of them:
    # c is the largest of those with which the bounds are T.
    least = sizes.flatten().sort().values.cumsum(0)[T:]
    c = F.pad(torch.arange(1, T + 1, device=sizes.device) / least, (0, 1)).amax()
    p = torch.where(sizes == 0, 0.0, (c * sizes).clamp(max=1))
    # A probability is a whole number of the chances that the random bits have.
    p = ((p * _CHANCES).ceil() / _CHANCES).float()
    drawn = uniform(random_bits(list(sizes.shape), seed, sizes.device)) < p
    return torch.where(p == 0, 0.0, drawn / p)
