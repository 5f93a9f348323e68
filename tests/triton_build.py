"""Builds the kernels for a GPU that is not here, as a launch would: what runs in the interpreter may not compile.
Called by a test in a process of its own, as the interpreter takes the kernels of a whole process."""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from strategies.lowbit.backends import fused, triton_kernels
from strategies.lowbit.formats import E2M1, E4M3, INT4, TENSOR, Scaled

KERNELS = "largest_kernel", "rows_kernel", "blocks_kernel", "scale_kernel"


class Gpu:
    """What a launch asks of a driver until it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Built:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            ptx = self.kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]
            # Approximate divisions, and products rounded once with what is added, are not the reference's.
            assert not any(word in ptx for word in ("div.full", "fma.rn", "mul.ftz", "add.ftz")), self.kernel.__name__

        return call


if __name__ == "__main__":
    driver.set_active(Gpu())
    for name in KERNELS:
        setattr(triton_kernels, name, Built(getattr(triton_kernels, name)))
    x = torch.ones(64, 256, dtype=torch.bfloat16)
    blocks = Scaled(E2M1, 16, scale="e4m3"), Scaled(E2M1, 32, True, "e8m0")
    for scaled in (Scaled(INT4), Scaled(INT4, multiples=32), Scaled(E4M3, TENSOR), *blocks):
        fused.quantize(x, scaled)
        fused.quantize(x, scaled, seed=2**62, by_K=torch.ones(256))
        fused.quantize(x.T, scaled, bits_MK=torch.zeros(256, 64, dtype=torch.int16))
    fused.scale(torch.ones(64, 64, dtype=torch.int32), torch.ones(64, 1), torch.ones(64, 1), torch.bfloat16)
