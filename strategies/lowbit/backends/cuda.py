"""Quantized products in the int8 and FP8 arithmetic of NVIDIA GPUs. The sums were run on a CPU, where torch has the
same operators, and compared with the reference; not run on a GPU yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.lowbit.backends import fused
from strategies.lowbit.backends.reference import How
from strategies.lowbit.formats import E4M3, INT8, Scaled
from strategies.lowbit.tensor import Quantized

_LONGEST = 2**17
"""Sums of so many products of whole numbers up to 127 fit in 32 bits."""


class CudaInt8(fused.Fused):
    """Whole numbers below 128 through torch._int_mm: exact sums, scaled afterwards."""

    name = "cuda-int8"

    @staticmethod
    def fits(device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 5)

    def how(self, a: Scaled, b: Scaled) -> How | None:
        if not all(x.by_rows and x.format.integers_by for x in (a, b)):
            return None
        return "native" if a.format is INT8 and b.format is INT8 else "exact-via-int8"

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        (M, K), N = a.shape, b.shape[0]
        # It wants more than 16 rows.
        left, right = _laid(a, max(M, 17), K), _laid(b, N + -N % 16, K)
        pieces = zip(torch.split(left, _LONGEST, 1), torch.split(right, _LONGEST, 1), strict=True)
        sums = [torch._int_mm(x, y.T) for x, y in pieces]
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        return fused.scale(total[:M, :N], a.row_scales(), b.row_scales(), dtype)


class CudaFp8(fused.Fused):
    """E4M3 through torch._scaled_mm, its sums in float32. It scales rows itself where it can: into bfloat16, from
    compute capability 9.0 on; else they are scaled afterwards."""

    name = "cuda-fp8"

    @staticmethod
    def fits(device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)

    def how(self, a: Scaled, b: Scaled) -> How | None:
        return "native" if all(x.by_rows and x.format is E4M3 for x in (a, b)) else None

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        (M, K), N = a.shape, b.shape[0]
        left, right = (x.view(torch.float8_e4m3fn) for x in (_laid(a, M, K), _laid(b, N + -N % 16, K)))
        rows_M1, columns_N1 = a.row_scales(), b.row_scales()
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(left.device) >= (9, 0):
            columns_1N = F.pad(columns_N1, (0, 0, 0, -N % 16)).T
            made = torch._scaled_mm(left, right.T, rows_M1.contiguous(), columns_1N.contiguous(), out_dtype=dtype)
            return made[:, :N].contiguous()
        one = torch.ones(1, device=left.device)
        sums = torch._scaled_mm(left, right.T, one, one, out_dtype=torch.float32)
        return fused.scale(sums[:, :N], rows_M1, columns_N1, dtype)


def _laid(x: Quantized, rows: int, columns: int) -> Tensor:
    """The codes' bytes, row after row (cuBLAS does not serve every combination of transposed ones), with zeros up to so
    many rows, and columns to whole sixteens."""
    bytes = x.unpack().codes.view(torch.int8)
    right = columns + -columns % 16 - bytes.shape[1]
    return F.pad(bytes, (0, right, 0, rows - bytes.shape[0])).contiguous()
