from __future__ import annotations

from dataclasses import dataclass

from strategies.lowbit.strategy import LowBit, Preset

PLAIN_LAYERS = 0.15
PAPER_SHARE, NVFP4_SHARE = 0.1, 0.18
"""Of the steps, the last ones; 2509.25149 goes over to BF16 at 82% of its tokens."""


@dataclass(frozen=True)
class FP4(LowBit):
    """Linears multiply 4-bit floats, with fine scales and stochastically rounded gradients.

    `paper` (2502.11458): forward of the MLP in FP4 by blocks, of the attention in FP8, backward in FP8. `nvfp4`
    (2509.25149, with the scales of 2512.02010) and `mxfp4`: forward and backward in these formats, the factors of a
    weight's gradient turned by random Hadamard transforms. The last 15% of the layers, one at least, are left as they
    are, and in the last 10% of the steps (18% with `nvfp4` and `mxfp4`) all are. Only Blackwell multiplies these
    formats; elsewhere they are emulated, and slower than plain. Wrong to use for speed there.
    """

    presets = {
        "paper": Preset("fp8", "fp4", PLAIN_LAYERS, PAPER_SHARE),
        "nvfp4": Preset("nvfp4", "nvfp4", PLAIN_LAYERS, NVFP4_SHARE),
        "mxfp4": Preset("mxfp4", "mxfp4", PLAIN_LAYERS, NVFP4_SHARE),
    }
    preset: str = "paper"
