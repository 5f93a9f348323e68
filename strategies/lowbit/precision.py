"""How the three products of a linear are quantized: y = x W', dx = dy W, dW = dy' x."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.lowbit.formats import E2M1, E4M3, INT4, SPLIT, TENSOR, Scaled


@dataclass(frozen=True)
class Precision:
    """The forward rounds to the nearest; whatever a backward rounds it rounds stochastically, so that gradients are on
    average those of the forward as it was, with its rounded input and weight."""

    x: Scaled
    weight: Scaled
    by: Scaled
    """Gradients, and what has to be rounded again since its scales do not fit the backward's sums."""
    hadamard: int = 0
    """Input and weight are turned by blocks of that size, which spreads outliers."""
    random_hadamard: int = 0
    """So are both factors of the weight's gradient, along the tokens and with random signs."""
    stochastic: bool = True
    learned: bool = False
    """Scales of the forward are learned, and rows of the backward sampled."""

    def serves_again(self, scaled: Scaled) -> bool:
        """Whether codes of the forward can be multiplied with gradients as they are."""
        same_kind = (scaled.format.integers_by is None) == (self.by.format.integers_by is None)
        return scaled.turns and scaled.by_rows == self.by.by_rows and same_kind


NVFP4 = Scaled(E2M1, 16, scale="e4m3")
NVFP4_NEAREST = Scaled(E2M1, 16, scale="e4m3", up=False, either=True)
MXFP4 = Scaled(E2M1, 32, scale="e8m0")
MXFP4_SQUARE = Scaled(E2M1, 32, square=True, scale="e8m0")

PLAIN = "plain"
"""Not quantized."""
PRECISIONS: dict[str, Precision | None] = {
    PLAIN: None,
    "int4": Precision(Scaled(INT4, multiples=32), Scaled(INT4, multiples=32), Scaled(SPLIT), hadamard=32),
    "int4_learned": Precision(Scaled(INT4, TENSOR), Scaled(INT4, TENSOR), Scaled(SPLIT, TENSOR), 32, learned=True),
    "fp8": Precision(Scaled(E4M3), Scaled(E4M3), Scaled(E4M3)),
    "fp4": Precision(Scaled(E2M1, 32), Scaled(E2M1, 32), Scaled(E4M3)),
    "fp4_rows": Precision(Scaled(E2M1), Scaled(E2M1), Scaled(SPLIT)),
    "nvfp4": Precision(NVFP4_NEAREST, NVFP4_NEAREST, NVFP4, random_hadamard=16),
    "mxfp4": Precision(MXFP4, MXFP4_SQUARE, MXFP4, random_hadamard=32),
}
