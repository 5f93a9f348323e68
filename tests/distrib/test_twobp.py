"""Pipelines on two and four ranks, held to autograd on each document alone: schedules, engines across replicas, what
runs inside stages, micro-batches of any shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import reference
from contract.checks import dpo_loss, grpo_loss, with_references
from contract.reference import left_padded, packed, ragged
from ranks import Ranks
from twobp_cases import Case, errors, recipe, truth

import strategies
from distrib.pipeline.schedules import NAMES
from strategies import DPO, GRPO

EXACT = 1e-12
MICRO_BATCHES = [
    ragged(1, [12, 12], 12),
    ragged(2, [5], 5, prompts=3),
    ragged(3, [9, 2, 7], 9),
    packed(5, [[6, 4, 3], [9, 4]]),
    left_padded(10, [11, 4, 7], 11),
    ragged(9, [0, 0], 8),
]
REPLICAS = [MICRO_BATCHES[:4], MICRO_BATCHES[2:]]
TIED = {"config_overrides": {"tie_word_embeddings": True}}
UNTIED = {"config_overrides": {"tie_word_embeddings": False}}
INSIDE: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "recompute": [{"name": "recompute"}],
    "full": [{"name": "recompute", "policy": "full"}],
    "auto": [{"name": "recompute", "policy": "auto", "budget": 0.4}],
    "streambp": [{"name": "streambp", "chunk": 4}],
}


def case(inside: str = "plain", engine: str = "ddp", model: dict[str, Any] = UNTIED, **fields: Any) -> Case:
    replicas = REPLICAS if "stages" in fields else [MICRO_BATCHES]
    return Case(recipe(engine=engine, **model), [{"name": "twobp", **fields}, *INSIDE[inside]], replicas)


def is_exact(ranks: Ranks, asked: Case, loss: reference.Loss = reference.sft) -> None:
    found = errors(ranks("twobp_cases:run", asked), truth(asked, loss))
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", NAMES)
def test_schedules_on_two_ranks(two_ranks: Ranks, name: str) -> None:
    is_exact(two_ranks, case(model=TIED, schedule=name))


@pytest.mark.parametrize("name", NAMES)
def test_schedules_on_four_ranks(four_ranks: Ranks, name: str) -> None:
    is_exact(four_ranks, case(model={"config_overrides": {"num_hidden_layers": 9}, "lora_r": 3}, schedule=name))


@pytest.mark.parametrize("model", [UNTIED, TIED, {"lora_r": 3}], ids=["full", "tied", "lora"])
@pytest.mark.parametrize("inside", [name for name in INSIDE if name != "plain"])
def test_what_runs_inside_stages(two_ranks: Ranks, inside: str, model: dict[str, Any]) -> None:
    is_exact(two_ranks, case(inside, model=model, schedule="1f1b+2bp"))


@pytest.mark.parametrize("inside", ["recompute", "full", "streambp"])
def test_what_runs_inside_two_stages_of_a_rank(two_ranks: Ranks, inside: str) -> None:
    is_exact(two_ranks, case(inside, model=TIED, schedule="v"))


@pytest.mark.parametrize(
    ("inside", "model"),
    [
        ("plain", UNTIED),
        ("plain", {"lora_r": 3}),
        *((inside, TIED) for inside in ("plain", "recompute", "streambp")),
        *(
            pytest.param(inside, model, marks=pytest.mark.slow)
            for inside in ("recompute", "streambp")
            for model in (UNTIED, {"lora_r": 3})
        ),
    ],
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_stages_in_two_replicas(four_ranks: Ranks, engine: str, inside: str, model: dict[str, Any]) -> None:
    is_exact(four_ranks, case(inside, engine, model, stages=2))


@pytest.mark.parametrize(("objective", "loss"), [(DPO(0.1, 0.2), dpo_loss), (GRPO(0.05, 0.2), grpo_loss)])
def test_other_objectives(two_ranks: Ranks, objective: strategies.Objective, loss: reference.Loss) -> None:
    batches = [with_references(batch) for batch in (ragged(1, [12, 9], 12), ragged(8, [8, 6], 8), ragged(9, [0, 0], 8))]
    asked = Case(recipe(), [{"name": "twobp"}], [batches], objective=objective)
    is_exact(two_ranks, asked, loss)


@pytest.mark.parametrize(("name", "bound"), [("few_bit", 0.2), ("approx_bp", 0.75)])
def test_approximations_inside_stages_keep_their_bound(two_ranks: Ranks, name: str, bound: float) -> None:
    asked = case(schedule="1f1b+2bp")
    asked = replace(asked, strategies=[*asked.strategies, {"name": name}])
    found = errors(two_ranks("twobp_cases:run", asked), truth(asked))
    assert EXACT < found["gradients"] < bound
    assert max(found["loss"], found["logprobs"]) < EXACT


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_half_precision_is_near(four_ranks: Ranks, engine: str) -> None:
    asked = case(engine=engine, stages=2)
    asked = replace(asked, recipe=recipe(engine=engine, bf16=True, **UNTIED), dtype=torch.float32)
    found = errors(four_ranks("twobp_cases:run", asked), truth(asked))
    assert found["gradients"] < 0.1
    assert found["norm"] < 0.01


@pytest.mark.parametrize("name", ["1f1b", "h1", "v"])
def test_by_torch(four_ranks: Ranks, name: str) -> None:
    replicas = [[ragged(seed, [12, 9], 12) for seed in seeds] for seeds in ((1, 2, 3, 4), (5, 6, 7, 8))]
    asked = replace(case(model=TIED, stages=2, schedule=name, runtime="torch"), per_replica=replicas)
    is_exact(four_ranks, asked)


@pytest.mark.parametrize(("inside", "products"), [("plain", 7), ("full", 7), ("streambp", 0)])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_weights_wait_but_inside_streaming_layers(two_ranks: Ranks, engine: str, inside: str, products: int) -> None:
    asked = case(inside, engine, schedule="gpipe+2bp", layers=[2, 3])
    first, second = (2 * products, 3 * products)
    assert two_ranks("twobp_cases:waited", asked) == [[first] * len(MICRO_BATCHES), [second] * len(MICRO_BATCHES)]


def test_recomputation_in_half_precision_is_that_of_plain(two_ranks: Ranks) -> None:
    half = recipe(bf16=True, lora_r=3, config_overrides={"attention_dropout": 0.3})
    asked = replace(case(schedule="1f1b+2bp"), recipe=half, dtype=torch.float32)
    right = two_ranks("twobp_cases:run", asked)
    for policy in ("full", "norms"):
        chosen = [*asked.strategies, {"name": "recompute", "policy": policy}]
        for one, other in zip(two_ranks("twobp_cases:run", replace(asked, strategies=chosen)), right, strict=True):
            assert one.loss == other.loss
            assert all(torch.equal(one.gradients[name], gradient) for name, gradient in other.gradients.items())


def test_layers_as_asked(two_ranks: Ranks) -> None:
    asked = case(layers=[1, 4])
    found = two_ranks("twobp_cases:run", asked)
    assert max(errors(found, truth(asked)).values()) < EXACT
    assert found[0].accounts["twobp"]["layers"] == [1, 4]
    own = [{name.split(".")[2] for name in one.gradients if ".layers." in name} for one in found]
    assert own == [{"0"}, {"1", "2", "3", "4"}]


def test_a_schedule_that_leaves_the_head_on_the_first_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "zigzag.csv"
    rows = [[], []]  # type: list[list[str]]
    for number in range(len(MICRO_BATCHES)):
        for stage in range(3):
            rows[stage % 2].append(f"{stage}F{number}")
        rows[0] += [f"2I{number}"]
        rows[1] += [f"1I{number}", f"1W{number}"]
        rows[0] += [f"0B{number}", f"2W{number}"]
    file.write_text("\n".join(",".join(row) for row in rows))
    is_exact(two_ranks, case(model=TIED, schedule=str(file)))
