"""Quantized matrices: codes with scales, and the way there and back. Everything is computed in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.lowbit.formats import E4M3, INT4, INT8, TENSOR, NumberFormat, Scaled


@dataclass(frozen=True)
class Quantized:
    """A matrix of `shape`. `codes` are whole numbers (int8) or FP8 numbers, padded to whole blocks; packed, two of 4
    bits share a byte, the first in its low half. The scale of a block with a number that is not finite is none."""

    codes: Tensor
    scales: Tensor
    """[rows of blocks, blocks of a row]; in E8M0 the exponents' bytes."""
    of_tensor: Tensor | None
    scaled: Scaled
    shape: tuple[int, int]
    packed: bool = False
    multiples: Tensor | None = None
    """[rows, parts of a row], uint8."""

    def pack(self) -> Quantized:
        if self.scaled.format.bits > 4 or self.packed:
            return self
        return replace(self, codes=packed(self.codes, self.scaled.format), packed=True)

    def unpack(self) -> Quantized:
        """With multiples it is INT8 then."""
        codes = unpacked(self.codes, self.scaled.format) if self.packed else self.codes
        if self.multiples is None:
            return replace(self, codes=codes, packed=False)
        codes = _times(codes, self.multiples.view(torch.int8), self.scaled.multiples)
        return Quantized(codes, self.scales, None, Scaled(INT8), self.shape)

    def row_scales(self) -> Tensor:
        """[rows, 1], of codes: what makes their numbers of them is in it."""
        by = self.scaled.format.integers_by or 1
        return (self.block_scales() / by).expand(self.shape[0], 1)

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unscaled."""
        return self.unpack().codes.to(dtype) / (self.scaled.format.integers_by or 1)

    def turned(self) -> Quantized:
        """Rows become columns. `row_scales` are left out: they belong into what is multiplied with it."""
        assert self.scaled.turns
        whole = self.unpack()
        codes = whole.codes.T
        if self.scaled.square:
            return replace(whole, codes=codes, scales=self.scales.T, shape=self.shape[::-1])
        codes = codes[: self.shape[1], : self.shape[0]]
        by = torch.full((1, 1), float(self.scaled.format.integers_by or 1), device=codes.device)
        return Quantized(codes, by, None, Scaled(whole.scaled.format, TENSOR), self.shape[::-1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        blocks = as_blocks(self.numbers(torch.promote_types(dtype, torch.float32)), self.scaled)
        made = blocks * self.block_scales()[:, None, :, None]
        return from_blocks(made, self.shape).to(dtype)

    def block_scales(self) -> Tensor:
        """float32, that of the whole tensor within."""
        if self.scaled.scale == "e8m0":
            return (self.scales.int() << 23).view(torch.float32).where(self.scales != 255, torch.nan)
        scales = self.scales.float()
        return scales if self.of_tensor is None else scales * self.of_tensor


def quantize(x_MK: Tensor, scaled: Scaled, uniform: Tensor | None = None) -> Quantized:
    """To the nearest numbers, or with `uniform` numbers in [0, 1) of the same shape, stochastically."""
    assert x_MK.ndim == 2
    if scaled.multiples:
        return _with_multiples(x_MK.float(), scaled, uniform)
    blocks = as_blocks(x_MK.float(), scaled)
    largest = blocks.abs().amax((1, 3))
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    scales, of_tensor = _scales(largest, scaled)
    if scaled.either and uniform is None and of_tensor is not None:
        fours = _e4m3(largest / 4 * inverse(of_tensor), scaled.up)
        scales = _nearer(blocks, scales.float(), fours.float(), of_tensor, scaled.format).to(fours.dtype)
    made = Quantized(blocks, scales, of_tensor, scaled, (x_MK.shape[0], x_MK.shape[1]))
    x = blocks * inverse(made.block_scales())[:, None, :, None]
    if uniform is None:
        numbers = scaled.format.nearest(x)
    else:
        numbers = scaled.format.stochastic(x, as_blocks(uniform, scaled))
    return replace(made, codes=coded(from_blocks(numbers, None), scaled.format))


def _with_multiples(x_MK: Tensor, scaled: Scaled, uniform: Tensor | None) -> Quantized:
    parts = replace(scaled, block=scaled.multiples, multiples=0)
    x = as_blocks(x_MK, parts)
    largest = x.abs().amax(3).squeeze(1)
    scales = divided(largest.amax(1, keepdim=True), scaled.format.largest * scaled.most_multiple)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    multiples, factors = multiples_of(largest, inverse(scales), scaled)
    M, K = shape = (x_MK.shape[0], x_MK.shape[1])
    x = from_blocks(x * factors[:, None, :, None], (M, max(K + K % 2, 2)))
    if uniform is None:
        numbers = scaled.format.nearest(x)
    else:
        numbers = scaled.format.stochastic(x, F.pad(uniform, (0, x.shape[1] - K)))
    return Quantized(coded(numbers, scaled.format), scales, None, scaled, shape, multiples=multiples)


def multiples_of(largest: Tensor, by_row: Tensor, scaled: Scaled) -> tuple[Tensor, Tensor]:
    """The least ones that keep the largest numbers within the format, and what a part is multiplied with. `by_row` is
    the inverse of a row's scale."""
    wanted = divided(largest * by_row, scaled.format.largest).ceil().nan_to_num(1.0)
    multiples = wanted.clamp(1, scaled.most_multiple)
    return multiples.to(torch.uint8), by_row / multiples


def _times(codes_MK: Tensor, multiples: Tensor, part: int) -> Tensor:
    M, K = codes_MK.shape
    if K % part:
        return codes_MK * multiples.repeat_interleave(part, 1)[:, :K]
    return (codes_MK.view(M, K // part, part) * multiples[:, : K // part, None]).view(M, K)


def _scales(largest: Tensor, scaled: Scaled) -> tuple[Tensor, Tensor | None]:
    wanted = divided(largest, scaled.format.largest)
    if scaled.scale == "float32":
        return wanted, None
    if scaled.scale == "e8m0":
        return _e8m0(wanted) if scaled.up else _e8m0_down(largest, scaled.format), None
    # A row more, as there may be none. A block that is not finite does not touch the others.
    of_tensor = divided(F.pad(wanted.nan_to_num(0.0), (0, 0, 0, 1)).amax(), E4M3.largest)
    return _e4m3(wanted * inverse(of_tensor), scaled.up), of_tensor


def _nearer(blocks: Tensor, scales: Tensor, others: Tensor, of_tensor: Tensor, format: NumberFormat) -> Tensor:
    """Of two scales a block, the one that leaves less of a squared error."""
    off, others_off = (_off(blocks, given[:, None, :, None], of_tensor, format) for given in (scales, others))
    return torch.where(others_off < off, others, scales)


def _off(blocks: Tensor, scales: Tensor, of_tensor: Tensor, format: NumberFormat) -> Tensor:
    """In units of the tensor's scale, in which squares are neither huge nor nothing."""
    numbers = format.nearest(blocks * inverse(scales * of_tensor))
    squares = (numbers * scales - blocks * inverse(of_tensor)).square().squeeze(1)
    # In an order that a kernel can keep.
    while squares.shape[-1] > 1:
        squares = squares[..., 0::2] + squares[..., 1::2]
    return squares.squeeze(-1)


def divided(x: Tensor, by: float) -> Tensor:
    """To the last bit on every device: a GPU multiplies by the reciprocal of a number that is not on it."""
    return x / torch.full_like(x, by)


def inverse(scale: Tensor) -> Tensor:
    """Zero where it would not be finite: what lies under so small a scale becomes zero."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)


def _e4m3(wanted: Tensor, up: bool) -> Tensor:
    """A scale of zero would lose a block that is not zero."""
    made = wanted.clamp(max=E4M3.largest).to(torch.float8_e4m3fn)
    made = torch.where((wanted > 0) & (made.float() == 0), 2.0**-9, made.float()).to(torch.float8_e4m3fn)
    if up:
        bits = made.view(torch.uint8)
        made = torch.where(made.float() < wanted, bits + 1, bits).clamp(max=0x7E).view(torch.float8_e4m3fn)
    return torch.where(wanted.isnan(), torch.nan, made.float()).to(torch.float8_e4m3fn)


def _e8m0(wanted: Tensor) -> Tensor:
    """The power of two at or above; 255 says not a number."""
    mantissa, exponent = torch.frexp(wanted)
    # wanted = mantissa * 2^exponent, the mantissa in [0.5, 1)
    return _exponents_byte(wanted, torch.where(mantissa == 0.5, exponent - 1, exponent))


def _e8m0_down(largest: Tensor, format: NumberFormat) -> Tensor:
    """As OCP's specification has it: brings the largest number into the grid's last binade, and beyond its end."""
    return _exponents_byte(largest, torch.frexp(largest).exponent - math.frexp(format.largest)[1])


def _exponents_byte(of: Tensor, exponent: Tensor) -> Tensor:
    code = torch.where(of > 0, exponent + 127, 0).clamp(0, 254)
    return torch.where(of.isnan(), 255, code).to(torch.uint8)


def as_blocks(x_MK: Tensor, scaled: Scaled) -> Tensor:
    """[rows of blocks, rows in a block, blocks of a row, columns in a block], padded with zeros."""
    M, K = x_MK.shape
    # Two codes share a byte.
    width = max(K + K % 2, 2) if scaled.by_rows else int(scaled.block)
    height = max(M, 1) if scaled.block == TENSOR else width if scaled.square else 1
    rows, columns = -(-M // height), max(-(-K // width), 1)
    padded = F.pad(x_MK, (0, columns * width - K, 0, rows * height - M))
    return padded.view(rows, height, columns, width)


def from_blocks(blocks: Tensor, shape: tuple[int, int] | None) -> Tensor:
    rows, height, columns, width = blocks.shape
    whole = blocks.reshape(rows * height, columns * width)
    return whole if shape is None else whole[: shape[0], : shape[1]]


def coded(numbers: Tensor, format: NumberFormat) -> Tensor:
    by = format.integers_by
    if by is None:
        return numbers.to(torch.float8_e4m3fn)
    return (numbers * by).nan_to_num_(0.0).to(torch.int8)


def packed(codes: Tensor, format: NumberFormat) -> Tensor:
    """INT4 in two's complement, E2M1 as sign, exponent and mantissa."""
    # Two codes at a time: a step of two through memory is what would cost.
    pairs = (codes if format is INT4 else _nibbles(codes)).contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_and_(0xF0).bitwise_or_(pairs & 15).to(torch.uint8)


def unpacked(pairs: Tensor, format: NumberFormat) -> Tensor:
    wide = pairs.to(torch.int16)
    nibbles = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.int8)
    return nibbles.bitwise_xor_(8).sub_(8) if format is INT4 else _doubled(nibbles)


def _nibbles(doubled: Tensor) -> Tensor:
    size = doubled.abs()
    code = torch.where(size < 4, size, torch.where(size < 8, 2 + (size >> 1), 4 + (size >> 2)))
    return code | (doubled < 0).to(torch.int8) << 3


def _doubled(nibbles: Tensor) -> Tensor:
    """Twice the number that each code of E2M1 stands for."""
    code = nibbles & 7
    size = torch.where(code < 2, code, (2 + (code & 1)) << ((code >> 1) - 1).clamp(min=0))
    return torch.where(nibbles > 7, -size, size)
