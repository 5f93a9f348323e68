"""Moments in four bits against numpy in float64, AdamW, and the same states split over ranks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from optim4bit_cases import BETAS, DECAY, EPS, RATE, adamw4bit, drawn, stepped
from ranks import Ranks
from torch import Tensor, nn

from distrib import optim4bit
from distrib.engines import Settings, check
from distrib.errors import Refused
from distrib.optim import OptimizerSpec
from distrib.optim4bit import POSITIVE, SIGNED, decode, encode
from distrib.topology import Topology

Array = NDArray[np.float64]
SHAPES = [(6, 200), (3, 5, 256), (1, 128)]


def dynamic_exponent() -> Array:
    """2110.02861, section 3: decades, each with twice the values of the one below, the middles of even parts of
    (0.1, 1]."""
    magnitudes: list[float] = []
    for decade, parts in ((1e-2, 1), (1e-1, 2), (1.0, 4)):
        edges = np.linspace(0.1, 1, parts + 1)
        magnitudes += list(decade * (edges[1:] + edges[:-1]) / 2)
    return np.sort([*magnitudes, *(-np.array(magnitudes)), 0.0, 1.0])


def test_tables_are_the_papers() -> None:
    assert np.allclose(SIGNED, dynamic_exponent(), rtol=1e-12, atol=0)
    assert np.allclose(POSITIVE, np.linspace(0, 1, 17)[1:], rtol=1e-12, atol=0)


def unpack(codes: Tensor) -> NDArray[np.int64]:
    pairs = codes.numpy().astype(np.int64)
    return np.stack([pairs // 16, pairs % 16], -1).reshape(*pairs.shape[:-1], -1)


def values_of(codes: Tensor, scales: Tensor, table: Any, columns: int) -> Array:
    values = np.asarray(table)[unpack(codes)] * np.repeat(scales.double().numpy(), 128, -1)
    return np.asarray(values[..., :columns])


@pytest.mark.parametrize(("table", "signed"), [(SIGNED, True), (POSITIVE, False)])
@pytest.mark.parametrize("columns", [128, 200, 513])
def test_codes_are_the_nearest_entries(table: tuple[float, ...], signed: bool, columns: int) -> None:
    torch.manual_seed(columns)
    values = torch.randn(7, columns) * torch.logspace(-8, 3, 7)[:, None]
    values[2] = 0
    values[3, 5] = 100
    values[4] = torch.linspace(-1, 1, columns)
    values = values if signed else values.square()
    codes, scales = encode(values, torch.tensor(table))
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    whole = np.zeros((7, -(-columns // 128) * 128))
    whole[:, :columns] = values.double().numpy()
    expected = np.abs(whole.reshape(7, -1, 128)).max(-1)
    assert np.array_equal(scales.double().numpy(), expected)
    found = values_of(codes, scales, table, columns)
    assert np.allclose(
        decode(codes, scales, torch.tensor(table))[:, :columns].double().numpy(), found, rtol=1e-6, atol=0
    )
    largest = np.repeat(expected, 128, 1)[:, :columns]
    distances = np.abs(np.asarray(table) * largest[..., None] - whole[:, :columns, None])
    assert np.all(np.abs(found - whole[:, :columns]) <= distances.min(-1) + 1e-6 * largest)
    assert len(set(unpack(codes).flatten())) == 16


def test_a_second_moment_is_zero_only_where_its_block_is() -> None:
    values = torch.zeros(2, 256)
    values[0, 3], values[1, 200] = 1e-30, 7.0
    table = torch.tensor(POSITIVE)
    found = decode(*encode(values, table), table).unflatten(1, (2, 128)).ne(0)
    assert found.all(-1).tolist() == [[True, False], [False, True]]
    assert found.any(-1).tolist() == [[True, False], [False, True]]


def moments(state: dict[str, Tensor], columns: int) -> tuple[Array, Array]:
    return (
        values_of(state["exp_avg"], state["exp_avg_scale"], SIGNED, columns),
        values_of(state["exp_avg_sq"], state["exp_avg_sq_scale"], POSITIVE, columns),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_adamws_from_the_moments_that_are_held(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(drawn(shape, 0))
    optimizer = adamw4bit([parameter])
    mean, square = np.zeros(shape), np.zeros(shape)
    for count in range(1, 5):
        parameter.grad = drawn(shape, count)
        weight, gradient = parameter.detach().double().numpy().copy(), parameter.grad.double().numpy()
        optimizer.step()
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        divisor = np.sqrt(square / (1 - BETAS[1] ** count)) + EPS
        expected = weight * (1 - RATE * DECAY) - RATE * mean / (1 - BETAS[0] ** count) / divisor
        assert np.allclose(parameter.detach().double().numpy(), expected, rtol=1e-5, atol=1e-6)
        held = moments(optimizer.state[parameter], shape[-1])
        # Half of the widest gap between a table's entries, of a block's largest.
        assert np.abs(held[0] - mean).max() <= 0.1126 * np.abs(mean).max()
        assert np.abs(held[1] - square).max() <= 0.0626 * square.max()
        mean, square = held


@pytest.mark.parametrize("shape", [(300,), (40, 127), ()])
def test_vectors_and_short_rows_are_adamws(shape: tuple[int, ...]) -> None:
    found, expected = (nn.Parameter(drawn(shape, 0)) for _ in range(2))
    optimizer = adamw4bit([found])
    reference = torch.optim.AdamW(
        [expected], RATE, BETAS, EPS, weight_decay=DECAY if len(shape) > 1 else 0.0, foreach=False
    )
    for step in range(3):
        found.grad, expected.grad = drawn(shape, 1 + step), drawn(shape, 1 + step)
        optimizer.step()
        reference.step()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name


def test_states_are_the_same_however_they_are_split(two_ranks: Ranks) -> None:
    """Odd numbers of rows, and a rank that has none."""
    tensors = [drawn(shape, 0) for shape in [*SHAPES, (7, 130), (9,), (4, 12)]]
    whole = stepped(tensors, lambda tensor: tensor.clone())
    for found in two_ranks("optim4bit_cases:stepped_in_shards", tensors):
        assert_same(found, whole)


def test_a_parameter_is_updated_in_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [drawn(shape, 0) for shape in SHAPES]
    whole = stepped(tensors, lambda tensor: tensor.clone())
    monkeypatch.setattr(optim4bit, "RUN", 400)
    assert_same(stepped(tensors, lambda tensor: tensor.clone()), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(drawn(shape, 0).to(dtype)) for shape in [(6, 200), (5,)]]
    optimizer = adamw4bit(parameters)

    def step(number: int) -> None:
        for parameter in parameters:
            parameter.grad = drawn(tuple(parameter.shape), number).to(dtype)
        optimizer.step()

    step(1)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    step(2)
    expected = [parameter.detach().clone() for parameter in parameters]
    optimizer = adamw4bit(parameters)
    optimizer.load_state_dict(saved)
    assert optimizer.state[parameters[0]]["exp_avg"].dtype == torch.uint8
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    step(2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_a_large_matrixs_states_take_an_eighth() -> None:
    parameter = nn.Parameter(torch.zeros(512, 1024))
    parameter.grad = torch.ones_like(parameter)
    optimizer = adamw4bit([parameter])
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[parameter].values())
    assert held == parameter.numel() * (1 + 2 * 4 / 128) + 4
    assert held < 0.16 * 8 * parameter.numel()


def final_loss(name: str) -> float:
    """Of the last 20 of 150 steps, on pairs of tokens that are drawn from a fixed table."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 128),
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 128),
        nn.LayerNorm(128),
        nn.Linear(128, 64),
    )
    optimizer = OptimizerSpec(name, betas=(0.9, 0.95)).build(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    chances = torch.randn(64, 64, generator=generator).mul(2).softmax(-1)
    losses = []
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 150)
        tokens = torch.randint(64, (256,), generator=generator)
        loss = F.cross_entropy(model(tokens), torch.multinomial(chances[tokens], 1, generator=generator)[:, 0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return sum(losses[-20:]) / 20


def test_a_small_model_learns_as_with_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = final_loss("adamw")
    # Seen: 0.01 per cent; from 4.3 in the beginning to 2.89, where 2.77 is the least.
    assert final_loss("adamw4bit") == pytest.approx(expected, rel=2e-3)
    monkeypatch.setattr(optim4bit, "POSITIVE", tuple(step / 15 for step in range(16)))
    assert final_loss("adamw4bit") > 2 * expected


def test_what_cannot_split_by_rows_is_refused() -> None:
    settings = Settings(OptimizerSpec("adamw4bit"))
    with pytest.raises(Refused, match=r"optimizer.name='adamw4bit' with engine.name='zero': .* choose adamw, or "):
        check("zero", settings, Topology())
    with pytest.raises(Refused, match=r"optimizer.name='adamw4bit' with engine.tensor_parallel=2: .* choose adamw"):
        check("fsdp2", settings, Topology(world=2, tensor=2))
    for engine in ("ddp", "fsdp2"):
        check(engine, settings, Topology())
