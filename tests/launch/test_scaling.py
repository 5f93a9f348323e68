"""Scaling on paper: formulas against hand calculation, messages and memory against real ranks, the command."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from ranks import Ranks

from launch.models import build, load_config
from launch.plan_scaling import script_of
from launch.recipe import Recipe
from launch.scaling import Group, parts_of

SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 384,
    "intermediate_size": 500,
    "head_dim": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
"""Matrices on both sides of the size from which ZeRO-3 shards, and rows that do not divide."""
CONTROL_BYTES = 8
"""Norms, losses and flags are numbers: messages of no more than this are not in a script."""


def recipe(engine: Any, **changes: Any) -> Recipe:
    shape = SHAPE | changes.pop("config_overrides", {})
    return Recipe(engine=engine, config_overrides=shape, max_length=16, **changes)


def predicted(made_from: Recipe, world: int) -> Counter[tuple[str, int]]:
    """Bytes of the whole tensors, by kind and ranks."""
    parts = parts_of(build(made_from, load_config(made_from)))
    count = made_from.gradient_accumulation_steps
    script = script_of(made_from.engine, made_from, parts, Group(world), count, hides=False)
    found: Counter[tuple[str, int]] = Counter()
    for kind, payload_bytes, group, times in script.messages():
        found[kind, group.ranks] += times * payload_bytes
    return found


def counted(seen: Counter[tuple[str, int, int]]) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    for (kind, payload_bytes, ranks), times in seen.items():
        if payload_bytes > CONTROL_BYTES:
            found[kind, ranks] += times * payload_bytes
    return found


ENGINES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": {"name": "zero", "stage": 1},
    "zero2": {"name": "zero", "stage": 2},
    "zero3": {"name": "zero", "stage": 3},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_two_ranks_exchange(two_ranks: Ranks, engine: str) -> None:
    made_from = recipe(ENGINES[engine], gradient_accumulation_steps=2)
    for seen, _ in two_ranks("scaling_cases:step", made_from):
        assert counted(seen) == predicted(made_from, 2)


LORA = {"lora_r": 4, "gradient_accumulation_steps": 3}
UNTIED = {"config_overrides": {"tie_word_embeddings": False}}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "gradient_accumulation_steps": 2},
        LORA,
        LORA | UNTIED,
        UNTIED,
        LORA | UNTIED | {"load_in_4bit": True},
        LORA | {"bf16": True},
    ],
    ids=["once", "bf16", "lora", "lora untied", "untied", "4 bits", "lora bf16"],
)
def test_what_four_ranks_exchange(four_ranks: Ranks, engine: str, changes: dict[str, Any]) -> None:
    made_from = recipe(ENGINES[engine], **changes)
    for seen, _ in four_ranks("scaling_cases:step", made_from):
        assert counted(seen) == predicted(made_from, 4)
