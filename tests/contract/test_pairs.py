"""Every pair of strategies: what the table says goes together passes the suite, with the weaker promise of the two; the
rest is refused, for reasons that are so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contract import reference
from contract.checks import CHECKS, Factory, listed, small

import strategies
from distrib.contracts import Context
from distrib.errors import Refused
from launch import compatibility
from strategies.core.compare import TOLERANCES, Promise, differences, kept_parts
from strategies.core.contract import is_exact, overrides
from strategies.core.truth import true_gradients

VERDICTS = compatibility.pairs()
PAIRS = list(itertools.combinations(strategies.names(), 2))
REFUSED = [pair for pair in PAIRS if VERDICTS[pair[0]][pair[1]] != compatibility.OK]
# Beside one that changes nothing another is alone, as `test_contract.py` has it.
TOGETHER = [pair for pair in PAIRS if pair not in REFUSED and "plain" not in pair]
HARDER: dict[str, dict[str, Any]] = {"recompute": {"policy": "full"}, "twobp": {"schedule": "v"}}
"""Where the fields that a strategy has by itself do little in one process."""
LIKELY = [
    ("approx_bp", "streambp"),
    ("few_bit", "recompute"),
    ("int4", "seco"),
    ("recompute", "seco"),
    ("streambp", "twobp"),
]
"""To break: edits under a step of another, two edits of one module, layers that run again."""
SHORT = ("gradients, full, accumulation", "gradients, lora, packing", "gradients, tied, dpo", "copies", "undoes")


def pair_of(pair: tuple[str, str], fields: Callable[[str], dict[str, Any]]) -> Factory:
    made = [partial(strategies.get(name), **fields(name)) for name in pair]
    return lambda: [one() for one in made]


def harder(name: str) -> dict[str, Any]:
    return {**small(name), **HARDER.get(name, {})}


def nearly_as_it_is(name: str) -> dict[str, Any]:
    """But for the chunk, and with less noise: few draws show then what is wrong."""
    chunk = {key: value for key, value in small(name).items() if key == "chunk"}
    return {**chunk, "p": 0.95} if name == "spaco" else chunk


def case(quick: bool, pair: tuple[str, str], *others: str) -> Any:
    return pytest.param(pair, *others, marks=() if quick else pytest.mark.slow, id=", ".join([*pair, *others]))


@pytest.mark.parametrize(
    ("pair", "check"),
    [case(pair in LIKELY and check in SHORT, pair, check) for pair in TOGETHER for check in CHECKS],
)
def test_a_pair_holds_what_one_does(pair: tuple[str, str], check: str) -> None:
    CHECKS[check](pair_of(pair, harder if pair in LIKELY else small))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("pair", [pair for pair in TOGETHER if HARDER.keys() & {*pair}], ids=", ".join)
def test_what_takes_other_paths(pair: tuple[str, str], check: str) -> None:
    CHECKS[check](pair_of(pair, small if pair in LIKELY else harder))


# As they are: estimates are right on average, and approximations within their bounds together.

ESTIMATES = [pair for pair in TOGETHER if not all(is_exact(strategies.get(name)()) for name in pair)]
QUICK = [("few_bit", "int4"), ("fp4", "spaco")]
CONTEXT = Context(seed=0, step=0, weight=20.0)


def off(factory: Factory, draws: int, times: int = 1) -> float:
    """How far the mean gradient of so many draws is from the true one, relative to what is right. The truth is of the
    forward as it is rounded, by autograd, without step, head or backward of the pair."""
    model = reference.tiny_model("full").train()
    batches = reference.cases()["one"]
    step = strategies.prepare(model, listed(factory))
    true_gradients(step.engine, step.objective, batches, CONTEXT)
    true = kept_parts(step.engine)
    step.engine.zero_grad()

    def run(draw: int) -> None:
        for _ in range(times):
            step(batches, replace(CONTEXT, step=draw))

    found = differences(step.engine, true, run, draws)
    together, each = found.ratios(Promise.of(step.strategies), TOLERANCES[torch.float64])
    return max(float(together), float(each.max()))


@pytest.mark.parametrize("pair", [case(pair in QUICK, pair) for pair in ESTIMATES])
def test_estimates_together_keep_their_promise(pair: tuple[str, str]) -> None:
    assert off(pair_of(pair, nearly_as_it_is), 12 if pair in QUICK else 64) < 1


@pytest.mark.parametrize("pair", QUICK, ids=", ".join)
def test_a_mean_that_is_off_would_be_noticed(pair: tuple[str, str]) -> None:
    assert off(pair_of(pair, nearly_as_it_is), 6, times=3) > 1


# What is refused.


def test_plain_changes_nothing() -> None:
    assert not any(overrides(strategies.get("plain")(), method) for method in ("edits", "step", "running", "drops"))


@pytest.mark.parametrize("pair", REFUSED, ids=", ".join)
def test_other_pairs_leave_a_model_alone(pair: tuple[str, str]) -> None:
    model = reference.tiny_model("full")
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    with pytest.raises(Refused) as refused:
        strategies.prepare(model, listed(pair_of(pair, nearly_as_it_is)))
    assert str(refused.value) == VERDICTS[pair[0]][pair[1]].removeprefix("refused: ")
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


@pytest.mark.parametrize("pair", [("recompute", "streambp"), ("approx_bp", "few_bit"), ("fp4", "int4")], ids=", ".join)
def test_claims_are_of_the_same_modules(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in pair:
        monkeypatch.setattr(strategies.get(name), "claims", frozenset())
    with pytest.raises(Refused, match=f"strategies {pair[0]} and {pair[1]} both wrap '"):
        strategies.prepare(reference.tiny_model("full"), listed(pair_of(pair, nearly_as_it_is)))


@pytest.mark.parametrize("executor", ["seco", "spaco", "spaco_published"])
def test_layers_would_not_stream_in_a_chunk(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.get("streambp"), "claims", frozenset())
    model = reference.tiny_model("full")
    strategies.prepare(model, listed(pair_of((executor, "streambp"), small)))(reference.cases()["one"])
    assert [vars(layer)["_ebbtide_block"].backwards for layer in model.model.layers] == [0, 0]
