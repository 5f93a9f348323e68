"""Strategies that approximate, on two ranks: every engine gives the gradients of one process."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from contract.checks import approximate_ones
from contract.reference import left_padded, masked, packed, ragged
from ranks import Ranks
from streaming_cases import Case, drawn_model, recipe
from torch import Tensor
from train_cases import ENGINES

import strategies
from distrib.contracts import IGNORE, Batch, Context

PER_RANK: list[list[Batch]] = [
    [left_padded(1, [11, 4, 7], 11), packed(5, [[6, 4, 3], [9, 4]])],
    [masked(ragged(4, [19, 12], 19, prompts=5), [19, 12]), packed(6, [[2, 11]])],
]
BATCHES = [batch for batches in PER_RANK for batch in batches]
LEARNED = float(sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in BATCHES))


def of_one_process(case: Case) -> dict[str, Tensor]:
    """In the engine's precision: another rounding may put a number on another step of a derivative."""
    dtype = case.dtype or torch.float32
    model = drawn_model(case.recipe, dtype).to(dtype)
    step = strategies.prepare(model, [strategies.get(case.strategy)()])
    step(BATCHES, Context(seed=0, step=0, weight=LEARNED))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", approximate_ones())
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_one_process(two_ranks: Ranks, engine: str, lora_r: int, strategy: str) -> None:
    # DeepSpeed reduces in float32 whatever it is given.
    dtype, bound = (torch.float32, 5e-6) if engine.startswith("zero") else (torch.float64, 1e-12)
    made_from = recipe(engine=ENGINES[engine], lora_r=lora_r)
    # As it is: `streaming_cases` would make it exact.
    asked = Case(made_from, dtype, PER_RANK, LEARNED, strategy, asdict(strategies.get(strategy)()))
    wanted = of_one_process(asked)
    for found in two_ranks("streaming_cases:run", asked):
        assert found.gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found.gradients[name].double() - gradient).norm() < bound * gradient.norm()
