"""The Triton kernels against the reference on a CPU: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.lowbit import tensor
from strategies.lowbit.backends import fused
from strategies.lowbit.draws import random_bits, uniform
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, SPLIT, TENSOR, Scaled
from strategies.lowbit.tensor import Quantized

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "int4": Scaled(INT4),
    "int4-parts": Scaled(INT4, multiples=32),
    "int8": Scaled(INT8),
    "split": Scaled(SPLIT),
    "e2m1-rows": Scaled(E2M1),
    "e4m3": Scaled(E4M3),
    "int8-tensor": Scaled(INT8, TENSOR),
    "e4m3-tensor": Scaled(E4M3, TENSOR),
    "nvfp4": Scaled(E2M1, 16, scale="e4m3"),
    "nvfp4-square": Scaled(E2M1, 16, square=True, scale="e4m3"),
    "nvfp4-nearest": Scaled(E2M1, 16, scale="e4m3", up=False),
    "nvfp4-either": Scaled(E2M1, 16, scale="e4m3", up=False, either=True),
    "mxfp4": Scaled(E2M1, 32, scale="e8m0"),
    "mxfp4-square": Scaled(E2M1, 32, square=True, scale="e8m0"),
    "mxfp4-down": Scaled(E2M1, 32, scale="e8m0", up=False),
    "mxfp8": Scaled(E4M3, 32, scale="e8m0"),
    "int4-blocks": Scaled(INT4, 32),
}


def bits_of(x: Tensor) -> Tensor:
    """NaN is NaN, whatever its sign."""
    x = x.cpu()
    return x.view(torch.uint8) if x.itemsize == 1 and not x.isnan().any() else x.double().nan_to_num(1e300)


def same(made: Quantized, reference: Quantized) -> None:
    reference = reference.pack() if made.packed else reference
    assert made.shape == reference.shape
    for one, other in ((made.codes, reference.codes), (made.scales, reference.scales)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(bits_of(one), bits_of(other))
    assert (made.multiples is None) == (reference.multiples is None)
    if made.multiples is not None and reference.multiples is not None:
        assert torch.equal(made.multiples.cpu(), reference.multiples)
    assert (made.of_tensor is None) == (reference.of_tensor is None)
    if made.of_tensor is not None and reference.of_tensor is not None:
        assert torch.equal(made.of_tensor.cpu(), reference.of_tensor)


def both_ways(x_MK: Tensor, scaled: Scaled, by_K: Tensor | None = None) -> None:
    """To the nearest and with the same random bits."""
    bits = random_bits(list(x_MK.shape), 3, x_MK.device)
    by_K = None if by_K is None else by_K.to(DEVICE)
    here = x_MK.to(DEVICE)
    x = x_MK.float() if by_K is None else x_MK.float() * by_K.cpu()
    same(fused.quantize(here, scaled, by_K=by_K), tensor.quantize(x, scaled))
    same(
        fused.quantize(here, scaled, bits_MK=bits.to(DEVICE), by_K=by_K),
        tensor.quantize(x, scaled, uniform(bits)),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_are_those_of_the_reference(name: str) -> None:
    torch.manual_seed(0)
    both_ways(torch.randn(37, 131) * torch.randn(37, 1).mul(4).exp(), FORMATS[name])
    turned = torch.randn(70, 20).bfloat16().T
    both_ways(turned, FORMATS[name], by_K=torch.randn(70).exp())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_ties_tiny_and_huge_numbers_and_what_is_not_finite(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    x[0] = 0
    x[1] = -torch.linspace(0, 7, 64).mul(2).round().div(2)  # ties, and the largest of INT4
    x[2] = torch.linspace(-448, 448, 64).round()
    x[3] *= 1e-39
    x[4] *= 1e36
    both_ways(x, FORMATS[name])
    x[5, 7], x[6, 40] = torch.nan, -torch.inf
    both_ways(x, FORMATS[name])


@pytest.mark.parametrize("name", ["e4m3", "int8-tensor", "nvfp4-square", "mxfp4"])
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 0)])
def test_a_number_and_none(name: str, shape: tuple[int, int]) -> None:
    both_ways(torch.full(shape, -3.0), FORMATS[name])


def philox(counter: np.ndarray, seed: int) -> list[np.ndarray]:
    """Four words of 32 bits a counter: Philox 4x32 with ten rounds (Salmon and others, 2011)."""
    words = [counter & 0xFFFFFFFF, counter >> 32, np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        one, other = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [other >> 32 ^ words[1] ^ key[0], other & 0xFFFFFFFF, one >> 32 ^ words[3] ^ key[1], one & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


@pytest.mark.parametrize("name", ["int4", "e4m3", "nvfp4", "mxfp4-square"])
@pytest.mark.parametrize("turned", [False, True])
def test_bits_drawn_in_the_kernel_are_those_of_a_generator_known_to_be_good(name: str, turned: bool) -> None:
    (M, K), seed = (20, 131), 2**62 - 12345
    a, b, c, d = philox(np.arange(M * -(-K // 8), dtype=np.uint64).reshape(M, -1), seed)
    words = np.stack([a, c, b, d], -1).reshape(M, -1)
    bits = np.stack([words & 0xFFFF, words >> 16], -1).reshape(M, -1)[:, :K].astype(np.uint16).view(np.int16)
    torch.manual_seed(0)
    x = torch.randn(M, K)
    made = fused.quantize((x.T.contiguous().T if turned else x).to(DEVICE), FORMATS[name], seed=seed)
    same(made, tensor.quantize(x, FORMATS[name], uniform(torch.from_numpy(bits))))


def test_what_is_rounded_with_bits_drawn_in_the_kernel_is_right_on_average() -> None:
    x = torch.cat([torch.full((64, 1), 7.0), torch.rand(64, 1023, generator=torch.Generator().manual_seed(0))], 1)
    error = fused.quantize(x.to(DEVICE), Scaled(INT4), seed=1).dequantize().cpu() - x
    assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5
    # Neighbours share a call of the generator, not its bits.
    for apart in range(1, 9):
        together = error[:, apart:] * error[:, :-apart]
        assert together.mean().abs() < 4 * together.std() / together.numel() ** 0.5
    other = fused.quantize(x.to(DEVICE), Scaled(INT4), seed=2).dequantize().cpu() - x
    assert (error * other).mean().abs() < 4 * (error * other).std() / error.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_scaled_as_in_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, columns = torch.rand(19, 1) * 1e-8, torch.rand(301, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    whole = [torch.randint(-(2**bits), 2**bits, (20, 304)) for bits in (31, 40)]
    for sums in (whole[0].int(), whole[1], torch.randn(20, 304)):
        sums = sums.to(DEVICE)[:19, :301]
        made = fused.scale(sums, rows.to(DEVICE), columns.to(DEVICE), dtype)
        wanted = (sums.cpu().to(wide) * rows * columns.T).to(dtype)
        assert made.is_contiguous()
        # The interpreter cuts numbers off to bfloat16.
        off = 2**-7 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0.0
        torch.testing.assert_close(made.cpu(), wanted, rtol=off, atol=0)


def test_the_operators_know_their_results_shapes() -> None:
    x = torch.randn(20, 70, device=DEVICE).T
    tests = ("test_schema", "test_faketensor")
    for name in ("int4", "int4-parts", "e4m3-tensor", "nvfp4-square"):
        args = (x, torch.rand(20, device=DEVICE), None, 5, fused._data(FORMATS[name]))
        torch.library.opcheck(torch.ops.ebbtide.quantize.default, args, test_utils=tests)
    sums = torch.ones(8, 16, dtype=torch.int32, device=DEVICE)[:, :9]
    scales = torch.ones(8, 1, device=DEVICE), torch.ones(9, 1, device=DEVICE)
    torch.library.opcheck(torch.ops.ebbtide.scale.default, (sums, *scales, torch.bfloat16), test_utils=tests)


@pytest.mark.parametrize("scaled", [Scaled(INT8, scale="e8m0"), Scaled(INT4, 6, scale="e4m3")], ids=["rows", "blocks"])
def test_what_the_kernels_do_not_have_is_left_to_the_reference(scaled: Scaled) -> None:
    x = torch.randn(4, 32)
    same(fused.Fused().quantize(x.to(DEVICE), scaled), tensor.quantize(x, scaled))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_are_built_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, ROOT / "tests" / "triton_build.py", str(capability)], env=environment, check=True)
