"""A derivative as a step function of few levels, and the step that each number is on, packed into bytes.

The levels, and where they begin, are those of the least squares, found by a dynamic program as in Few-Bit Backward
(2202.00441). The paper weighs by a normal distribution; here the points lie equally close in arcsinh(4x), so that
layers with small inputs and with large ones have their say alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.activations.pieces import as_rows, pieces, rows_of_a_piece

Array = NDArray[Any]

FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}
"""How a code's bits are divided among bytes, the lowest first."""
REACH, CELLS_PER_UNIT = 16, 128
CELLS = 2 * REACH * CELLS_PER_UNIT
POINTS: Array = 0.25 * np.sinh(np.linspace(-1, 1, 801) * np.arcsinh(4 * REACH))


@dataclass(frozen=True)
class StepFunction:
    """`codes` has the number of its step for each cell of [-REACH, REACH], `levels` the height of each step."""

    bits: int
    codes: bytes
    levels: tuple[float, ...]

    def encode(self, x: Tensor) -> Tensor:
        """[pieces, bytes]"""
        rows = as_rows(x)
        size = rows_of_a_piece(rows)
        shape = max(1, -(-rows.shape[0] // size)), packed_bytes(size * rows.shape[1], self.bits)
        packed = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        code_of_cell = torch.tensor(np.frombuffer(self.codes, np.uint8), device=x.device)
        for (piece,), into in zip(pieces(rows), packed, strict=True):
            pack(code_of_cell.index_select(0, _cells(piece)), self.bits, into)
        return packed

    def times(self, gradient: Tensor, packed: Tensor) -> Tensor:
        """The gradient of each element times the height of its step."""
        rows = as_rows(gradient)
        product = torch.empty_like(rows, memory_format=torch.contiguous_format)
        levels = torch.tensor(self.levels, dtype=gradient.dtype, device=gradient.device)
        for (piece, into), codes in zip(pieces(rows, product), packed, strict=True):
            code = unpack(codes[: packed_bytes(piece.numel(), self.bits)], self.bits)[: piece.numel()]
            torch.mul(piece, levels.index_select(0, code.int()).view(piece.shape), out=into)
        return product.view(gradient.shape)


def _cells(piece: Tensor) -> Tensor:
    cell = (piece.flatten().to(torch.promote_types(piece.dtype, torch.float32)) + REACH).mul_(CELLS_PER_UNIT)
    # What is not a number is no index; it is in the output already, where the loss shows it.
    return cell.nan_to_num_(0).clamp_(0, CELLS - 1).int()


def packed_bytes(count: int, bits: int) -> int:
    return -(-count // 8) * bits


def pack(code_n: Tensor, bits: int, into: Tensor) -> None:
    """Codes of `bits` bits, eight in that many bytes, at the beginning of `into`."""
    code_n = torch.nn.functional.pad(code_n, (0, -code_n.numel() % 8))
    start = 0
    for shift, width in _fields(bits):
        per_byte = 8 // width
        parts = ((code_n >> shift) & (2**width - 1)).view(per_byte, -1)
        byte = into[start : start + parts.shape[1]].copy_(parts[0])
        for index in range(1, per_byte):
            byte |= parts[index] << (index * width)
        start += parts.shape[1]


def unpack(packed_n: Tensor, bits: int) -> Tensor:
    """What `pack` was given, with up to seven codes more."""
    code_n = packed_n.new_zeros(len(packed_n) // bits * 8)
    start = 0
    for shift, width in _fields(bits):
        byte = packed_n[start : start + len(code_n) * width // 8]
        parts = [(byte >> offset) & (2**width - 1) for offset in range(0, 8, width)]
        code_n |= torch.cat(parts) << shift
        start += len(byte)
    return code_n


def _fields(bits: int) -> Iterator[tuple[int, int]]:
    """(first bit, number of bits) of each."""
    shift = 0
    for width in FIELDS[bits]:
        yield shift, width
        shift += width


@lru_cache
def fitted(derivative: bytes, bits: int) -> StepFunction:
    """To the derivative at POINTS, in float64."""
    slope_N = np.frombuffer(derivative)
    cuts = _best_cuts(slope_N, 2**bits)
    levels = tuple(float(slope_N[a:b].mean()) for a, b in pairwise(cuts))
    begins = [(POINTS[cut - 1] + POINTS[cut]) / 2 for cut in cuts[1:-1]]
    middles = (np.arange(CELLS) + 0.5) / CELLS_PER_UNIT - REACH
    return StepFunction(bits, np.searchsorted(begins, middles).astype(np.uint8).tobytes(), levels)


def _best_cuts(value_N: Array, count: int) -> list[int]:
    """Where to cut N values into runs so that the squared distances from the runs' means add up to the least."""
    size = len(value_N)
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)]) for x in (value_N, value_N**2))
    start, stop = np.arange(size + 1)[:, None], np.arange(size + 1)[None]
    run = (squares - squares[:, None]) - (sums - sums[:, None]) ** 2 / np.maximum(stop - start, 1)
    cost = np.where(stop > start, run, np.inf)
    least, begins = cost[0], []
    for _ in range(count - 1):
        totals = least[:, None] + cost
        begins.append(totals.argmin(0))
        least = totals.min(0)
    cuts = [size]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    return [0, *reversed(cuts)]
