"""Quantized products on any device: what every backend is compared with."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from strategies.lowbit.draws import random_bits, uniform
from strategies.lowbit.formats import Scaled
from strategies.lowbit.hadamard import hadamard
from strategies.lowbit.tensor import Quantized, quantize

How = Literal["native", "exact-via-int8", "emulated"]


class Backend(Protocol):
    """Quantizes, and multiplies what is quantized, on one kind of device."""

    name: str

    def how(self, a: Scaled, b: Scaled) -> How | None:
        """How it would multiply such matrices: in arithmetic that the device has for the format ("native"), in int8
        with the very same result, or not at all."""
        ...

    def quantize(
        self, x_MK: Tensor, scaled: Scaled, seed: int | None = None, by_K: Tensor | None = None, spread: int = 0
    ) -> Quantized:
        """Of x in Hadamard blocks of `spread` (0: as it is), its columns multiplied by `by_K` then. With a seed it is
        rounded stochastically. `x_MK` may be a transposed view."""
        ...

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        """a [M, K] times the transpose of b [N, K]. `b` may have been turned."""
        ...


class Reference:
    name = "reference"

    def how(self, a: Scaled, b: Scaled) -> How | None:
        return "emulated"

    def quantize(
        self, x_MK: Tensor, scaled: Scaled, seed: int | None = None, by_K: Tensor | None = None, spread: int = 0
    ) -> Quantized:
        x_MK = hadamard(x_MK, spread) if spread else x_MK
        x = x_MK.float() if by_K is None else x_MK.float() * by_K
        return quantize(x, scaled, None if seed is None else uniform(random_bits(list(x.shape), seed, x.device)))

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        if not (a.scaled.by_rows and b.scaled.by_rows):
            return a.dequantize(dtype) @ b.dequantize(dtype).T
        a, b = a.unpack(), b.unpack()
        K = a.shape[1]
        # Sums of whole numbers are exact in float64.
        whole = a.codes[:, :K].double() @ b.codes[:, :K].double().T
        if dtype != torch.float64:
            whole = whole.float()
        return (whole * a.row_scales() * b.row_scales().T).to(dtype)
