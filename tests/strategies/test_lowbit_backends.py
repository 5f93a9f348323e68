"""Quantized products on a CPU, bit for bit those of the reference; which backends are let serve; Hadamard blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.lowbit.backends import cpu, probe
from strategies.lowbit.backends.cpu import CpuInt8
from strategies.lowbit.backends.reference import Reference
from strategies.lowbit.draws import next_bits, random_bits
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, ROW, SPLIT, TENSOR, Scaled
from strategies.lowbit.hadamard import hadamard, hadamard_, random_hadamard
from strategies.lowbit.tensor import Quantized

WHOLE = (INT4, INT8, SPLIT, E2M1)
CPU = torch.device("cpu")
NVFP4 = Scaled(E2M1, 16, scale="e4m3")
IN_PARTS = [Scaled(INT4, multiples=part) for part in (8, 6)]


def named(scaled: Scaled) -> str:
    return f"{scaled.format.name} {scaled.block}" + f" by {scaled.multiples}" * (scaled.multiples > 0)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["small pieces", "as it is"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small pieces":
        for name, value in (("_ELEMENTS", 300), ("_TILE_ROWS", 16), ("_TILE_COLUMNS", 8)):
            monkeypatch.setattr(cpu, name, value)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    "scaled", [*(Scaled(format, block) for format in WHOLE for block in (ROW, TENSOR)), *IN_PARTS], ids=named
)
def test_codes_and_scales_are_the_references(scaled: Scaled) -> None:
    for (M, K), dtype, turned in itertools.product(
        ((1, 1), (39, 53), (22, 32)), (torch.float32, torch.bfloat16), (0, 1)
    ):
        x = drawn(K, M, dtype=dtype).T if turned else drawn(M, K, dtype=dtype)
        for seed, by_K, spread in itertools.product((None, 7), (None, drawn(K, seed=1)), (0, 8)):
            made = CpuInt8().quantize(x, scaled, seed, by_K, spread)
            wanted = Reference().quantize(x, scaled, seed, by_K, spread)
            same(made.codes, wanted.codes)
            same(made.scales, wanted.scales)
            same(made.unpack().codes, wanted.unpack().codes)
            same(made.pack().dequantize(), wanted.dequantize())
            assert (made.shape, made.packed, made.of_tensor) == (wanted.shape, False, None)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("scaled", [*map(Scaled, WHOLE), *IN_PARTS], ids=named)
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_that_cannot_be_scaled(scaled: Scaled, seed: int | None) -> None:
    x = drawn(30, 21)
    x[1] = 0
    x[4, 2], x[5, 3], x[6, 4] = torch.nan, torch.inf, -torch.inf
    x[8:10] *= 1e-44
    x[10:14] *= torch.logspace(-40, -36, 4)[:, None]
    x[14] *= 3e37
    made, wanted = (backend.quantize(x, scaled, seed) for backend in (CpuInt8(), Reference()))
    same(made.codes, wanted.codes)
    same(made.unpack().codes, wanted.unpack().codes)
    same(made.scales, wanted.scales)
    assert made.scales.isnan().flatten().nonzero().flatten().tolist() == [4, 5, 6]
    # Nothing at all, as an expert that no token chose.
    assert CpuInt8().quantize(x[:0], scaled, seed).dequantize().shape == (0, 21)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("a", "b"), list(itertools.product([*map(Scaled, WHOLE), IN_PARTS[0]], repeat=2)), ids=named)
def test_products_are_the_references(a: Scaled, b: Scaled) -> None:
    ours, reference = CpuInt8(), Reference()
    assert ours.how(a, b) == ("native" if a.format is b.format is INT8 else "exact-via-int8")
    for (M, N, K), dtype in itertools.product(
        ((1, 1, 1), (37, 53, 19), (40, 16, 64), (0, 3, 4)), (torch.float32, torch.bfloat16, torch.float64)
    ):
        left = reference.quantize(drawn(M, K), a, 1)
        if M > 1:
            left.scales[1] = torch.nan
        columns = reference.quantize(drawn(K, N, seed=2), b)
        tensor = reference.quantize(drawn(N, K, seed=3), Scaled(b.format, TENSOR))
        for right in (reference.quantize(drawn(N, K, seed=3), b), tensor, tensor.pack(), columns.turned()):
            same(ours.product(left, right, dtype), reference.product(left, right, dtype))
            same(ours.product(right, left, dtype), reference.product(right, left, dtype))


def test_sums_beyond_32_bits() -> None:
    ones = torch.ones(2, 140_000)
    a, b = (Reference().quantize(x, Scaled(INT8)) for x in (ones, -ones))
    made = CpuInt8().product(a, b, torch.float64)
    same(made, Reference().product(a, b, torch.float64))
    assert made[0, 0].item() == pytest.approx(-140_000)


def test_what_is_not_whole_is_left_to_others() -> None:
    ours = CpuInt8()
    for other in (Scaled(E4M3), NVFP4, Scaled(E2M1, 32, scale="e8m0")):
        assert ours.how(Scaled(INT4), other) is None
        assert ours.how(other, Scaled(INT4)) is None
        made, wanted = (backend.quantize(drawn(5, 40), other, 2) for backend in (ours, Reference()))
        same(made.dequantize(), wanted.dequantize())


def test_without_data_there_are_shapes() -> None:
    with FakeTensorMode():
        a = CpuInt8().quantize(torch.empty(6, 5), Scaled(INT4), 1)
        b = CpuInt8().quantize(torch.empty(6, 7), Scaled(INT4, TENSOR))
        assert (a.codes.shape, a.scales.shape, b.scales.shape) == ((6, 6), (6, 1), (1, 1))
        made = CpuInt8().product(a.turned(), b.turned(), torch.bfloat16)
        assert (made.shape, made.dtype) == ((5, 7), torch.bfloat16)


def test_random_bits_a_part_at_a_time() -> None:
    generator = torch.Generator().manual_seed(9)
    parts = [next_bits((rows, 7), generator) for rows in (4, 8, 3)]
    same(torch.cat(parts), random_bits([15, 7], 9, CPU))


class Wrong(Reference):
    name = "wrong"

    def __init__(self, product: Callable[[Tensor], Tensor] = lambda y: y, how: str = "native") -> None:
        self._product, self._how = product, how

    def how(self, a: Scaled, b: Scaled) -> Any:
        return self._how if a.format in WHOLE and b.format in WHOLE else None

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        return self._product(super().product(a, b, dtype))


class Cut(Wrong):
    """Its stochastic rounding is none."""

    def quantize(self, x_MK: Tensor, scaled: Scaled, seed: int | None = None, *rest: Any) -> Quantized:
        made = super().quantize(x_MK, scaled, seed, *rest)
        return made if seed is None else replace(made, codes=made.codes * 0)


def one_off(y: Tensor) -> Tensor:
    y[-1, -1] *= 1 + 2.0**-7
    return y


def out_of_order(y: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nand more")


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (Wrong(one_off), "int4 (row) with int4 (row) in float32 is off by "),
        (Wrong(torch.zeros_like), "int4 (row) with int4 (row) in float32 is off by 1"),
        (Wrong(lambda y: y * torch.nan), "in float32 is off by nan"),
        (Wrong(out_of_order), "int4 (row) with int4 (row) raised RuntimeError: no kernel image"),
        (Cut(), "rounding stochastically to int4 (row) is off by 1"),
    ],
    ids=["one off", "zeros", "nan", "raises", "not drawn"],
)
def test_backends_that_are_wrong_do_not_serve(
    backend: Wrong, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "fitting", lambda device: [backend])
    probe._serving.cache_clear()
    try:
        for _ in range(2):
            assert probe.choose(Scaled(INT4), Scaled(INT4), CPU) == (probe.REFERENCE, "emulated")
    finally:
        probe._serving.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ebbtide: wrong is wrong on cpu: ")
    assert why in line


def test_the_reference_itself_passes(capsys: pytest.CaptureFixture[str]) -> None:
    class All(Wrong):
        def how(self, a: Scaled, b: Scaled) -> Any:
            return "native"

    assert not probe.refused(All(), CPU)
    assert capsys.readouterr().err == ""


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CpuInt8.fits():
        pytest.skip("this CPU has neither VNNI nor AMX")
    probe._serving.cache_clear()
    # Tried with real data wherever it is asked for.
    with FakeTensorMode():
        (backend,) = probe.serving(CPU)
    assert probe.choose(Scaled(INT4), Scaled(SPLIT), CPU) == (backend, "exact-via-int8")
    assert probe.choose(Scaled(INT8), Scaled(INT8), CPU) == (backend, "native")
    assert probe.choose(NVFP4, NVFP4, CPU) == (probe.REFERENCE, "emulated")
    for asked in ("_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, asked, lambda: False)
    assert probe.fitting(CPU) == []


def transform(width: int, block: int) -> Any:
    """Sylvester's matrix has the sign of the bits that both numbers have."""
    made, start = np.zeros((width, width)), 0
    while start < width:
        while block > width - start:
            block //= 2
        signs = [[(-1) ** (i & j).bit_count() for i in range(block)] for j in range(block)]
        made[start : start + block, start : start + block] = np.array(signs) / block**0.5
        start += block
    return made


@pytest.mark.parametrize("width", [1, 16, 48, 75])
def test_hadamard_blocks(width: int) -> None:
    x = drawn(3, 5, width).double()
    wanted = torch.from_numpy(x.numpy() @ transform(width, 16))
    torch.testing.assert_close(hadamard(x, 16), wanted)
    torch.testing.assert_close(hadamard(hadamard(x.float(), 16), 16), x.float())
    with torch.autocast("cpu"):
        torch.testing.assert_close(hadamard(x.float(), 16), wanted.float())
    half = x.bfloat16()
    exact = torch.from_numpy(half.double().numpy() @ transform(width, 16))
    # Rounded once, whatever root the factor is.
    torch.testing.assert_close(hadamard(half, 8).norm(), half.norm(), rtol=4e-3, atol=0)
    torch.testing.assert_close(hadamard(half, 16).double(), exact, rtol=2**-8, atol=1e-6)
    assert hadamard_(half, 16) is half
    torch.testing.assert_close(half.double(), exact, rtol=2**-8, atol=1e-6)


def test_random_signs_keep_products() -> None:
    x, y = drawn(4, 75), drawn(6, 75, seed=1)
    a, b = (random_hadamard(z, 32, seed=5) for z in (x, y))
    torch.testing.assert_close(a @ b.T, x @ y.T, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(a, random_hadamard(x, 32, seed=6))
    assert not torch.allclose(a, hadamard(x, 32))
