"""Number formats against their tables, and quantized matrices against a reference in numpy that goes block by block."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.lowbit.backends.reference import Reference
from strategies.lowbit.draws import Draws, random_bits, seed_of, uniform
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, ROW, SPLIT, TENSOR, NumberFormat, Scaled
from strategies.lowbit.tensor import packed, quantize, unpacked

CPU = torch.device("cpu")

E2M1_CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
INT4_CODES = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]
E4M3_GRID = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]

# The numbers that are not negative; the index of an even one is even.
GRIDS: dict[NumberFormat, list[float]] = {
    INT4: [0, 1, 2, 3, 4, 5, 6, 7],
    INT8: [*range(128)],
    SPLIT: [*range(99)],
    E2M1: E2M1_CODES[:8],
    E4M3: E4M3_GRID,
}
each_format = pytest.mark.parametrize("format", GRIDS, ids=lambda format: format.name)

LAYOUTS = [
    *(Scaled(format, block) for format in GRIDS for block in (ROW, TENSOR)),
    Scaled(E2M1, 128),
    Scaled(E4M3, 8, square=True),
    *(Scaled(E2M1, 16, square, "e4m3", up) for square in (False, True) for up in (False, True)),
    *(Scaled(E2M1, 32, square, "e8m0", up) for square in (False, True) for up in (False, True)),
    Scaled(E2M1, 16, scale="e4m3", up=False, either=True),
    Scaled(INT4, 6, scale="e4m3"),
    *(Scaled(INT4, multiples=part) for part in (32, 6)),
]


def named(scaled: Scaled) -> str:
    kind = (
        "square " * scaled.square
        + "either " * scaled.either
        + "down " * (not scaled.up)
        + f"by {scaled.multiples} " * (scaled.multiples > 0)
    )
    return f"{scaled.format.name} {scaled.block} {kind}{scaled.scale}"


each_layout = pytest.mark.parametrize("scaled", LAYOUTS, ids=named)
NVFP4, MXFP4 = Scaled(E2M1, 16, scale="e4m3"), Scaled(E2M1, 32, scale="e8m0")


def nearest(x: float, grid: list[float]) -> float:
    size = min(abs(x), grid[-1])
    above = next(i for i, number in enumerate(grid) if number >= size)
    below = above if grid[above] == size else above - 1
    middle = (grid[below] + grid[above]) / 2
    chosen = below if size < middle or (size == middle and below % 2 == 0) else above
    return math.copysign(grid[chosen], x)


def stochastic(x: float, u: float, grid: list[float]) -> float:
    """Up where the way up is at most u, counted in the distance of the neighbours."""
    both = [*(-number for number in reversed(grid[1:])), *grid]
    x = min(max(x, both[0]), both[-1])
    above = next(i for i, number in enumerate(both) if number >= x)
    if both[above] == x:
        return x
    low, high = both[above - 1], both[above]
    return high if (high - x) / (high - low) <= u else low


def scale_of(largest: np.float32, of_tensor: np.float32, scaled: Scaled, becomes: float = 0) -> np.float32:
    wanted = largest / np.float32(becomes or scaled.format.largest)
    if scaled.scale == "float32" or wanted == 0:
        return wanted
    if scaled.scale == "e8m0":
        powers = [np.float32(2.0**k) for k in range(-126, 128)]
        if scaled.up:
            return next(power for power in powers if power >= wanted)
        # 4 is the last power of two in E2M1.
        return max(power for power in powers if float(power) * 4 <= float(largest))
    share = float(wanted * (np.float32(1) / of_tensor))
    found = next((s for s in E4M3_GRID if s >= share), 448.0) if scaled.up else nearest(share, E4M3_GRID)
    return np.float32(found or 2.0**-9) * of_tensor


def with_multiples(x: np.ndarray, part: int, u: np.ndarray | None) -> Tensor:
    """Of INT4: 18 times 7 is the last that fits in 8 bits."""
    made = np.zeros_like(x)
    for m, row in enumerate(x):
        scale = np.abs(row).max() / np.float32(126)
        if not np.isfinite(scale):
            made[m] = np.nan
        elif scale > 0:
            for k in range(0, len(row), part):
                here, by_row = row[k : k + part], np.float32(1) / scale
                multiple = np.float32(min(max(math.ceil(np.abs(here).max() * by_row / np.float32(7)), 1), 18))
                unscaled = (here * (by_row / multiple)).tolist()
                if u is None:
                    found = [nearest(number, GRIDS[INT4]) for number in unscaled]
                else:
                    chances = u[m, k : k + part].tolist()
                    found = [stochastic(*both, GRIDS[INT4]) for both in zip(unscaled, chances, strict=True)]
                made[m, k : k + part] = np.array(found, np.float32) * multiple * scale
    return torch.from_numpy(made)


def reference(x_MK: Tensor, scaled: Scaled, u_MK: Tensor | None = None) -> Tensor:
    x = x_MK.float().numpy()
    if scaled.multiples:
        return with_multiples(x, scaled.multiples, None if u_MK is None else u_MK.numpy())
    M, K = x.shape
    width = int(scaled.block) if isinstance(scaled.block, int) else K
    height = M if scaled.block == TENSOR else width if scaled.square else 1
    made = np.zeros_like(x)
    blocks = [np.s_[m : m + height, k : k + width] for m in range(0, M, height) for k in range(0, K, width)]
    largest = [np.abs(x[block]).max() for block in blocks]
    of_tensor = max((a for a in largest if np.isfinite(a)), default=np.float32(0))
    of_tensor = of_tensor / np.float32(scaled.format.largest) / np.float32(448)
    for block, most in zip(blocks, largest, strict=True):
        if not np.isfinite(most):
            made[block] = np.nan
        elif most > 0:
            scale = scale_of(most, of_tensor, scaled)
            if scaled.either and u_MK is None:
                scale = min((scale, scale_of(most, of_tensor, scaled, 4)), key=lambda by: off(x[block], by))
            unscaled, grid = (x[block] * (np.float32(1) / scale)).ravel().tolist(), GRIDS[scaled.format]
            if u_MK is None:
                found = [nearest(number, grid) for number in unscaled]
            else:
                u = u_MK.numpy()[block].ravel().tolist()
                found = [stochastic(number, chance, grid) for number, chance in zip(unscaled, u, strict=True)]
            made[block] = np.array(found, np.float32).reshape(x[block].shape) * scale
    return torch.from_numpy(made)


def off(x: np.ndarray, scale: np.float32) -> float:
    """The sum of squared errors of numbers of E2M1 with that scale."""
    made = [nearest(number, GRIDS[E2M1]) * float(scale) for number in (x * (np.float32(1) / scale)).ravel().tolist()]
    return sum((a - b) ** 2 for a, b in zip(made, x.ravel().tolist(), strict=True))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Over several powers of two, with a row, a block and single numbers of nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 ** torch.randint(-6, 6, shape, generator=generator)
    x[x.abs() < 0.01] = 0.0
    x[1] = 0.0
    x[:, :16] *= torch.arange(shape[0])[:, None] % 2
    return x


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_all_codes_of_e2m1() -> None:
    pairs = torch.tensor([[low | high << 4 for low in range(16)] for high in range(16)], dtype=torch.uint8)
    doubled = unpacked(pairs, E2M1)
    same(doubled[:, 0::2].float() / 2, torch.tensor([E2M1_CODES] * 16))
    same(doubled[:, 1::2].float() / 2, torch.tensor([E2M1_CODES] * 16).T)
    # Whole numbers know no zero below zero.
    again = packed(doubled, E2M1)
    without = torch.where(pairs >> 4 == 8, pairs & 0x0F, pairs)
    same(again, torch.where(pairs & 15 == 8, without & 0xF0, without))


def test_all_codes_of_int4() -> None:
    pairs = torch.tensor([[low | high << 4 for low in range(16)] for high in range(16)], dtype=torch.uint8)
    codes = unpacked(pairs, INT4)
    same(codes[:, 0::2], torch.tensor([INT4_CODES] * 16, dtype=torch.int8))
    same(codes[:, 1::2], torch.tensor([INT4_CODES] * 16, dtype=torch.int8).T)
    same(packed(codes, INT4), pairs)


def test_e4m3_is_what_torch_holds() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    same(codes.float(), torch.tensor(E4M3_GRID))


def test_packed_numbers_lie_as_in_torchs_float4() -> None:
    """The first in the low half."""
    made = quantize(torch.tensor([[1.0, -6.0, 0.5, 3.0]]), Scaled(E2M1)).pack()
    assert made.codes.tolist() == [[0xF2, 0x51]]
    assert made.codes.view(torch.float4_e2m1fn_x2).shape == (1, 2)
    made = quantize(torch.tensor([[1.0, -7.0, 2.0]]), Scaled(INT4)).pack()
    assert made.codes.tolist() == [[0x91, 0x02]]


@each_format
def test_the_grid_stays_and_of_two_as_near_the_even_one_is_taken(format: NumberFormat) -> None:
    grid = GRIDS[format]
    assert format.largest == grid[-1]
    pairs = list(pairwise(grid))
    middles = [(a + b) / 2 for a, b in pairs]
    even = [a if i % 2 == 0 else b for i, (a, b) in enumerate(pairs)]
    just = 2.0**-20
    for sign in (1, -1):
        made = lambda x, sign=sign: format.nearest(torch.tensor(x) * sign) * sign  # noqa: E731
        same(made([float(x) for x in grid]), torch.tensor(grid).float())
        same(made(middles), torch.tensor(even).float())
        same(made([x * (1 - just) for x in middles]), torch.tensor(grid[:-1]).float())
        same(made([x * (1 + just) for x in middles]), torch.tensor(grid[1:]).float())
        same(made([grid[-1] * 1.01, grid[-1] * 100]), torch.tensor([grid[-1]] * 2).float())


@each_format
def test_stochastic_rounding_takes_the_two_neighbours_as_often_as_they_are_near(format: NumberFormat) -> None:
    grid = [*(-x for x in reversed(GRIDS[format][1:])), *GRIDS[format]]
    u = uniform(torch.arange(-(2**15), 2**15, dtype=torch.int16))
    for low, high in list(pairwise(grid))[:: max(len(grid) // 16, 1)]:
        for share in (0.0, 2.0**-10, 0.3, 0.5, 0.9):
            x = torch.tensor(low + share * (high - low))
            made = format.stochastic(x.expand(2**16), u)
            ups = (made == high).sum().item()
            assert ups + (made == low).sum().item() == 2**16
            exactly = (x.item() - low) / (high - low) * 2**16
            assert abs(ups - exactly) <= 1
            assert share or ups == 0
    same(
        format.stochastic(torch.tensor([format.largest, -format.largest]) * 1.001, u[-2:]).abs(),
        u.new_full((2,), grid[-1]),
    )


@each_layout
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (37, 141), (32, 128)], ids=str)
def test_quantizing_is_what_the_reference_does(scaled: Scaled, shape: tuple[int, int]) -> None:
    x = numbers(*shape) if shape[0] > 1 else torch.tensor([[-3.3]])
    made = quantize(x, scaled)
    assert made.shape == shape
    assert made.codes.shape[1] % 2 == 0
    wanted = reference(x, scaled)
    same(made.dequantize(), wanted)
    same(made.dequantize(torch.bfloat16), wanted.bfloat16())
    same(made.pack().dequantize(), wanted)
    same(made.pack().unpack().codes.float(), made.unpack().codes.float())
    half = x.bfloat16()
    same(quantize(half, scaled).dequantize(), reference(half, scaled))
    across = x.T.contiguous().T
    same(quantize(across, scaled).codes.float(), made.codes.float())
    same(quantize(across, scaled).pack().dequantize(), wanted)


@each_layout
def test_rounding_stochastically_is_what_the_reference_does(scaled: Scaled) -> None:
    x = numbers(37, 141)
    made = Reference().quantize(x, scaled, seed=1)
    u = uniform(random_bits([37, 141], 1, CPU))
    same(made.dequantize(), reference(x, scaled, u))
    assert (made.dequantize() != quantize(x, scaled).dequantize()).any()
    assert not made.dequantize()[x == 0].any()


@each_layout
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_not_finite_is_none_and_no_other(scaled: Scaled, bad: float) -> None:
    x = numbers(37, 141)
    x[3, 135] = bad
    found = quantize(x, scaled).pack().dequantize()
    wanted = reference(x, scaled)
    assert wanted.isnan().all() == (scaled.block == TENSOR)
    same(found, wanted)
    same(quantize(x, scaled, torch.full_like(x, 0.5)).dequantize().isnan(), wanted.isnan())


@each_layout
def test_zeros_and_no_rows(scaled: Scaled) -> None:
    zeros = quantize(torch.zeros(5, 40), scaled, torch.full((5, 40), 0.999))
    assert not zeros.codes.float().any()
    same(zeros.pack().dequantize(), torch.zeros(5, 40))
    for shape in ((0, 40), (5, 0)):
        assert quantize(torch.zeros(shape), scaled).pack().dequantize().shape == shape


@each_layout
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-37, 1e-30, 1e30, 1e38])
def test_tiny_and_huge_numbers(scaled: Scaled, size: float) -> None:
    """They come back as ever, or as nothing where a scale would not be a normal number of float32."""
    x = (numbers(5, 140).double() / 300 * size).float()
    x[0, 0] = size
    found = quantize(x, scaled).dequantize()
    assert found.isfinite().all()
    assert (found[x == 0] == 0).all()
    if size >= 1e-30:
        same(found, reference(x, scaled))
    else:
        assert (found.double() - x.double()).abs().max() <= max(0.51 * size, 500 * 2.0**-126)
    u = torch.full_like(x, 0.5)
    assert quantize(x, scaled, u).dequantize().isfinite().all()


def test_scales_lose_no_block() -> None:
    """The least scale of E4M3 is that of every smaller block."""
    x = torch.ones(1, 32)
    x[0, 16:] = 1e-7
    made = quantize(x, NVFP4)
    assert made.scales.float().tolist() == [[448.0, 2.0**-9]]
    tiny = quantize(x.expand(4000, 32), NVFP4, uniform(random_bits([4000, 32], 1, CPU))).dequantize()[:, 16:]
    assert 0 < tiny.count_nonzero() < tiny.numel()


@pytest.mark.parametrize("wanted", E4M3_GRID[1:-1:5])
def test_scales_of_e4m3_go_up(wanted: float) -> None:
    x = torch.full((3, 16), 6.0)
    x[0] *= 448
    x[1] *= wanted
    x[2] *= wanted * (1 + 2.0**-20)
    found = quantize(x, NVFP4)
    assert found.of_tensor is not None
    assert found.of_tensor == 1.0
    above = next(s for s in E4M3_GRID if s > wanted)
    assert found.scales.float().flatten().tolist() == [448.0, wanted, above]
    down = quantize(x, replace(NVFP4, up=False))
    assert down.scales.float().flatten().tolist() == [448.0, wanted, wanted]


@pytest.mark.parametrize("exponent", [-126, -100, -1, 0, 1, 100, 125])
def test_scales_of_e8m0(exponent: int) -> None:
    of = lambda largest, scaled: quantize(torch.full((1, 32), largest * 2.0**exponent), scaled).scales.tolist()  # noqa: E731
    assert of(6.0, MXFP4) == [[exponent + 127]]
    assert of(6.001, MXFP4) == [[exponent + 128]]
    down = Scaled(E2M1, 32, scale="e8m0", up=False)
    assert [of(x, down) for x in (4.0, 6.001, 7.999)] == [[[exponent + 127]]] * 3
    assert of(3.999, down) == [[max(exponent + 126, 0)]]


@pytest.mark.parametrize("scaled", [s for s in LAYOUTS if s.turns], ids=named)
def test_rows_become_columns(scaled: Scaled) -> None:
    x = numbers(37, 141)
    made = quantize(x, scaled)
    turned = made.turned()
    assert turned.shape == (141, 37)
    by = made.row_scales() if scaled.by_rows else 1.0
    torch.testing.assert_close(turned.dequantize().T * by, made.dequantize(), rtol=1e-6, atol=0)
    same(made.pack().turned().dequantize(), turned.dequantize())
    other = torch.randn(11, 37, generator=torch.Generator().manual_seed(1))
    # A product over the rows: the scales go into what it is multiplied with.
    fold = made.row_scales()[:, 0] if scaled.by_rows else None
    a = Reference().quantize(other, Scaled(INT8) if scaled.by_rows else scaled, by_K=fold)
    found = Reference().product(a, turned, torch.float64)
    wanted = other.double() @ made.dequantize().double() if scaled.by_rows else a.dequantize().double() @ x.double()
    assert (found - wanted).norm() / wanted.norm() < (0.02 if scaled.by_rows else 0.2)


def test_blocks_of_a_row_do_not_turn() -> None:
    assert [s.turns for s in (NVFP4, MXFP4, Scaled(E2M1, 128))] == [False] * 3


@each_layout
def test_products_are_those_of_the_dequantized(scaled: Scaled) -> None:
    a, b = quantize(numbers(37, 141), scaled), quantize(numbers(20, 141, seed=1), scaled)
    x, y = a.dequantize(torch.float64), b.dequantize(torch.float64)
    found = Reference().product(a.pack(), b, torch.float64)
    # As dequantized, each number has been rounded to float32.
    assert ((found - x @ y.T).abs() <= 2.0**-22 * (x.abs() @ y.abs().T)).all()


@each_layout
def test_quantizing_without_memory(scaled: Scaled) -> None:
    x = numbers(37, 141)
    real = Reference().quantize(x, scaled, seed=1).pack()
    with FakeTensorMode() as mode:
        fake = Reference().quantize(mode.from_tensor(x), scaled, seed=1).pack()
        product = Reference().product(fake, fake, torch.bfloat16)
    for a, b in ((fake.codes, real.codes), (fake.scales, real.scales)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    assert (product.shape, product.dtype) == ((37, 37), torch.bfloat16)


def test_uniform_is_a_half_on_average() -> None:
    found = uniform(torch.arange(-(2**15), 2**15, dtype=torch.int16)).double()
    assert found.mean().item() == 0.5
    assert 0 < found.min() < found.max() < 1
    assert len(found.unique()) == 2**16


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 4), (0, 3), (2, 3, 7)], ids=str)
def test_bits_are_a_function_of_their_seed(shape: tuple[int, ...]) -> None:
    before = torch.random.get_rng_state()
    found = random_bits(shape, 7, CPU)
    same(torch.random.get_rng_state(), before)
    assert (found.shape, found.dtype) == (shape, torch.int16)
    torch.rand(3)
    same(random_bits(shape, 7, CPU), found)
    assert not found.numel() or (random_bits(shape, 8, CPU) != found).any()


def test_every_bit_is_set_as_often_as_not() -> None:
    n = 2**18
    bits = random_bits([n], 3, CPU).int()
    of_each = torch.stack([bits >> i & 1 for i in range(16)]).double().mean(1)
    assert (of_each - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
    # Neighbours, which come from one word, know nothing of each other.
    u = uniform(bits.to(torch.int16)).double() - 0.5
    for far in range(1, 5):
        assert abs((u[far:] * u[:-far]).mean() * 12) < 5 / math.sqrt(n)


def test_every_key_has_its_own_seed() -> None:
    assert seed_of(1, 2, "layers.0") == 5816050009729320563  # in every process
    keys = []
    for rank in (0, 1):
        draws = Draws(rank)
        for seed, step in ((0, 0), (0, 1), (1, 0)):
            draws.begin(seed, step)
            keys += [draws.next(module) for module in ("a", "b", "a")]
    seeds = {seed_of(*key) for key in keys}
    assert len(seeds) == len(keys) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A step that runs again has the same.
    again = Draws(1)
    again.begin(1, 0)
    assert [again.next(module) for module in ("a", "b", "a")] == keys[-3:]


def test_a_loop_that_says_nothing_of_steps_draws_anew() -> None:
    draws = Draws(0)
    assert draws.next("a") != draws.next("a")
    assert draws.next("b")[0] == torch.initial_seed()


def test_bits_are_one_operator() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(op))
            return op(*args, **(kwargs or {}))

    with Seen() as seen:
        random_bits([3, 5], 1, CPU)
    assert seen.names == ["ebbtide.random_bits.default"]


def test_a_choice_of_two_scales_is_nearer_and_square_blocks_are_further() -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    six = Scaled(E2M1, 16, scale="e4m3", up=False)
    found = [
        float((quantize(x, scaled).dequantize() - x).norm() / x.norm())
        for scaled in (replace(six, either=True), six, replace(six, square=True))
    ]
    assert found == pytest.approx([0.087, 0.095, 0.111], abs=1e-3)
