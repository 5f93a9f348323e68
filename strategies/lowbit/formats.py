"""Number formats and how their scales are laid out, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

TENSOR: Final = "tensor"
ROW: Final = "row"


@dataclass(frozen=True)
class NumberFormat:
    """A grid of numbers. Steps of a float format double with every power of two from `least_exponent` on; integers have
    steps of one (`mantissa` is None)."""

    name: str
    bits: int
    largest: float
    """Numbers that are scaled to the format lie between it and its negative."""
    mantissa: int | None = None
    least_exponent: int = 0

    @property
    def integers_by(self) -> int | None:
        """What makes whole numbers below 128 of its numbers; None where nothing does."""
        if self.mantissa is None:
            return 1
        return 2 if self is E2M1 else None

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest numbers of the grid, of two as near the even one; beyond the largest, that."""
        step = self._step(x)
        return self._bounded(torch.round(x) if step is None else torch.round(x / step) * step)

    def stochastic(self, x: Tensor, uniform: Tensor) -> Tensor:
        """One of the two neighbours, on average x. `uniform` is in [0, 1)."""
        step = self._step(x)
        return self._bounded(torch.floor(x + uniform) if step is None else torch.floor(x / step + uniform) * step)

    def _bounded(self, x: Tensor) -> Tensor:
        return x.clamp(-self.largest, self.largest)

    def _step(self, x: Tensor) -> Tensor | None:
        """Of float32 numbers: the distance of the grid's numbers around each."""
        if self.mantissa is None:
            return None
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        return power.clamp_(min=2.0**self.least_exponent).mul_(2.0**-self.mantissa)


INT4 = NumberFormat("int4", 4, 7)
INT8 = NumberFormat("int8", 8, 127)
SPLIT = NumberFormat("bit-split int4", 8, 98)
"""Two INT4 numbers, 14 hi + lo: hi the nearest, lo the rest rounded stochastically. As 14 hi is a whole number, their
sum is the whole rounded stochastically, and it fits in 8 bits."""
E2M1 = NumberFormat("e2m1", 4, 6.0, 1, 0)
E4M3 = NumberFormat("e4m3", 8, 448.0, 3, -6)


@dataclass(frozen=True)
class Scaled:
    """A format with its scales. Numbers that are multiplied and added up lie in rows."""

    format: NumberFormat
    block: int | Literal["row", "tensor"] = ROW
    """Numbers of a row that share a scale."""
    square: bool = False
    """A block has as many rows as columns, so that it stays one when rows become columns."""
    scale: Literal["float32", "e4m3", "e8m0"] = "float32"
    """Scales in E4M3 have a float32 number for the whole tensor above them."""
    up: bool = True
    """Scales are rounded up. Else, E4M3 to the nearest and E8M0 down, the largest number of a block may be cut off."""
    either: bool = False
    """Of E2M1 under E4M3, to the nearest: a block's largest number becomes 6 or 4, whichever leaves less of a squared
    error, as there is no 5 (2512.02010)."""
    multiples: int = 0
    """So many numbers of a row share a whole multiple of the row's scale: up to `most_multiple`, with which the largest
    still fit in 8 bits."""

    @property
    def by_rows(self) -> bool:
        """One scale a row at most: then a product is one of the numbers, scaled afterwards."""
        return self.block in (ROW, TENSOR)

    @property
    def turns(self) -> bool:
        """Whether rows can become columns as they are."""
        return self.square or self.by_rows

    @property
    def most_multiple(self) -> int:
        return int(INT8.largest / self.format.largest) if self.multiples else 1
