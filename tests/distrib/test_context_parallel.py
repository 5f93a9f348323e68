"""One sequence over two ranks: the gradients are autograd's on each document alone."""

from __future__ import annotations

from typing import Any

import pytest
from contract.checks import dpo_loss, grpo_loss, with_references
from contract.reference import left_padded, masked, packed, ragged
from exactness import case, is_exact
from ranks import Ranks

import strategies
from distrib.contracts import Batch

STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "streambp": {"chunk": 8},
    "seco": {"chunk": 8},
    "recompute": {"policy": "full"},
}
# Lengths that neither ranks nor chunks divide, and one that leaves a rank without a position to learn.
BATCHES: list[Batch] = [
    left_padded(1, [11, 4, 7], 11),
    masked(ragged(4, [19, 12], 19, prompts=5), [19, 12]),
    packed(5, [[6, 4, 3], [9, 4]]),
    ragged(7, [13, 13], 13, prompts=9),
    ragged(10, [2, 30], 30),
    ragged(9, [3], 3),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_every_kind_of_batch_at_once(two_ranks: Ranks, engine: str, strategy: str) -> None:
    fields = STRATEGIES[strategy]
    is_exact(two_ranks, case(engine, strategy, [BATCHES], fields=fields, context_parallel=2), engine)
