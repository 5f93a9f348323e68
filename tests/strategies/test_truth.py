"""The truth of verify is the gradient of the model before its edits, by the reference of the contract suite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract import reference
from contract.checks import dpo_loss, gradients_of, grpo_loss, small, with_references
from engine_cases import padded, ragged_rows, recipe
from engine_cases import reference as autograd
from ranks import Ranks
from torch import nn
from train_cases import ENGINES
from verify_cases import EveryEdit

import strategies
from distrib.contracts import Context
from distrib.engines.local import Local
from strategies.core.truth import rounded_otherwise, statistics, true_gradients, without_dropout

OBJECTIVES: dict[str, Any] = {
    "sft": (strategies.SFT(), reference.sft, None, lambda batch: batch),
    "dpo": (strategies.DPO(beta=0.1, label_smoothing=0.2), dpo_loss, 1.0, with_references),
    "grpo": (strategies.GRPO(beta=0.05, clip=0.2), grpo_loss, 2.0, with_references),
}


def edited(kind: str, name: str) -> nn.Module:
    model = reference.tiny_model(kind)
    chosen = EveryEdit() if name == "every edit" else strategies.get(name)(**small(name))
    strategies.edit(model, [chosen])
    return model


@pytest.mark.parametrize(("kind", "objective"), [("tied", "sft"), ("lora", "sft"), ("tied", "dpo"), ("lora", "grpo")])
@pytest.mark.parametrize("name", ["every edit", *strategies.names()])
def test_the_truth_is_the_unedited_models(name: str, kind: str, objective: str) -> None:
    if name == "every edit" and kind == "lora":
        pytest.skip("its swap knows plain linear layers only")
    asked, loss, weight, annotate = OBJECTIVES[objective]
    for case in ("partial window",) if objective != "sft" else ("accumulation", "packing", "masked padding"):
        batches = [annotate(batch) for batch in reference.cases()[case]]
        wanted = reference.truth(reference.tiny_model(kind), batches, loss, weight)
        model = edited(kind, name)
        total = weight or sum(asked.weight(batch) for batch in batches)
        found = true_gradients(Local(model), asked, batches, Context(0, 0, total))
        assert reference.difference(gradients_of(model), wanted.gradients) < 1e-12
        assert abs(found - wanted.loss) < 1e-12 * abs(wanted.loss)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_truth_under_every_engine(two_ranks: Ranks, engine: str) -> None:
    made_from = recipe(engine=ENGINES[engine])
    # The reference turns rotary frequencies into float64 too, which no engine does.
    dtype, bound = (torch.float32, 2e-6) if engine.startswith("zero") else (torch.float64, 2e-7)
    rows = ragged_rows(4)
    per_rank = [[padded(rows[:1]), padded(rows[1:2])], [padded(rows[2:3]), padded(rows[3:])]]
    learned = sum(len(tokens) - prompt for tokens, prompt in rows)
    wanted = {name: g * learned / 40.0 for name, g in autograd(made_from, rows, dtype).items()}
    for true, wrong, again in two_ranks("verify_cases:true_and_edited", made_from, dtype, per_rank):
        assert true.keys() == wanted.keys()
        for found in (true, again):
            assert max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted) < bound
        assert max(float((wrong[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted) > 0.1


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "zero", "stage": 1, "offload": True},
        {"name": "zero", "stage": 2, "offload": True},
        {"name": "zero", "stage": 3, "offload": True},
    ],
)
def test_cleared_gradients_of_zero_are_gone(two_ranks: Ranks, engine: dict[str, Any]) -> None:
    rows = ragged_rows(4)
    per_rank = [[padded(rows[:1]), padded(rows[1:2])], [padded(rows[2:3]), padded(rows[3:])]]
    for bf16 in (False, True):
        made_from = recipe(engine=engine, bf16=bf16)
        for true, _, again in two_ranks("verify_cases:true_and_edited", made_from, torch.float32, per_rank):
            assert all(torch.equal(true[name], again[name]) for name in true)


def test_statistics_by_hand() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = statistics(logits, torch.tensor([[4, 2, -100], [-100, -100, 3]]))
    p = torch.stack([logits[0, 0], logits[1, 1]]).softmax(-1)
    assert found.token_n.tolist() == [1, 5]
    assert found.lengths_B.tolist() == [1, 1]
    assert torch.allclose(found.logprob_n.exp(), torch.stack([p[0, 2], p[1, 3]]))
    assert torch.allclose(found.entropy_n, -(p * p.log()).sum(-1))
    assert torch.allclose(found.mean_logprob_n, p.log().mean(-1))
    assert torch.allclose(found.logsumexp_n, torch.stack([logits[0, 0], logits[1, 1]]).exp().sum(-1).log())


def test_dropout_is_off_in_training_mode_and_on_again() -> None:
    model = reference.tiny_model("full", dropout=0.3).eval()
    model.extra = nn.Dropout(0.5)
    model.model.layers[0].train()
    modes = [part.training for part in model.modules()]
    before = copy.deepcopy([{k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()])
    with without_dropout(model):
        assert all(part.training for part in model.modules())
        ids = torch.arange(8)[None]
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(model.extra(torch.ones(9)), torch.ones(9))
    assert [part.training for part in model.modules()] == modes
    assert [{k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()] == before
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_roundings_of_the_embeddings_are_small_and_leave_nothing() -> None:
    model = reference.tiny_model("tied").requires_grad_(False)
    ids = torch.arange(8)[None]
    wanted = model(input_ids=ids).logits
    with rounded_otherwise(model, torch.bfloat16, 1):
        moved = model(input_ids=ids).logits
    assert 1e-4 < float((moved - wanted).norm() / wanted.norm()) < 1e-1
    assert torch.equal(model(input_ids=ids).logits, wanted)
