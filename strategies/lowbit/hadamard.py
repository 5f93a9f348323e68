"""Blocks of the Hadamard transform, normalized: it is its own inverse, leaves a product as it is where both factors
have it along what is summed, and spreads an outlier over its block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy
import torch
from torch import Tensor

from strategies.activations.pieces import MANY
from strategies.lowbit.draws import random_bits

_PIECE = {"cpu": 2**19}
"""Elements that a core's cache holds, and that make starting a product worth while."""


def hadamard(x: Tensor, block: int) -> Tensor:
    """Along the last axis, in blocks of that size, a power of two; what is left over in the largest that fit."""
    width = x.shape[-1]
    x_MK = x.contiguous().view(x.shape[:-1].numel(), width)
    with torch.autocast(x.device.type, enabled=False):
        parts = [_transformed(x_MK[:, columns], size) for columns, size in _blocks(width, block)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(x.shape)


def hadamard_(x: Tensor, block: int) -> Tensor:
    """In place, of what is contiguous."""
    count = _PIECE.get(x.device.type, MANY) // max(1, x.shape[-1])
    for rows in torch.split(x.view(x.shape[:-1].numel(), x.shape[-1]), max(1, count)):
        rows.copy_(hadamard(rows, block))
    return x


def random_hadamard(x: Tensor, block: int, seed: int) -> Tensor:
    """With a random sign for every column before: factors with one seed keep their product."""
    signs = 1 - 2 * (random_bits([x.shape[-1]], seed, x.device) & 1).to(x.dtype)
    return hadamard(x * signs, block)


def _transformed(x_MK: Tensor, size: int) -> Tensor:
    """A product with a small matrix. Its ones are exact in any type, and the factor comes before sums are rounded."""
    rows = x_MK.reshape(-1, size)
    return torch.addmm(rows[:1], rows, _ones(size, x_MK.dtype, x_MK.device), beta=0, alpha=size**-0.5).view(x_MK.shape)


def _blocks(width: int, block: int) -> Iterator[tuple[slice, int]]:
    start = 0
    while width > start:
        block = min(block, 1 << (width - start).bit_length() - 1)
        stop = width - (width - start) % block
        yield slice(start, stop), block
        start = stop


def _ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not kept as a tensor: under a mode it would be one of that mode.
    return torch.tensor(_signs(size), dtype=dtype, device=device)


@lru_cache
def _signs(size: int) -> numpy.ndarray:
    made = numpy.ones((1, 1), numpy.int8)
    while len(made) < size:
        made = numpy.block([[made, made], [made, -made]])
    return made
