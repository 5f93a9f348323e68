"""Quantized products in int8 on a CPU: AMX or VNNI through oneDNN.

Formats with one scale a row at most, whose numbers whole ones stand for, have the reference's very result, as sums of
whole numbers are exact. Passes over numbers are taken in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.lowbit.backends.reference import How, Reference
from strategies.lowbit.draws import next_bits, uniform
from strategies.lowbit.formats import E2M1, INT4, INT8, SPLIT, TENSOR, NumberFormat, Scaled
from strategies.lowbit.hadamard import hadamard
from strategies.lowbit.tensor import Quantized, coded, inverse, multiples_of

_FORMATS = {format.name: format for format in (INT4, INT8, SPLIT, E2M1)}
_ELEMENTS = 2**17
"""Of a piece, for a core."""
_PIECES = 4
"""That are turned and spread together: the wider they are in memory, the more of what is fetched is used."""
_LEAST = torch.finfo(torch.float32).smallest_normal
_TILE_ROWS, _TILE_COLUMNS = 2048, 512
"""Of a product, the columns for a core: sums that stay in the cache until they are scaled, with the least repacking."""


class CpuInt8:
    name = "cpu-int8"

    @staticmethod
    def fits() -> bool:
        """Without VNNI oneDNN adds products up in 16 bits, which overflow."""
        served = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
        return served and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    def how(self, a: Scaled, b: Scaled) -> How | None:
        if not (_serves(a) and _serves(b)):
            return None
        return "native" if a.format is b.format is INT8 else "exact-via-int8"

    def quantize(
        self, x_MK: Tensor, scaled: Scaled, seed: int | None = None, by_K: Tensor | None = None, spread: int = 0
    ) -> Quantized:
        if not _serves(scaled):
            return Reference().quantize(x_MK, scaled, seed, by_K, spread)
        of_tensor = scaled.block == TENSOR
        made = _quantize(x_MK, scaled.format.name, of_tensor, scaled.multiples, seed, by_K, spread)
        codes, scales, multiples = made
        shape = (x_MK.shape[0], x_MK.shape[1])
        return Quantized(codes, scales, None, scaled, shape, multiples=multiples if scaled.multiples else None)

    def product(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        (M, K), N = a.shape, b.shape[0]
        a, b = a.unpack(), b.unpack()
        at_once = (2**31 - 1) // (_largest_code(a) * _largest_code(b))
        codes, scales = (a.codes[:M, :K], b.codes[:N, :K]), (a.row_scales(), b.row_scales())
        made: Tensor = _product(*codes, *scales, at_once, dtype)
        return made


def _serves(scaled: Scaled) -> bool:
    return scaled.by_rows and scaled.scale == "float32" and scaled.format.name in _FORMATS


def _largest_code(q: Quantized) -> int:
    return int(q.scaled.format.largest) * (q.scaled.format.integers_by or 1)


@torch.library.custom_op("ebbtide::cpu_quantize", mutates_args=())
def _quantize(
    x_MK: Tensor, format_name: str, of_tensor: bool, part: int, seed: int | None, by_K: Tensor | None, spread: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and multiples."""
    format, K = _FORMATS[format_name], x_MK.shape[1]
    codes, scales, multiples = _empty(x_MK, of_tensor, part)
    codes[:, K:] = 0
    if not x_MK.numel():
        return codes, scales.zero_(), multiples.fill_(1)
    generator = None if seed is None else torch.Generator(x_MK.device).manual_seed(seed)
    scratch = torch.empty(_rows_of_a_piece(x_MK), K, device=x_MK.device)
    if of_tensor:
        largest = [torch.abs(x, out=scratch[: len(x)]).amax() for _, x in _pieces(x_MK, by_K, spread)]
        scales.fill_(_scale(torch.stack(largest).amax(), format.largest))
    for rows, x in _pieces(x_MK, by_K, spread):
        size = None if of_tensor else torch.abs(x, out=scratch[: len(x)])
        if part and size is not None:
            scales[rows], multiples[rows], factors = _of_parts(_parts(size, part).amax(2), format, part)
            x = _multiplied(x, factors, part)
        else:
            if size is not None:
                scales[rows] = _scale(size.amax(1, keepdim=True), format.largest)
            x.mul_(inverse(scales if of_tensor else scales[rows]))
        draw = None if generator is None else uniform(next_bits(x.shape, generator), scratch[: len(x)])
        _code(x, scales if of_tensor else scales[rows], format, draw, codes[rows, :K])
    return codes, scales, multiples


@_quantize.register_fake
def _(
    x_MK: Tensor, format_name: str, of_tensor: bool, part: int, seed: int | None, by_K: Tensor | None, spread: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x_MK, of_tensor, part)


def _empty(x_MK: Tensor, of_tensor: bool, part: int) -> tuple[Tensor, Tensor, Tensor]:
    M, K = x_MK.shape
    codes = torch.empty(M, K + K % 2, dtype=torch.int8, device=x_MK.device)
    multiples = torch.empty(M, max(1, -(-K // part)) if part else 0, dtype=torch.uint8, device=x_MK.device)
    return codes, torch.empty(1 if of_tensor else M, 1, device=x_MK.device), multiples


def _of_parts(largest: Tensor, format: NumberFormat, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, multiples, and what parts are multiplied with."""
    scaled = Scaled(format, multiples=part)
    scales = _scale(largest.amax(1, keepdim=True), format.largest * scaled.most_multiple)
    return scales, *multiples_of(largest, inverse(scales), scaled)


def _parts(x_MK: Tensor, part: int) -> Tensor:
    right = -x_MK.shape[1] % part
    return (F.pad(x_MK, (0, right)) if right else x_MK).view(len(x_MK), -1, part)


def _multiplied(x_MK: Tensor, factors: Tensor, part: int) -> Tensor:
    if x_MK.shape[1] % part:
        return x_MK.mul_(factors.repeat_interleave(part, 1)[:, : x_MK.shape[1]])
    return _parts(x_MK, part).mul_(factors[:, :, None]).view_as(x_MK)


def _pieces(x_MK: Tensor, by_K: Tensor | None, spread: int) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time, in one buffer, which whoever takes them may overwrite."""
    size = _rows_of_a_piece(x_MK)
    buffer = torch.empty(size, x_MK.shape[1], device=x_MK.device)
    start = 0
    for rows in _in_rows(x_MK, size * _PIECES, spread):
        for part in torch.split(rows, size):
            # What has been spread is new already.
            piece = part if spread and part.dtype == buffer.dtype else buffer[: len(part)].copy_(part)
            yield slice(start, start + len(part)), piece if by_K is None else piece.mul_(by_K)
            start += len(part)


def _rows_of_a_piece(x_MK: Tensor) -> int:
    """Fours, so that each piece has whole words of random bits."""
    return max(4, _ELEMENTS * torch.get_num_threads() // max(1, x_MK.shape[1]) // 4 * 4)


def _in_rows(x_MK: Tensor, count: int, spread: int) -> Iterator[Tensor]:
    """So many rows at a time. Of a transposed view those are columns, which torch turns fast where they are whole."""
    for rows in torch.split(x_MK, count):
        turned = rows.stride(0) == 1 and rows.stride(1) != 1
        rows = rows.T.contiguous().T.contiguous() if turned else rows
        yield hadamard(rows, spread) if spread else rows


def _scale(largest: Tensor, by: float) -> Tensor:
    return (largest / by).masked_fill_(largest.isinf(), torch.nan)


def _code(x: Tensor, by: Tensor, format: NumberFormat, draw: Tensor | None, into: Tensor) -> None:
    """Of what has been scaled, `by` its scales."""
    least, most = (float(bound) for bound in by.aminmax())
    if format.mantissa is None and least >= _LEAST and most < torch.inf:
        # What is scaled so lies within the format but for its last bit, which only the draw makes a step of.
        into.copy_(x.round_() if draw is None else x.add_(draw).floor_().clamp_(-format.largest, format.largest))
        return
    into.copy_(coded(format.nearest(x) if draw is None else format.stochastic(x, draw), format))


@torch.library.custom_op("ebbtide::cpu_product", mutates_args=())
def _product(a_MK: Tensor, b_NK: Tensor, a_by_M1: Tensor, b_by_N1: Tensor, at_once: int, dtype: torch.dtype) -> Tensor:
    """`at_once`: products that are added up in 32 bits."""
    M, N = len(a_MK), len(b_NK)
    made_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    height = _even(M, _TILE_ROWS)
    width = _even(N, _TILE_ROWS * _TILE_COLUMNS * torch.get_num_threads() // max(1, height))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.empty(height * width, dtype=torch.int32, device=a_MK.device)
    scales_are_one = bool((b_by_N1 == 1).all())
    for columns, b in _slices(b_NK, width):
        for rows, a in _slices(a_MK, height):
            tile = _sums(a, b, at_once, sums[: len(a) * len(b)].view(len(a), len(b)))
            parts = (made_MN[rows, columns], tile, a_by_M1[rows])
            for into, whole, by in zip(*(torch.split(part, _TILE_ROWS // 8) for part in parts), strict=True):
                scaled = whole.to(wide).mul_(by)
                into.copy_(scaled if scales_are_one else scaled.mul_(b_by_N1[columns].T))
    return made_MN


@_product.register_fake
def _(a_MK: Tensor, b_NK: Tensor, a_by_M1: Tensor, b_by_N1: Tensor, at_once: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype, device=a_MK.device)


def _sums(a_MK: Tensor, b_NK: Tensor, at_once: int, into: Tensor) -> Tensor:
    if a_MK.shape[1] <= at_once:
        return torch._int_mm(a_MK, b_NK.T, out=into)
    total = torch.zeros_like(into, dtype=torch.float64)
    for a, b in zip(torch.split(a_MK, at_once, 1), torch.split(b_NK, at_once, 1), strict=True):
        total += torch._int_mm(a, b.T, out=into)
    return total


def _even(count: int, most: int) -> int:
    """Of parts that are nearly equal."""
    return -(-count // max(1, -(-count // most)))


def _slices(x: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    return ((slice(start, start + size), x[start : start + size]) for start in range(0, len(x), max(1, size)))
