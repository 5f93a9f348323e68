"""NVFP4 and MXFP4 products in the 4-bit arithmetic of NVIDIA's Blackwell GPUs. What it hands to torch was compared with
the reference through a model of the layout and of the product in numpy; not run on a GPU yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.lowbit.backends import fused
from strategies.lowbit.backends.reference import How
from strategies.lowbit.formats import E2M1, Scaled
from strategies.lowbit.tensor import Quantized


class Blackwell(fused.Fused):
    """Through torch.nn.functional.scaled_mm: NVFP4 from compute capability 10.0 on, MXFP4 on 10.x, whose products are
    rounded to bfloat16 whatever is asked for."""

    name = "blackwell"

    @staticmethod
    def fits(device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)

    def how(self, a: Scaled, b: Scaled) -> How | None:
        if _is_nvfp4(a) and _is_nvfp4(b):
            return "native"
        if _is_mxfp4(a) and _is_mxfp4(b) and torch.cuda.get_device_capability()[0] == 10:
            return "native"
        return None

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

        (left, left_scales), (right, right_scales) = _operand(a), _operand(b)
        swizzle, scaling = [SwizzleType.SWIZZLE_32_4_4], [ScalingType.BlockWise1x32]
        into = torch.bfloat16
        if _is_nvfp4(a.scaled):
            swizzle, scaling = [*swizzle, SwizzleType.NO_SWIZZLE], [ScalingType.BlockWise1x16, ScalingType.TensorWise]
            into = dtype if dtype == torch.bfloat16 else torch.float32
        made = scaled_mm(
            left, right.T, left_scales, scaling, right_scales, scaling,
            swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=into,
        )  # fmt: skip
        return made[: a.shape[0], : b.shape[0]].to(dtype).contiguous()


def _is_nvfp4(x: Scaled) -> bool:
    return x.format is E2M1 and x.block == 16 and x.scale == "e4m3"


def _is_mxfp4(x: Scaled) -> bool:
    return x.format is E2M1 and x.block == 32 and x.scale == "e8m0"


def _operand(x: Quantized) -> tuple[Tensor, list[Tensor]]:
    """Packed codes, with zeros up to whole 16 rows and 32 columns, and scales."""
    x = x.pack()
    codes = F.pad(x.codes, (0, -x.codes.shape[1] % 16, 0, -x.codes.shape[0] % 16)).contiguous()
    bytes = x.scales.view(torch.uint8)
    if x.scaled.square:
        bytes = bytes.repeat_interleave(int(x.scaled.block), 0)
    scales = swizzled(bytes).view(torch.float8_e8m0fnu if x.of_tensor is None else torch.float8_e4m3fn)
    of_tensor = [] if x.of_tensor is None else [x.of_tensor.reshape(1)]
    return codes.view(torch.float4_e2m1fn_x2), [scales, *of_tensor]


def swizzled(bytes_MB: Tensor) -> Tensor:
    """The order in which tensor cores read scales: tiles of 128 rows and 4 columns, row after row of tiles; in a tile
    the rows r, r + 32, r + 64 and r + 96 are neighbours. Zeros fill it up."""
    M, B = bytes_MB.shape
    padded = F.pad(bytes_MB, (0, -B % 4, 0, -M % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4)  # rows of tiles, quarter, r, columns of tiles, column
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)
