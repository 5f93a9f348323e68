"""The Triton kernels as operators, so that whoever runs operators again has them too, and what quantizes on an NVIDIA
GPU: the reference's codes and scales in one pass over the numbers (two where there is a scale of the whole tensor).

Compared bit for bit with the reference in Triton's interpreter, and built for compute capabilities 8.0, 9.0, 10.0 and
12.0; not run on a GPU yet. Random bits are drawn in the kernel: other ones than the reference draws of a seed, and as
good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from strategies.lowbit.backends.reference import Reference
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, ROW, SPLIT, TENSOR, NumberFormat, Scaled
from strategies.lowbit.hadamard import hadamard
from strategies.lowbit.tensor import Quantized, divided

_FORMATS = (INT4, INT8, SPLIT, E2M1, E4M3)
_BLOCKS: Final = (ROW, TENSOR)
_SCALES: Final = ("float32", "e4m3", "e8m0")
_ROWS, _COLUMNS = 32, 128
"""Of a tile."""
_DTYPES = (torch.float32, torch.float8_e4m3fn, torch.uint8)


class Fused:
    """Quantizes with the kernels; without Triton, and in formats that they do not serve, as the reference does."""

    def quantize(
        self, x_MK: Tensor, scaled: Scaled, seed: int | None = None, by_K: Tensor | None = None, spread: int = 0
    ) -> Quantized:
        if not (_triton() and _serves(scaled)):
            return Reference().quantize(x_MK, scaled, seed, by_K, spread)
        return quantize(hadamard(x_MK, spread) if spread else x_MK, scaled, seed=seed, by_K=by_K)


def quantize(
    x_MK: Tensor, scaled: Scaled, *, seed: int | None = None, bits_MK: Tensor | None = None, by_K: Tensor | None = None
) -> Quantized:
    """To the nearest, or stochastically: with a seed, or with 16 random bits a number. Blocks of E2M1 come packed."""
    codes, scales, of_tensor, multiples = _quantize(x_MK, by_K, bits_MK, seed, _data(scaled))
    return Quantized(
        codes,
        scales,
        of_tensor if scaled.scale == "e4m3" else None,
        scaled,
        (x_MK.shape[0], x_MK.shape[1]),
        _packs(scaled),
        multiples if scaled.multiples else None,
    )


def scale(sums_MN: Tensor, rows_M1: Tensor, columns_N1: Tensor, dtype: torch.dtype) -> Tensor:
    """(sums * rows) * columns, in one pass where there is Triton."""
    if not _triton():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (sums_MN.to(wide) * rows_M1 * columns_N1.T).to(dtype)
    scaled: Tensor = _scale(sums_MN, rows_M1.contiguous(), columns_N1.contiguous(), dtype)
    return scaled


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def _serves(scaled: Scaled) -> bool:
    """Rows have scales in float32, tiles hold whole blocks."""
    if scaled.by_rows:
        return scaled.scale == "float32" and (not scaled.multiples or _COLUMNS % scaled.multiples == 0)
    return (_ROWS if scaled.square else _COLUMNS) % int(scaled.block) == 0


def _packs(scaled: Scaled) -> bool:
    return scaled.format is E2M1 and not scaled.by_rows


def _data(scaled: Scaled) -> list[int]:
    """A format in numbers, which is what an operator can be given."""
    block = -1 - _BLOCKS.index(scaled.block) if isinstance(scaled.block, str) else scaled.block
    scale = _SCALES.index(scaled.scale)
    return [_FORMATS.index(scaled.format), block, scaled.square, scale, scaled.up, scaled.either, scaled.multiples]


def _scaled(data: Sequence[int]) -> Scaled:
    format, block, square, scale, up, either, multiples = data
    return Scaled(
        _FORMATS[format], block if block > 0 else _BLOCKS[-1 - block], square == 1, _SCALES[scale], up == 1,
        either == 1, multiples,
    )  # fmt: skip


def _empty(x_MK: Tensor, scaled: Scaled) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales in the shapes of `tensor.quantize`."""
    M, K = x_MK.shape
    width = 2 if scaled.by_rows else int(scaled.block)
    height = width if scaled.square else 1
    multiples = x_MK.new_empty(M, max(1, -(-K // (scaled.multiples or 1))), dtype=torch.uint8)
    M, K = -(-M // height) * height, max(-(-K // width), 1) * width
    whole = torch.int8 if scaled.format.integers_by else torch.float8_e4m3fn
    packs = _packs(scaled)
    codes = x_MK.new_empty(M, K // 2 if packs else K, dtype=torch.uint8 if packs else whole)
    blocks = (min(M, 1) if scaled.block == TENSOR else M, 1) if scaled.by_rows else (M // height, K // width)
    return codes, x_MK.new_empty(blocks, dtype=_DTYPES[_SCALES.index(scaled.scale)]), multiples


@torch.library.custom_op("ebbtide::quantize", mutates_args=())
def _quantize(
    x_MK: Tensor, by_K: Tensor | None, bits_MK: Tensor | None, seed: int | None, data: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, and the scale of the tensor and multiples, which mean nothing where there are none."""
    from strategies.lowbit.backends import triton_kernels as kernels

    scaled = _scaled(data)
    codes, scales, multiples = _empty(x_MK, scaled)
    by_K = None if by_K is None else by_K.float().contiguous()
    of_tensor = x_MK.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(x_MK):  # type: ignore[no-untyped-call]
        if scaled.block == TENSOR or scaled.scale == "e4m3":
            wanted = divided(_largest(x_MK, by_K, scaled), scaled.format.largest)
            of_tensor = wanted if scaled.block == TENSOR else divided(wanted, E4M3.largest)
        if scaled.block == TENSOR:
            scales.copy_(of_tensor)
        bits = None if bits_MK is None else bits_MK.contiguous()
        draw = kernels.GIVEN_BITS if bits is not None else kernels.NEAREST if seed is None else kernels.DRAWN_BITS
        # What is None is never read.
        given = x_MK, x_MK if by_K is None else by_K, x_MK if bits is None else bits, seed or 0
        constants = {"BY_K": by_K is not None, "DRAW": draw.value, **_constants(scaled.format)}
        if scaled.by_rows:
            _rows(given, scaled, codes, scales, multiples, constants)
        else:
            _blocks(given, scaled, codes, scales, of_tensor, constants)
    return codes, scales, of_tensor, multiples


@_quantize.register_fake
def _(
    x_MK: Tensor, by_K: Tensor | None, bits_MK: Tensor | None, seed: int | None, data: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales, multiples = _empty(x_MK, _scaled(data))
    return codes, scales, x_MK.new_empty((), dtype=torch.float32), multiples


_Given = tuple[Tensor, Tensor, Tensor, int]


def _rows(
    given: _Given, scaled: Scaled, codes: Tensor, scales: Tensor, multiples: Tensor, constants: dict[str, Any]
) -> None:
    from strategies.lowbit.backends.triton_kernels import rows_kernel

    x_MK = given[0]
    # Along memory, and enough rows' tiles to keep every multiprocessor busy.
    rows, columns = (4, 1024) if x_MK.stride(1) == 1 else (16, 128)
    rows_kernel[(-(-x_MK.shape[0] // rows),)](
        *given, codes.view(torch.int8 if scaled.format.integers_by else torch.uint8), scales, multiples,
        *x_MK.shape, codes.shape[1], *x_MK.stride(), OF_TENSOR=scaled.block == TENSOR, PART=scaled.multiples,
        MOST=scaled.most_multiple, ROWS=rows, COLUMNS=columns, **constants,
    )  # fmt: skip


def _blocks(
    given: _Given, scaled: Scaled, codes: Tensor, scales: Tensor, of_tensor: Tensor, constants: dict[str, Any]
) -> None:
    from strategies.lowbit.backends.triton_kernels import blocks_kernel

    x_MK, width = given[0], int(scaled.block)
    K_codes = scales.shape[1] * width
    blocks_kernel[(-(-codes.shape[0] // _ROWS), -(-K_codes // _COLUMNS))](
        *given, of_tensor, codes.view(torch.int8 if scaled.format.integers_by and not _packs(scaled) else torch.uint8),
        scales if scaled.scale == "float32" else scales.view(torch.uint8),
        *x_MK.shape, codes.shape[0], K_codes, *x_MK.stride(), SCALE=_SCALES.index(scaled.scale), UP=scaled.up,
        EITHER=scaled.either, BINADE=math.frexp(scaled.format.largest)[1] - 1, PACKED=_packs(scaled),
        HEIGHT=width if scaled.square else 1, WIDTH=width, ROWS=_ROWS, COLUMNS=_COLUMNS, **constants,
    )  # fmt: skip


def _constants(format: NumberFormat) -> dict[str, Any]:
    return {
        "MANTISSA": -1 if format.mantissa is None else format.mantissa,
        "LEAST": format.least_exponent,
        "LARGEST": float(format.largest),
        "WHOLE_BY": format.integers_by or -1,
        # a * b + c is rounded twice, as in the reference.
        "enable_fp_fusion": False,
    }


def _largest(x_MK: Tensor, by_K: Tensor | None, scaled: Scaled) -> Tensor:
    """The largest |x|: of blocks that are finite, or not a number where one of the tensor is not."""
    from strategies.lowbit.backends.triton_kernels import largest_kernel

    width = 1 if scaled.by_rows else int(scaled.block)
    tiles = -(-x_MK.shape[0] // _ROWS), -(-x_MK.shape[1] // _COLUMNS)
    sizes = x_MK.new_zeros(tiles[0] * tiles[1] + 1, dtype=torch.int32)  # one more, as there may be none
    largest_kernel[tiles](
        x_MK, x_MK if by_K is None else by_K, sizes, *x_MK.shape, *x_MK.stride(),
        BY_K=by_K is not None, FINITE=not scaled.by_rows, HEIGHT=width if scaled.square else 1, WIDTH=width,
        ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    largest = sizes.amax().view(torch.float32)
    return torch.where(largest.isfinite(), largest, torch.nan)


@torch.library.custom_op("ebbtide::scale", mutates_args=())
def _scale(sums_MN: Tensor, rows_M1: Tensor, columns_N1: Tensor, dtype: torch.dtype) -> Tensor:
    from strategies.lowbit.backends.triton_kernels import scale_kernel

    M, N = sums_MN.shape
    assert sums_MN.stride(1) == 1
    out_MN = sums_MN.new_empty(M, N, dtype=dtype)
    rows, columns = 16, 256
    with torch.cuda.device_of(sums_MN):  # type: ignore[no-untyped-call]
        scale_kernel[(-(-M // rows), -(-N // columns))](
            sums_MN, rows_M1, columns_N1, out_MN, M, N, sums_MN.stride(0),
            WIDE=dtype == torch.float64, ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return out_MN


@_scale.register_fake
def _(sums_MN: Tensor, rows_M1: Tensor, columns_N1: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(sums_MN, dtype=dtype, memory_format=torch.contiguous_format)
