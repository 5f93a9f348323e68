"""A frozen matrix held in 4 bits: the format of bitsandbytes ("QLoRA", arXiv 2305.14314), without that library.

A block of 64 numbers, in the order of memory, is a scale, which is its largest magnitude, and 64 codes: the nearest of
16 numbers in [-1, 1], that of the NF4 or the FP4 table. Two codes are in a byte, the first in its high half. Double
quantized scales lose their mean and are 8-bit codes themselves, in blocks of 256 with a table of their own.

Both are parameters of bytes, so that no engine casts them, and one that shards shards them like any other weight.

Shapes: N numbers of a matrix, B blocks of 64, C blocks of 256 scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK, SCALES_BLOCK = 64, 256
PART = 1 << 22
"""Numbers that are decoded at once: what is needed beside the result."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * level / 12 for sign in (1, -1) for level in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))
CODES = {"nf4": NF4, "fp4": FP4}
_HEAD = 1 + 256
"""Float32 numbers before the scales of scales: the mean, and the table of 8-bit codes."""


@dataclass(frozen=True)
class Packed:
    """`codes` [N/2, 1] as in a checkpoint of bitsandbytes. `scales` are the bytes of float32 numbers: those of B
    blocks, or, double quantized, the mean, 256 table entries and C scales of scales, followed by B 8-bit codes."""

    codes: Tensor
    scales: Tensor


def scale_bytes(size: int, double: bool) -> int:
    blocks = -(-size // BLOCK)
    return 4 * (_HEAD + -(-blocks // SCALES_BLOCK)) + blocks if double else 4 * blocks


@cache
def code_table(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(CODES[kind], device=device)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two numbers of every byte."""
    table = code_table(kind, device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)


@cache
def scale_table(device: torch.device) -> Tensor:
    """Of 8-bit codes, sorted: seven decades above and below zero, each cut twice as finely as the one below it, zero
    and one."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        levels = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += [*levels, *(-level for level in levels)]
    return torch.tensor(sorted(found), device=device)


def _nearest(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Indices into the table, and each block's scale; the lower one where two are as near."""
    size = len(values)
    blocks = F.pad(values.float(), (0, -size % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    parts = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    ordered, order = table.sort(stable=True)
    found = order[torch.bucketize(parts.view(-1)[:size], (ordered[:-1] + ordered[1:]) / 2, out_int32=True)]
    return found.to(torch.uint8), scales


def quantize(matrix: Tensor, kind: str, double: bool) -> Packed:
    """From the precision that the matrix has."""
    flat = matrix.reshape(-1)
    codes, scales = _nearest(F.pad(flat, (0, len(flat) % 2)), code_table(kind, matrix.device), BLOCK)
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    if not double:
        return Packed(packed, scales.view(torch.uint8))
    mean, table = scales.mean(), scale_table(matrix.device)
    indices, scales_C = _nearest(scales - mean, table, SCALES_BLOCK)
    return Packed(packed, joined(mean, table, scales_C, indices))


def joined(mean: Tensor, table: Tensor, scales_C: Tensor, indices_B: Tensor) -> Tensor:
    return torch.cat([torch.cat([mean.view(1), table, scales_C]).view(torch.uint8), indices_B])


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block by its scale, in place."""
    whole = len(values) // block * block
    values[:whole].view(-1, block).mul_(scales[: whole // block, None])
    values[whole:].mul_(scales[-1])
    return values


def _scales(held: Tensor, blocks: int, double: bool) -> Tensor:
    # Copies: where an engine has gathered them they need not lie at a multiple of four bytes.
    floats = held[: len(held) - blocks * double].clone().view(torch.float32)
    if not double:
        return floats
    return _scaled(floats[1:_HEAD][held[-blocks:].int()], floats[_HEAD:], SCALES_BLOCK).add_(floats[0])


@torch.library.custom_op("ebbtide::dequantize_4bit", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, rows: int, columns: int, kind: str, double: bool, dtype: torch.dtype
) -> Tensor:
    """Each number is a float32 product, rounded once; one operator, so that nobody keeps what is between."""
    size = rows * columns
    scales_B = _scales(scales, -(-size // BLOCK), double)
    pairs, packed = _pairs(kind, codes.device), codes.reshape(-1)
    whole = torch.empty(size, dtype=dtype, device=codes.device)
    for start in range(0, size, PART):
        part = whole[start : start + PART]
        bytes_of = packed[start // 2 : (start + PART) // 2].int()
        values = pairs.index_select(0, bytes_of).view(-1)[: len(part)]
        part.copy_(_scaled(values, scales_B[start // BLOCK : (start + PART) // BLOCK], BLOCK))
    return whole.view(rows, columns)


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, rows: int, columns: int, kind: str, double: bool, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(rows, columns, dtype=dtype)


class _Product(torch.autograd.Function):
    """x @ W.T + b with W decoded for this product alone, and once more for the gradient of x. Nothing is kept but
    what the module holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *form: Any) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.form = form
        return F.linear(x, dequantize(codes, scales, *form, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Any:
        codes, scales = ctx.saved_tensors
        return by @ dequantize(codes, scales, *ctx.form, by.dtype), *[None] * (3 + len(ctx.form))


class Linear4bit(nn.Module):
    """A frozen linear layer in the place of an `nn.Linear`, whose bias it takes; empty until `hold`."""

    def __init__(self, linear: nn.Linear, kind: str, double: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.double_quant = kind, double
        size = self.in_features * self.out_features
        self.weight = _bytes(torch.empty(-(-size // 2), 1, dtype=torch.uint8, device="meta"))
        self.scales = _bytes(torch.empty(scale_bytes(size, double), dtype=torch.uint8, device="meta"))
        self.bias = linear.bias

    def hold(self, packed: Packed) -> None:
        assert packed.codes.shape == self.weight.shape
        assert packed.scales.shape == self.scales.shape
        self.weight, self.scales = _bytes(packed.codes), _bytes(packed.scales)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        matrix: Tensor = dequantize(self.weight, self.scales, *self.form, dtype)
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = _Product.apply(x, self.weight, self.scales, bias, *self.form)  # type: ignore[no-untyped-call]
        return product

    @property
    def form(self) -> tuple[int, int, str, bool]:
        return self.out_features, self.in_features, self.kind, self.double_quant

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, double_quant={self.double_quant}"


def _bytes(held: Tensor) -> nn.Parameter:
    return nn.Parameter(held, requires_grad=False)


def four_bit(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Linear4bit]]:
    return ((name, module) for name, module in model.named_modules(prefix=prefix) if isinstance(module, Linear4bit))


def numbers(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter, and for how many of the model's numbers it stands: a byte of codes for two of them."""
    held = {id(module.weight): module.in_features * module.out_features for _, module in four_bit(model)}
    held |= {id(module.scales): 0 for _, module in four_bit(model)}
    return ((parameter, held.get(id(parameter), parameter.numel())) for parameter in model.parameters())


def restored(model: nn.Module, dtype: torch.dtype) -> None:
    """An ordinary layer in the place of each, with the values that the products were taken with."""
    for name, held in list(four_bit(model)):
        linear = nn.Linear(held.in_features, held.out_features, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(held.dequantized(dtype), requires_grad=False)
        linear.bias = held.bias
        model.set_submodule(name, linear)
