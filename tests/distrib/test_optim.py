"""Schedules against values worked out by hand, groups, and the norm against torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_cases import gradients, make_engine, padded, ragged_rows, recipe
from torch import nn

from distrib.contracts import Context
from distrib.errors import NotFinite, Refused, UserError
from distrib.optim import OptimizerSpec, Schedule
from distrib.topology import Topology

SCHEDULES: list[tuple[Schedule, list[float]]] = [
    (Schedule(1.0, 4), [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    (Schedule(1.0, 4, kind="linear"), [1.0, 0.75, 0.5, 0.25]),
    (Schedule(0.3, 3, kind="constant"), [0.3, 0.3, 0.3]),
    (Schedule(1.0, 10, warmup=1, kind="warmup_stable_decay"), [1.0] * 9 + [0.5]),
    (Schedule(1.0, 20, warmup=2, kind="warmup_stable_decay"), [0.5, *[1.0] * 15, 1.0, 0.75, 0.5, 0.25]),
    (Schedule(1.0, 6, warmup=2), [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    (Schedule(1.0, 5, warmup=4, kind="linear"), [0.25, 0.5, 0.75, 1.0, 1.0]),
    (Schedule(1.0, 2, warmup=4, kind="constant"), [0.25, 0.5]),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(step) for step in range(schedule.steps)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay"])
def test_a_schedule_is_never_negative_past_its_end(kind: str) -> None:
    assert Schedule(1.0, 4, kind=kind)(9) == pytest.approx(0.0, abs=1e-15)


def test_weight_decay_leaves_vectors_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = OptimizerSpec(weight_decay=0.5).build(model.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        assert torch.equal(parameter.detach(), torch.full_like(parameter, expected)), name


def test_what_is_frozen_is_not_given_to_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = OptimizerSpec().build(model.named_parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model[1].parameters()}


def test_names_that_are_wrong_or_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.name='adamm': choose .*did you mean adam"):
        OptimizerSpec("adamm").build(nn.Linear(2, 2).named_parameters())
    with pytest.raises(Refused, match=r"optimizer.name='adafactor' looks at whole matrices"):
        OptimizerSpec("adafactor").check(sharded=True)
    OptimizerSpec("adafactor").check(sharded=False)


@pytest.mark.parametrize("share", [0.3, 2.0])
@pytest.mark.parametrize("tied", [True, False])
def test_clipping_is_torchs(share: float, tied: bool) -> None:
    """`share`: of the true norm that is allowed. A tied weight counts once."""
    made_from = recipe(config_overrides={"tie_word_embeddings": tied})
    batch = padded(ragged_rows())
    weight = float((batch["labels"] != -100).sum())
    grads = gradients(Topology(), made_from, torch.float64, [[batch]])
    copies = [nn.Parameter(torch.zeros_like(grad)) for grad in grads.values()]
    for copy, grad in zip(copies, grads.values(), strict=True):
        copy.grad = grad.clone()
    true = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads.values()])).item()
    torch.nn.utils.clip_grad_norm_(copies, share * true)

    engine, step = make_engine(Topology(), made_from, torch.float64)
    seen: list[torch.Tensor] = []
    held: Any = engine
    update = held.optimizer.step
    held.optimizer.step = lambda: (
        seen.extend(p.grad.clone() for p in engine.model.parameters() if p.grad is not None),
        update(),
    )
    step([batch], Context(seed=0, step=0, weight=weight))
    assert engine.step(0.0, share * true) == pytest.approx(true, rel=1e-12)
    for found, copy in zip(seen, copies, strict=True):
        assert copy.grad is not None
        assert torch.allclose(found, copy.grad, rtol=1e-12, atol=0)


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    engine, step = make_engine(Topology(), recipe(), torch.float64)
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    step([padded(ragged_rows())], Context(seed=0, step=0, weight=5.0))
    first = next(parameter for parameter in engine.model.parameters() if parameter.grad is not None)
    assert first.grad is not None
    first.grad.view(-1)[0] = float("inf")
    with pytest.raises(NotFinite, match="the gradient's norm is inf"):
        engine.step(1.0, 1.0)
    after = list(engine.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
