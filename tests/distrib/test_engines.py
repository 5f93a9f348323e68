"""Every (strategy, engine) that goes together: accumulated = concatenated = data-parallel, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import tensor_cases
import torch
import twobp_cases
from contract.checks import approximate_ones, settings, tolerance
from engine_cases import gradients, padded, ragged_rows, recipe, reference
from ranks import Ranks
from torch import Tensor
from train_cases import ENGINES

import strategies
from distrib.topology import Topology
from launch import compatibility
from strategies import Strategy

MODELS = {
    "full": {"config_overrides": {"tie_word_embeddings": False}},
    "tied": {"config_overrides": {"tie_word_embeddings": True}},
    "lora": {"lora_r": 4},
}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-9)) for n in expected)


def overall(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = torch.stack([(found[n] - expected[n]).norm() for n in expected])
    return float(errors.norm() / torch.stack([expected[n].norm() for n in expected]).norm())


def precision(engine: str) -> tuple[torch.dtype, float]:
    # DeepSpeed reduces in float32 whatever it is given.
    return (torch.float32, 2e-6) if engine.startswith("zero") else (torch.float64, 1e-12)


CELLS = [
    (name, label)
    for name, row in compatibility.engines().items()
    for label, said in row.items()
    if said == compatibility.OK
]
FACTORIES = settings()
APART = [(name, label) for name, label in CELLS if strategies.get(name).pipeline is Strategy.pipeline]


def cells(chosen: list[tuple[str, str]]) -> list[Any]:
    """Of the strategies but `plain` one kind of model is enough for the fast tier, another one by turns."""
    return [
        pytest.param(
            *cell, model, marks=() if cell[0] == "plain" or index % len(MODELS) == number else pytest.mark.slow
        )
        for index, cell in enumerate(chosen)
        for number, model in enumerate(MODELS)
    ]


@pytest.mark.parametrize(("strategy", "engine", "model"), cells(APART))
def test_two_ranks_and_accumulation_give_the_gradients_of_one_batch(
    two_ranks: Ranks, engine: str, model: str, strategy: str
) -> None:
    rows = ragged_rows(4)
    dtype, rounding = precision(engine)
    # Transformers' norms are in float32, and some compute them from their output.
    norms = 1e-6 if strategy in approximate_ones() else 0.0
    bound = max(rounding, norms, tolerance(FACTORIES[strategy]))
    made_from = recipe(engine=compatibility.ENGINES[engine], **MODELS[model])
    expected = reference(recipe(**MODELS[model]), rows, dtype)
    shares = [[padded([row]) for row in rows[:2]], [padded([row]) for row in rows[2:]]]
    if made_from.engine.tensor_parallel * made_from.engine.context_parallel > 1:
        shares = [shares[0] + shares[1]]
    for found in two_ranks("engine_cases:gradients", made_from, dtype, shares, strategy):
        assert worst(found, expected) < bound
        assert overall(found, expected) < bound / 2


@pytest.mark.parametrize(("strategy", "engine", "model"), cells([cell for cell in CELLS if cell not in APART]))
def test_two_stages_have_the_gradients_of_one_process(two_ranks: Ranks, engine: str, model: str, strategy: str) -> None:
    """Which see the same rows."""
    made_from = twobp_cases.recipe(engine=compatibility.ENGINES[engine], **MODELS[model])
    asked = twobp_cases.Case(made_from, [{"name": strategy}], [[padded([row]) for row in ragged_rows(4)]])
    assert max(twobp_cases.errors(two_ranks("twobp_cases:run", asked), twobp_cases.truth(asked)).values()) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_partial_window_with_a_filler_is_exact(two_ranks: Ranks, engine: str) -> None:
    rows = ragged_rows(3)
    dtype, bound = precision(engine)
    made_from = recipe(engine=ENGINES[engine])
    expected = reference(recipe(), rows, dtype)
    shares = [[padded([rows[0]]), padded([rows[1]])], [padded([rows[2]]), padded([rows[2]], learn=False)]]
    for found in two_ranks("engine_cases:gradients", made_from, dtype, shares):
        assert worst(found, expected) < bound


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_bias_at_two_places_is_sharded_once(two_ranks: Ranks, family: str) -> None:
    """In these heads, whose weight is the embedding's; that lies in a part of RoBERTa's that may not be split."""
    expected = tensor_cases.plain_gradients(family)
    for found in two_ranks("tensor_cases:sharded", family):
        assert tensor_cases.worst(found, expected) < 1e-12


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1], [1, 2, 1]])
def test_one_process_accumulates_as_one_batch(split: list[int]) -> None:
    rows = ragged_rows(4)
    expected = reference(recipe(), rows, torch.float64)
    starts = [sum(split[:index]) for index in range(len(split))]
    share = [padded(rows[start : start + count]) for start, count in zip(starts, split, strict=True)]
    assert worst(gradients(Topology(), recipe(), torch.float64, [share]), expected) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_gradients_would_be_noticed(two_ranks: Ranks, engine: str) -> None:
    rows = ragged_rows(4)
    dtype, bound = precision(engine)
    expected = reference(recipe(), rows, dtype)
    # A token fewer on one rank is the smallest mistake that averaging or a wrong W would make.
    short = (rows[3][0][:-1], rows[3][1])
    shares = [[padded([row]) for row in rows[:2]], [padded([rows[2]]), padded([short])]]
    found = two_ranks("engine_cases:gradients", recipe(engine=ENGINES[engine]), dtype, shares)[0]
    assert worst(found, expected) > 1e3 * bound
