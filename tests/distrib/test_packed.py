"""Packed documents give the loss and gradients of the same documents alone, through the engines."""

from __future__ import annotations

import pytest
import torch
from engine_cases import IGNORE, gradients, padded, ragged_rows, recipe, reference
from ranks import Ranks

from distrib.contracts import Batch
from distrib.topology import Topology

Rows = list[tuple[list[int], int]]


def packed(rows: Rows, padding: int = 0) -> Batch:
    """One line of all rows, and padding that begins a document of its own."""
    ids = [token for tokens, _ in rows for token in tokens] + [0] * padding
    labels = [t for tokens, prompt in rows for t in [IGNORE] * prompt + tokens[prompt:]] + [IGNORE] * padding
    positions = [index for tokens, _ in rows for index in range(len(tokens))] + list(range(padding))
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_with_packed_rows(two_ranks: Ranks, engine: str) -> None:
    rows = ragged_rows(6)
    expected = reference(recipe(), rows, torch.float64)
    shares = [[packed(rows[:3], padding=4)], [packed(rows[3:5]), packed(rows[5:])]]
    made_from = recipe(engine={"name": engine})
    shares[0].append(padded([rows[0]], learn=False) | {"position_ids": torch.arange(5)[None]})
    for found in two_ranks("engine_cases:gradients", made_from, torch.float64, shares):
        assert worst(found, expected) < 1e-12


def test_documents_that_see_each_other_would_be_noticed() -> None:
    rows = ragged_rows(6)
    expected = reference(recipe(), rows, torch.float64)
    joined = packed(rows)
    assert worst(gradients(Topology(), recipe(), torch.float64, [[joined]]), expected) < 1e-12
    joined.pop("position_ids")
    assert worst(gradients(Topology(), recipe(), torch.float64, [[joined]]), expected) > 1e-3
