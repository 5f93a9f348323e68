"""Products of NVIDIA GPUs against the reference. Without a GPU: int8 and FP8 ones with the same operators on the CPU,
4-bit ones with a model of scaled_mm and of the order that it wants scales in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType

from strategies.lowbit import tensor
from strategies.lowbit.backends.blackwell import Blackwell, swizzled
from strategies.lowbit.backends.cuda import CudaFp8, CudaInt8
from strategies.lowbit.backends.reference import Backend, Reference
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, SPLIT, TENSOR, Scaled
from strategies.lowbit.tensor import Quantized, unpacked

NVFP4 = Scaled(E2M1, 16, scale="e4m3")
NVFP4_SQUARE = Scaled(E2M1, 16, square=True, scale="e4m3")
MXFP4 = Scaled(E2M1, 32, scale="e8m0")
MXFP4_SQUARE = Scaled(E2M1, 32, square=True, scale="e8m0")
NATIVE: list[tuple[type[CudaInt8 | CudaFp8 | Blackwell], Scaled, Scaled]] = [
    (CudaInt8, Scaled(INT8), Scaled(INT8, TENSOR)),
    (CudaInt8, Scaled(SPLIT), Scaled(INT4)),
    (CudaInt8, Scaled(E2M1), Scaled(E2M1)),
    (CudaFp8, Scaled(E4M3), Scaled(E4M3, TENSOR)),
    (Blackwell, NVFP4, NVFP4_SQUARE),
    (Blackwell, MXFP4, MXFP4_SQUARE),
]


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_to(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return set_to


def pair(a: Scaled, b: Scaled, M: int = 5, K: int = 83, N: int = 21) -> list[Quantized]:
    torch.manual_seed(0)
    return [tensor.quantize(torch.randn(rows, K) * 3, scaled) for rows, scaled in ((M, a), (N, b))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "b"), [(INT8, INT8), (SPLIT, INT4), (E2M1, E2M1)], ids=lambda format: format.name)
def test_int8_products_are_exact(a: Any, b: Any, dtype: torch.dtype) -> None:
    left, right = pair(Scaled(a), Scaled(b))
    assert torch.equal(CudaInt8().product(left, right, dtype), Reference().product(left, right, dtype))
    weight = pair(Scaled(a), Scaled(b), K=21, N=40)[1].turned()
    left = pair(Scaled(a), Scaled(b), K=40)[0]
    assert torch.equal(CudaInt8().product(left, weight, dtype), Reference().product(left, weight, dtype))
    assert torch.equal(CudaInt8().product(left.pack(), weight, dtype), Reference().product(left, weight, dtype))


def test_sums_beyond_32_bits_are_right() -> None:
    ones = tensor.quantize(torch.ones(2, 2**18 + 3), Scaled(INT8))
    made = CudaInt8().product(ones, ones, torch.float32)
    assert torch.equal(made, Reference().product(ones, ones, torch.float32))
    torch.testing.assert_close(made, torch.full((2, 2), 2.0**18 + 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("newest", [(8, 9), (9, 0)])
def test_fp8_products(newest: tuple[int, int], dtype: torch.dtype, capability: Any) -> None:
    capability(*newest)
    off = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for left, right in (
        pair(Scaled(E4M3), Scaled(E4M3)),
        pair(Scaled(E4M3), Scaled(E4M3, TENSOR)),
        [pair(Scaled(E4M3), Scaled(E4M3), K=40)[0], pair(Scaled(E4M3), Scaled(E4M3), K=21, N=40)[1].turned()],
    ):
        made = CudaFp8().product(left, right, dtype)
        assert made.is_contiguous()
        torch.testing.assert_close(made, Reference().product(left, right, dtype), rtol=off, atol=off)


def test_how_each_serves_which_formats(capability: Any) -> None:
    capability(10, 0)
    assert CudaInt8().how(Scaled(INT8), Scaled(INT8)) == "native"
    assert CudaInt8().how(Scaled(SPLIT), Scaled(INT4)) == "exact-via-int8"
    assert CudaInt8().how(Scaled(E2M1), Scaled(E2M1)) == "exact-via-int8"
    assert CudaInt8().how(Scaled(E4M3), Scaled(E4M3)) is CudaInt8().how(NVFP4, NVFP4) is None
    assert CudaFp8().how(Scaled(E4M3), Scaled(E4M3, TENSOR)) == "native"
    assert CudaFp8().how(Scaled(E4M3), Scaled(INT8)) is CudaFp8().how(Scaled(E4M3, 32), Scaled(E4M3, 32)) is None
    assert Blackwell().how(NVFP4, NVFP4_SQUARE) == Blackwell().how(MXFP4, MXFP4) == "native"
    assert Blackwell().how(NVFP4, MXFP4) is Blackwell().how(Scaled(E2M1), Scaled(E2M1)) is None
    capability(12, 0)
    assert Blackwell().how(NVFP4, NVFP4) == "native"
    assert Blackwell().how(MXFP4, MXFP4) is None


def test_which_devices_they_fit(capability: Any) -> None:
    fitting = {(7, 0): [], (8, 0): [CudaInt8], (8, 9): [CudaInt8, CudaFp8], (10, 3): [CudaInt8, CudaFp8, Blackwell]}
    for version, served in fitting.items():
        capability(*version)
        kinds = CudaInt8, CudaFp8, Blackwell
        assert [kind for kind in kinds if kind.fits(torch.device("cuda", 0))] == served
        assert not any(kind.fits(torch.device("cpu")) for kind in kinds)


def unswizzled(flat: np.ndarray, M: int, B: int) -> np.ndarray:
    """Where cuBLAS looks for the scale of a row and a block: tiles of 128 x 4, 512 bytes each, row after row of tiles,
    in a tile at (row % 32) * 16 + (row // 32) * 4 + column."""
    across = -(-B // 4)
    assert flat.size == -(-M // 128) * across * 512
    made = np.empty((M, B), flat.dtype)
    for row in range(M):
        for block in range(B):
            tile = row // 128 * across + block // 4
            made[row, block] = flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]
    return made


@pytest.mark.parametrize(("M", "B"), [(1, 1), (128, 4), (200, 9), (32, 6)])
def test_scales_lie_as_tensor_cores_read_them(M: int, B: int) -> None:
    scales = torch.randint(1, 256, (M, B), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = swizzled(scales.T.contiguous().T)
    assert np.array_equal(unswizzled(made.numpy(), M, B), scales.numpy())
    assert made.count_nonzero() == M * B


def scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scale_a: list[Tensor], scale_recipe_a: list[ScalingType],
    scale_b: list[Tensor], scale_recipe_b: list[ScalingType],
    swizzle_a: list[SwizzleType], swizzle_b: list[SwizzleType], output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_mm, of two NVFP4 or two MXFP4 matrices, in float64, with the limits of CUDA's."""

    def whole(x: Tensor, scales: list[Tensor]) -> Tensor:
        assert x.dtype == torch.float4_e2m1fn_x2
        assert x.is_contiguous()
        numbers = unpacked(x.view(torch.uint8), E2M1).double() / 2
        M, K = numbers.shape
        assert K % 32 == 0
        flat = torch.from_numpy(unswizzled(scales[0].view(torch.uint8).numpy(), M, -(-K // block)))
        by = flat.view(scales[0].dtype).double().repeat_interleave(block, 1)[:, :K]
        assert all(scale.numel() == 1 and scale.dtype == torch.float32 for scale in scales[1:])
        return numbers * by * torch.tensor([scale.item() for scale in scales[1:]], dtype=torch.float64).prod()

    block, recipe, swizzle, of = {
        torch.float8_e4m3fn: (16, [ScalingType.BlockWise1x16, ScalingType.TensorWise], [1, 0], 2),
        torch.float8_e8m0fnu: (32, [ScalingType.BlockWise1x32], [1], 1),
    }[scale_a[0].dtype]
    assert scale_recipe_a == scale_recipe_b == recipe
    assert [each.value for each in swizzle_a] == [each.value for each in swizzle_b] == swizzle
    assert len(scale_a) == len(scale_b) == of
    assert mat_b.shape[1] % 16 == 0
    assert output_dtype in ((torch.bfloat16, torch.float32) if block == 16 else (torch.bfloat16,))
    return (whole(mat_a, scale_a) @ whole(mat_b.T, scale_b).T).to(output_dtype)


@pytest.mark.parametrize(
    ("a", "b"), [(NVFP4, NVFP4), (NVFP4, NVFP4_SQUARE), (MXFP4, MXFP4), (MXFP4, MXFP4_SQUARE)],
    ids=["nvfp4", "nvfp4-square", "mxfp4", "mxfp4-square"],
)  # fmt: skip
def test_what_blackwell_multiplies(a: Scaled, b: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    left, right = pair(a, b, M=133, K=147, N=37)
    off = 2e-4 if a is NVFP4 else 2**-7  # float32 sums of numbers up to 100
    made = Blackwell().product(left.pack(), right, torch.float32)
    assert made.is_contiguous()
    torch.testing.assert_close(made, Reference().product(left, right, torch.float32), rtol=off, atol=off)
    if b.square:
        left, weight = pair(a, b, M=7, K=40)[0], pair(a, b, K=21, N=40)[1].pack().turned()
        made = Blackwell().product(left, weight, torch.bfloat16)
        wanted = Reference().product(left, weight, torch.float32)
        torch.testing.assert_close(made.float(), wanted, rtol=2**-7, atol=2**-7)


def test_torch_takes_what_blackwell_hands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes that torch checks for a GPU, without one; it has no such check that is right for MXFP4."""
    real, made = torch.nn.functional.scaled_mm, []

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        made.append(real(*args, **kwargs))
        return torch.empty(made[0].shape)  # without a GPU's library, no part of what is on one can be taken

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", seen)
    with FakeTensorMode():
        codes = [torch.empty(rows, 40, dtype=torch.uint8, device="cuda") for rows in (133, 37)]
        scales = [torch.empty(rows, 5, dtype=torch.float8_e4m3fn, device="cuda") for rows in (133, 37)]
        of = torch.empty((), device="cuda")
        left, right = (
            Quantized(code, scale, of, NVFP4, (len(code), 75), packed=True)
            for code, scale in zip(codes, scales, strict=True)
        )
        assert Blackwell().product(left, right, torch.bfloat16).shape == (133, 37)
    assert (made[0].shape, made[0].dtype) == ((144, 48), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "a", "b"), NATIVE)
def test_products_on_a_gpu(kind: Any, a: Scaled, b: Scaled, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    backend: Backend = kind()
    if not (kind.fits(device) and backend.how(a, b)):
        pytest.skip(f"{backend.name}: not with compute capability {torch.cuda.get_device_capability()}")
    torch.manual_seed(0)
    for M, K, N in ((5, 83, 21), (256, 512, 384)):
        x, w = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
        left, right = backend.quantize(x.to(device), a), backend.quantize(w.to(device), b)
        made = backend.product(left, right, dtype)
        wanted = Reference().product(Reference().quantize(x, a), Reference().quantize(w, b), torch.float32)
        error = (made.cpu().float() - wanted).abs().max() / wanted.abs().max()
        rounded = dtype == torch.bfloat16 or (kind is Blackwell and a is MXFP4)
        assert made.dtype == dtype
        assert error < (2**-8 if rounded else 0 if kind is CudaInt8 else 1e-5) + 1e-9
        if b.turns:
            dy = torch.randn(M, N)
            back = backend.product(backend.quantize(dy.to(device), a), right.turned(), dtype)
            wanted = Reference().product(
                Reference().quantize(dy, a), Reference().quantize(w, b).turned(), torch.float32
            )
            error = (back.cpu().float() - wanted).abs().max() / wanted.abs().max()
            assert error < 2**-7
