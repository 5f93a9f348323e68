"""Edits as data: conflicts, names, copies, undo, and edits that had no effect."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import build
from torch import nn

import strategies
from distrib.errors import Refused
from strategies import NoMatch, Strategy
from strategies.core import edits
from strategies.core.edits import Drop, Swap, Wrap, base_name


class Doubling:
    def forward(self, x):
        return self.factor * super().forward(x)


class Tripling:
    def forward(self, x):
        return 3 * super().forward(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def halve(old):
    new = Halved(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    return new


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()


X = torch.ones(2, 3)
WRAP = Wrap("0", Doubling, {"factor": 2.0})


def test_swaps_before_wraps_and_undo():
    made = model()
    made[1].p = 0.0
    before, state = made(X), made.state_dict()
    modules = [(id(m), type(m), dict(vars(m))) for m in made.modules()]
    edits.apply(made, [("a", WRAP), ("b", Swap("0", halve)), ("c", Wrap("2", Tripling)), ("d", Drop("1"))])
    assert torch.allclose(made(X), 3 * before)
    assert made.state_dict().keys() == state.keys()
    assert isinstance(made[0], Halved)
    assert type(made[0]).__name__ == "Halved"
    assert isinstance(made[1], nn.Identity)
    edits.assert_ran(made)
    edits.undo(made)
    assert [(id(m), type(m), dict(vars(m))) for m in made.modules()] == modules
    assert torch.equal(made(X), before)


def test_bypassed_edits_run_as_before_and_are_as_they_were():
    made = model()
    made[1].p = 0.0
    before = made(X)
    edits.apply(made, [("a", WRAP), ("b", Swap("0", halve)), ("b", Swap("2", halve)), ("d", Drop("1"))])
    after, state = made(X), [dict(vars(m)) for m in made.modules()]
    for name in ("0", "2"):
        # As a sharding engine does, on the edited module alone.
        part = made.get_submodule(name)
        part._parameters["weight"] = nn.Parameter(2 * part.weight)
        part._parameters["bias"] = nn.Parameter(2 * part.bias)
    vars(made[2])[edits.SWAPPED].ran = False
    with edits.bypassed(made):
        wanted = nn.functional.linear(
            nn.functional.linear(X, made[0].weight, made[0].bias), made[2].weight, made[2].bias
        )
        assert torch.equal(made(X), wanted)
        assert "factor" not in vars(made[0])
    assert not torch.allclose(wanted, 4 * before)
    assert [dict(vars(m)) for m in made.modules()] == state
    with pytest.raises(RuntimeError, match="2 did not run as edited"):
        edits.assert_ran(made)
    assert not torch.equal(made(X), after)
    edits.undo(made)
    assert torch.equal(made(X), before)


def test_wraps_take_other_settings_for_a_while():
    made = model().eval()
    edits.apply(made, [("a", WRAP), ("b", Swap("2", halve))])
    once = made[0](X)
    with edits.resettled(made, "a", [Wrap("0", Doubling, {"factor": 4.0})]) as same:
        assert same
        assert torch.equal(made[0](X), 2 * once)
    assert torch.equal(made[0](X), once)
    for owner, others in (("a", []), ("a", [Wrap("2", Doubling, {"factor": 4.0})]), ("b", [Swap("2", halve)])):
        with edits.resettled(made, owner, others) as same:
            assert not same
            assert torch.equal(made[0](X), once)


def test_a_module_put_back_is_in_the_mode_of_the_one_it_replaces():
    made = model()
    edits.apply(made, [("a", Swap("0", halve))])
    made.eval()
    edits.undo(made)
    assert not made[0].training


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_their_edits(again):
    made = model().eval()
    edits.apply(made, [("a", WRAP), ("b", Swap("2", halve))])
    other = again(made)
    assert torch.equal(other(X), made(X))
    assert type(other[0]) is type(made[0])
    edits.undo(other)
    assert type(other[0]) is nn.Linear
    assert type(other[2]) is nn.Linear
    assert torch.equal(made(X), again(made)(X))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", WRAP), ("b", Wrap("0", Tripling))], "strategies a and b both wrap '0': use one of them"),
        ([("a", Swap("0", halve)), ("b", Drop("0"))], "strategies a and b both replace '0': use one of them"),
        ([("a", Wrap("shared", Tripling)), ("b", WRAP)], "strategies a and b both wrap '0'"),
        ([("a", Wrap("7", Tripling))], "strategy a: no module '7' in Sequential"),
        ([("a", Swap("", halve))], "strategy a: the model itself cannot be replaced; wrap it"),
        ([("a", Drop("0"))], "strategy a: replacing '0' would change its parameter names"),
        (
            [("a", Swap("0", lambda old: nn.Linear(3, 3)))],
            "strategy a: replacing '0' would lose its trainable",
        ),
        ([("a", Swap("0", lambda old: nn.Linear(3, 3, bias=False)))], "would change its parameter names"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(pairs, message):
    made = model()
    made.shared = made[0]
    classes = [type(m) for m in made.modules()]
    with pytest.raises((Refused, NoMatch), match=message.replace("(", r"\(")):
        edits.apply(made, [("first", Wrap("2", Tripling)), *pairs])
    assert [type(m) for m in made.modules()] == classes


def test_an_edited_module_is_not_edited_again():
    made = model()
    edits.apply(made, [("a", WRAP), ("a", Swap("2", halve))])
    for edit in (Wrap("0", Tripling), Swap("2", halve)):
        with pytest.raises(Refused, match="already edited by a: undo that first"):
            edits.apply(made, [("b", edit)])


def test_an_edit_that_was_bypassed_is_found():
    for edit in (WRAP, Swap("0", halve)):
        made = model()
        edits.apply(made, [("a", edit)])
        made[1:](X)
        with pytest.raises(RuntimeError, match="strategy a: 0 did not run as edited"):
            edits.assert_ran(made)
        made(X)
        edits.assert_ran(made)
    made = model()
    edits.apply(made, [("a", WRAP)])
    made[0].forward = lambda x: x
    made(X)
    with pytest.raises(RuntimeError, match="something replaced its forward"):
        edits.assert_ran(made)


def test_undo_after_another_change_of_class_is_refused():
    made = model()
    edits.apply(made, [("a", WRAP)])
    made[0].__class__ = type("Sharded", (type(made[0]),), {})
    with pytest.raises(Refused, match="0 was sharded or changed after its edit"):
        edits.undo(made)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        (
            "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
            "model.layers.0.q_proj.lora_A.weight",
        ),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("lm_head.original_module", "lm_head"),
    ],
)
def test_base_names(name, base):
    assert base_name(name) == base


@dataclass(frozen=True)
class Nothing(Strategy):
    def edits(self, model: Any, topology: Any) -> Any:
        return ()


@dataclass(frozen=True)
class Bypassed(Strategy):
    def edits(self, model: Any, topology: Any) -> Any:
        yield Wrap("model.layers.1.mlp", Tripling)


def test_a_strategy_without_effect_raises():
    with pytest.raises(NoMatch, match="strategy Nothing found nothing to change in LlamaForCausalLM"):
        strategies.prepare(build("llama"), [Nothing()])


def test_the_first_step_finds_a_bypassed_edit():
    made = build("llama")
    step = strategies.prepare(made, [Bypassed()])
    made.model.layers[1].mlp.forward = lambda x: x
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"strategy Bypassed: model\.layers\.1\.mlp did not run as edited"):
        step({"input_ids": ids, "labels": ids})
