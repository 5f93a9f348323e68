"""Sides of a comparison: how they are written, and that the baselines have the gradient of the strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import strategies
from distrib.errors import UserError
from distrib.topology import Topology
from distrib.units import units
from launch import sides
from launch.models import Weights, build, load_config
from launch.recipe import Recipe


def test_sides_are_strategies_with_fields() -> None:
    assert sides.sides_of("gc+ce,spaco:keep=[0,3]:p=0.5,seco") == ["gc+ce", "spaco:keep=[0,3]:p=0.5", "seco"]
    assert sides.section("spaco:keep=[0,3]:p=0.5") == {"name": "spaco", "keep": [0, 3], "p": 0.5}
    assert sides.section("streambp:offload=true") == {"name": "streambp", "offload": True}


@pytest.mark.parametrize("side", ["plain", "spaco:keep=[0, 3]:p=0.5", "streambp:chunk=auto+other:lr=1.0e-07"])
def test_a_section_is_written_as_it_is_read(side: str) -> None:
    assert sides.side_of(sides.sections(side)) == side


def test_a_field_that_is_a_mapping_comes_back() -> None:
    given = [{"name": "int4", "rules": {"*.down_proj": "fp8", "model.layers.0.*": "plain"}}, {"name": "recompute"}]
    side = sides.side_of(given)
    assert sides.sections(side) == given
    assert sides.sides_of(f"plain,{side},seco") == ["plain", side, "seco"]


@pytest.mark.parametrize("side", ["plain:", "streambp:chunk"])
def test_a_field_without_a_value_is_said(side: str) -> None:
    with pytest.raises(UserError, match="write name:field=value"):
        sides.section(side)


def gradients(side: str, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    recipe = Recipe(config_overrides={"num_hidden_layers": 2})
    config = load_config(recipe)
    model: Any = build(recipe, config)
    weights = Weights(recipe, config, Topology())
    for name, _ in units(model):
        weights.fill(model, name)
    step = sides.prepare(side, model.double())
    step(batches)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", sides.BASELINES)
def test_baselines_have_the_gradient_of_plain_over_a_global_batch(side: str) -> None:
    ids = torch.arange(64).view(4, 16) * 3
    labels = ids.clone()
    labels[0, :9] = -100
    batches = [{"input_ids": ids[at : at + 2], "labels": labels[at : at + 2]} for at in (0, 2)]
    truth = gradients("plain", batches)
    for name, gradient in gradients(side, batches).items():
        # Transformers makes its loss in float32, whatever the model's precision.
        assert (gradient - truth[name]).norm() < 1e-6 * truth[name].norm()


def test_whole_logits_train_sft_only() -> None:
    with pytest.raises(UserError, match="only objective=sft"):
        sides.prepare("gc", torch.nn.Module(), strategies.DPO(), engine=object())  # type: ignore[arg-type]
