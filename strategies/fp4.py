from __future__ import annotations

from dataclasses import dataclass

from strategies.lowbit.strategy import LowBit, Preset


@dataclass(frozen=True)
class FP4(LowBit):
    """Linears multiply 4-bit floats, with fine scales and stochastically rounded gradients.

    `paper` (2502.11458): forward of the MLP in FP4 by blocks of 128, of the attention in FP8, backward in FP8, and the
    last 8% of the steps in target precision. `nvfp4` and `mxfp4`: forward and backward in these formats, the factors of
    a weight's gradient turned by random Hadamard transforms, the last 15% of the layers left as they are. Only
    Blackwell multiplies them; elsewhere they are emulated, and slower than plain. Wrong to use for speed there.
    """

    presets = {
        "paper": Preset("fp8", "fp4", target_share=0.08),
        "nvfp4": Preset("nvfp4", "nvfp4", plain_layers=0.15),
        "mxfp4": Preset("mxfp4", "mxfp4", plain_layers=0.15),
    }
    preset: str = "paper"
