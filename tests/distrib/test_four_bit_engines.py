"""A frozen base in 4 bits under every engine and strategy: the adapters' gradients are those of the decoded base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twobp_cases as pipelines
from contract import reference as contract
from engine_cases import TrainedAdapter, gradients, make_engine, padded, ragged_rows, recipe
from four_bit_reference import decode_base
from ranks import Ranks
from streaming_cases import drawn_model
from torch import Tensor

from distrib.contracts import Context
from distrib.topology import Topology
from distrib.units import units
from launch.models import build, load_config
from launch.reference import _adapter_off

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero2": {"name": "zero", "stage": 2},
    "zero3": {"name": "zero", "stage": 3},
}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def reference(
    rows: list[tuple[list[int], int]], kind: str, double: bool, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Autograd in float64, a row at a time, on ordinary layers with the values that 4 bits stand for."""
    made_from = recipe(lora_r=4)
    config = load_config(made_from)
    model = build(made_from, config, dtype)
    weights = TrainedAdapter(made_from, config, Topology())
    for name, _ in units(model):
        weights.fill(model, name)
    decode_base(model, kind, double)
    model.double()
    learned = sum(len(tokens) - prompt for tokens, prompt in rows)
    for tokens, prompt in rows:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        (F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(tokens[prompt:]), reduction="sum") / learned).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def four_bit(kind: str = "nf4", double: bool = False, **changes: Any) -> Any:
    return recipe(lora_r=4, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, **changes)


@pytest.mark.parametrize("strategy", ["plain", "streambp", "recompute", "seco"])
@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_have_the_gradients_of_the_decoded_base(two_ranks: Ranks, engine: str, strategy: str) -> None:
    rows = ragged_rows(4)
    double = engine == "fsdp2"
    # DeepSpeed reduces in float32.
    dtype, bound = (torch.float32, 5e-6) if engine.startswith("zero") else (torch.float64, 1e-12)
    expected = reference(rows, "nf4", double, dtype)
    shares = [[padded([row]) for row in rows[:2]], [padded([row]) for row in rows[2:]]]
    made_from = four_bit(double=double, engine=ENGINES[engine])
    for found in two_ranks("engine_cases:gradients", made_from, dtype, shares, strategy):
        assert worst(found, expected) < bound


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_format_in_one_process(kind: str, double: bool) -> None:
    rows = ragged_rows(4)
    expected = reference(rows, kind, double)
    found = gradients(Topology(), four_bit(kind, double), torch.float64, [[padded([row]) for row in rows]])
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_stages_of_a_pipeline(two_ranks: Ranks, engine: str) -> None:
    changes = {"lora_r": 3, "engine": engine, "config_overrides": {"tie_word_embeddings": False}}
    batches = [contract.ragged(1, [12, 12], 12), contract.ragged(3, [9, 2, 7], 9)]
    asked = pipelines.Case(pipelines.recipe(load_in_4bit=True, **changes), [{"name": "twobp"}], [batches])
    model = drawn_model(pipelines.recipe(**changes), torch.float64)
    decode_base(model, "nf4", False)
    wanted = contract.truth(model, batches, contract.sft, asked.total)
    found = pipelines.errors(two_ranks("twobp_cases:run", asked), wanted)
    assert max(found.values()) < 1e-12, found


def test_the_adapter_switched_off_leaves_the_decoded_base() -> None:
    """What DPO compares with."""
    made_from = four_bit()
    engine, _ = make_engine(Topology(), made_from, torch.float64)
    plain, _ = make_engine(Topology(), recipe(lora_r=4), torch.float64)
    decode_base(plain.model, "nf4", False)
    ids = torch.arange(9)[None]
    with _adapter_off(engine.model), _adapter_off(plain.model):
        alone, expected = engine.model(input_ids=ids).logits, plain.model(input_ids=ids).logits
    assert (alone - expected).abs().max() < 1e-12
    assert (engine.model(input_ids=ids).logits - alone).abs().max() > 1e-3


def test_what_waits_for_the_backward_is_counted_as_on_ordinary_layers() -> None:
    """A decoded matrix is gone when the next thing is made, which may have its address."""
    counted = []
    for made_from in (four_bit(), recipe(lora_r=4)):
        _, step = make_engine(Topology(), made_from, torch.float32, "recompute")
        batch = padded(ragged_rows(2))
        for number in range(3):
            step([batch], Context(0, number, 1.0))
        counted.append(step.accounts()["recompute"]["kept_bytes"])
    assert counted[0] == counted[1]
    assert counted[0]["measured"] == counted[0]["predicted"]


@pytest.mark.parametrize(("engine", "shards"), [("ddp", 1), ("fsdp2", 2), ("zero2", 1), ("zero3", 2)])
def test_engines_that_shard_shard_the_bytes(two_ranks: Ranks, engine: str, shards: int) -> None:
    made_from = four_bit(engine=ENGINES[engine])
    whole = sum(p.nbytes for p in build(made_from, load_config(made_from)).parameters() if p.dtype == torch.uint8)
    for held in two_ranks("engine_cases:packed_bytes", made_from):
        assert held == pytest.approx(whole / shards, rel=0.01)
