"""Recomputation on two ranks: every engine, against autograd on each document alone, and with dropout against plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract.reference import packed, ragged
from exactness import case, is_exact
from ranks import Ranks
from train_cases import ENGINES

PER_RANK = [
    [packed(5, [[6, 4, 3], [9, 4]]), ragged(11, [5, 2], 5), ragged(13, [9], 9, prompts=4)],
    [packed(6, [[2, 11, 8]]), ragged(14, [12], 12), ragged(16, [0], 7)],
]
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "light": {},
    "auto": {"policy": "auto", "budget": 0.3},
    "away": {"policy": "norms", "offload": True},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients(two_ranks: Ranks, engine: str, policy: str) -> None:
    is_exact(two_ranks, case(engine, "recompute", PER_RANK, fields=POLICIES[policy]), engine)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_adapters_on_a_frozen_model(two_ranks: Ranks, engine: str) -> None:
    is_exact(two_ranks, case(engine, "recompute", PER_RANK, fields=POLICIES["full"], lora_r=4), engine)


@pytest.mark.parametrize("policy", ["full", "auto"])
@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_in_bf16_is_that_of_plain(two_ranks: Ranks, engine: str, policy: str) -> None:
    overrides = {"attention_dropout": 0.3}
    asked = case(engine, "plain", PER_RANK, bf16=True, dtype=None, config_overrides=overrides, lora_r=4)
    right = two_ranks("streaming_cases:run", asked)
    found = two_ranks("streaming_cases:run", replace(asked, strategy="recompute", fields=POLICIES[policy]))
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one.loss, other.loss)
        assert all(torch.equal(one.gradients[name], gradient) for name, gradient in other.gradients.items())
