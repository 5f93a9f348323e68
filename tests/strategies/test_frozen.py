"""Frozen matrices in 4 bits: the format against its definition and bitsandbytes, the product against autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from four_bit_reference import SCALES, TABLES, decoded, fp4, nf4, quantized, scale_codes, state_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from strategies.lowbit.frozen import (
    Linear4bit,
    dequantize,
    four_bit,
    numbers,
    quantize,
    restored,
)

FORMATS = [(kind, double) for kind in TABLES for double in (False, True)]
SHAPES = [(96, 64), (7, 10), (5, 5), (300, 128)]


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def unsigned(codes: Tensor, kind: str) -> list[int]:
    """One after the other; FP4 has a zero of each sign."""
    both = torch.cat([codes >> 4, codes & 15], 1).view(-1).tolist()
    return [0 if kind == "fp4" and code == 8 else code for code in both]


def held(linear: nn.Linear, kind: str, double: bool) -> Linear4bit:
    made = Linear4bit(linear.requires_grad_(False), kind, double)
    made.hold(quantize(linear.weight.data, kind, double))
    return made


def test_the_tables_are_what_their_definitions_say() -> None:
    for found, defined in ((TABLES["nf4"], nf4()), (TABLES["fp4"], fp4()), (SCALES, scale_codes())):
        assert np.abs(found - defined).max() < 2e-7
    assert len(SCALES) == 256


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_codes_and_values_are_the_definitions(kind: str, double: bool, shape: tuple[int, int]) -> None:
    value = matrix(*shape)
    value[1, :3] = 0
    packed = quantize(value, kind, double)
    assert unsigned(packed.codes, kind) == unsigned(state_of("w", value, kind, double)["w"], kind)
    found = dequantize(packed.codes, packed.scales, *shape, kind, double, torch.float32)
    assert torch.equal(found, decoded(value, kind, double))


def test_a_block_of_zeros_stays_zero() -> None:
    for kind, double in FORMATS:
        packed = quantize(torch.cat([torch.zeros(2, 64), matrix(2, 64)]), kind, double)
        found = dequantize(packed.codes, packed.scales, 4, 64, kind, double, torch.float32)
        assert not found[:2].any()
        assert found.isfinite().all()


def test_parts_that_are_decoded_one_after_the_other_join(monkeypatch: pytest.MonkeyPatch) -> None:
    value = matrix(33, 70)
    monkeypatch.setattr("strategies.lowbit.frozen.PART", 256)
    packed = quantize(value, "nf4", True)
    found = dequantize(packed.codes, packed.scales, 33, 70, "nf4", True, torch.float32)
    assert torch.equal(found, decoded(value, "nf4", True))


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_what_is_held(double: bool, bits: float) -> None:
    """Of a matrix as large models have them; small ones have relatively more tables."""
    linear = Linear4bit(nn.Linear(4096, 4096, bias=False, device="meta"), "nf4", double)
    size = 4096 * 4096
    assert 8 * sum(p.nbytes for p in linear.parameters()) / size == pytest.approx(bits, abs=1e-3)
    assert sum(count for _, count in numbers(linear)) == size


@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_the_product_is_that_of_the_decoded_matrix(kind: str, double: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80)
    made = held(linear, kind, double)
    plain = decoded(linear.weight, kind, double).double()
    x = torch.randn(3, 5, 48, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, 48, dtype=torch.float64).copy_(x.detach()).requires_grad_()
    found, expected = made(x), F.linear(y, plain, linear.bias.double())
    by = torch.randn_like(found)
    found.backward(by)
    expected.backward(by)
    assert x.grad is not None
    assert y.grad is not None
    assert (found - expected).abs().max() < 1e-13
    assert (x.grad - y.grad).abs().max() < 1e-13


def test_the_graph_keeps_only_what_the_module_has() -> None:
    made = held(nn.Linear(64, 64, bias=False), "nf4", True)
    kept: list[Tensor] = []
    x = torch.randn(2, 64, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        made(x)
    assert {tensor.data_ptr() for tensor in kept} == {made.weight.data_ptr(), made.scales.data_ptr()}


def test_under_autocast_it_computes_as_a_linear_layer_does() -> None:
    linear = nn.Linear(64, 32)
    made = held(linear, "nf4", False)
    plain = nn.Linear(64, 32)
    plain.weight.data, plain.bias.data = made.dequantized(torch.float32), linear.bias.data
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = made(x), plain(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_casts_leave_the_bytes_alone() -> None:
    model = nn.Sequential(held(nn.Linear(64, 64), "nf4", False))
    before = [p.clone() for _, module in four_bit(model) for p in (module.weight, module.scales)]
    model.to(torch.bfloat16)
    assert [torch.equal(a, b) for (_, m) in four_bit(model) for a, b in zip((m.weight, m.scales), before, strict=True)]
    assert all(p.dtype == torch.uint8 for _, m in four_bit(model) for p in (m.weight, m.scales))


def test_ordinary_layers_in_its_place_give_the_same() -> None:
    made = held(nn.Linear(64, 64), "fp4", True)
    model = nn.Sequential(made)
    x = torch.randn(3, 64)
    before = model(x)
    restored(model, torch.float32)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does
def test_it_compiles_into_the_same() -> None:
    made = held(nn.Linear(64, 64), "nf4", False)
    gradients = []
    for module in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
        x = matrix(3, 64).requires_grad_()
        module(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_bitsandbytes_has_the_same_bits(kind: str, double: bool, dtype: torch.dtype) -> None:
    theirs: Any = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    # Its own CPU kernel decodes matrices wrongly that are narrower than a block.
    for shape in ((300, 128), (96, 64), (40, 70)):
        value = matrix(*shape, dtype=dtype)
        codes, state = theirs.quantize_4bit(value, quant_type=kind, compress_statistics=double)
        packed = quantize(value, kind, double)
        assert torch.equal(packed.codes, codes)
        scales = state.absmax.view(torch.uint8)
        if double:
            own = packed.scales[-len(state.absmax) :]
            # Its CPU kernel takes the neighbour of an 8-bit code now and then.
            assert (own.int() - state.absmax.int()).abs().max() <= 1
            assert (own != state.absmax).float().mean() < 0.05
            floats = torch.cat([state.offset.view(1), state.state2.code, state.state2.absmax])
            scales = torch.cat([floats.view(torch.uint8), state.absmax])
            theirs_C = packed.scales[: len(scales) - len(own)].view(torch.float32)
            assert torch.equal(theirs_C[[0, *range(2, len(theirs_C))]], floats[[0, *range(2, len(floats))]])
        found = dequantize(codes, scales, *shape, kind, double, dtype)
        assert torch.equal(found, theirs.dequantize_4bit(codes, state))


def test_codes_are_nearest() -> None:
    """What the reference says of itself, so that it cannot share a mistake: nothing in the table is nearer."""
    value = matrix(8, 64)
    for kind in TABLES:
        found = quantized(value, kind, False)
        parts = (value.view(-1, 64) / torch.from_numpy(found["scales"])[:, None]).view(-1, 1)
        nearest = (parts - torch.from_numpy(TABLES[kind])).abs().amin(1)
        assert torch.allclose((parts[:, 0] - torch.from_numpy(TABLES[kind][found["codes"]])).abs(), nearest)
