"""Weight gradients that wait: none is there before they run, and then they are those of plain autograd."""

from __future__ import annotations

import copy

import all_families
import families
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import strategies
from strategies.pipelining.store import Store

EXACT, SINGLE = 1e-12, 1e-5
GROUPED = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def loss(model):
    ids = torch.randint(1, families.VOCABULARY - 1, (2, 11), generator=torch.Generator().manual_seed(5))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def plain_gradients(model):
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def deferred(model):
    """Names of the parameters that have no gradient between a backward and what waits of it."""
    store = Store()
    with store:
        found = loss(model)
    with store, store.deferring("one"):
        found.backward()
    waiting = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    store.run("one")
    return waiting


def compare(model, truth, allowed):
    largest = max(x.norm() for x in truth.values())
    for name, right in truth.items():
        error = (model.get_parameter(name).grad - right).norm()
        assert error <= allowed * max(right.norm(), 1e-3 * largest), name


def products(model):
    """Of weights with two dimensions or, for experts, three."""
    return {name for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name and "bias" not in name}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_every_product_waits_and_is_exact(family):
    model = all_families.build(family)
    truth = plain_gradients(copy.deepcopy(model))
    assert deferred(model) == products(model)
    compare(model, truth, EXACT)


@pytest.mark.parametrize("fallback", [False, True], ids=["torch", "transformers"])
@pytest.mark.parametrize("family", GROUPED)
def test_the_grouped_product_of_experts_waits(monkeypatch, family, fallback):
    if fallback:
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    model = all_families.build(family)
    truth = plain_gradients(copy.deepcopy(model))
    model.float()
    model.set_experts_implementation("grouped_mm")
    experts = {name for name in products(model) if model.get_parameter(name).ndim == 3}
    assert experts
    assert deferred(model) >= experts
    compare(model, truth, SINGLE)


def test_gradients_of_two_micro_batches_add_up():
    model = all_families.build("qwen3_moe")
    truth = {name: 2 * x for name, x in plain_gradients(copy.deepcopy(model)).items()}
    deferred(model)
    deferred(model)
    compare(model, truth, EXACT)


def test_a_weight_in_several_places_gets_the_sum():
    model = all_families.build("qwen3_moe", tie_word_embeddings=True)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    truth = plain_gradients(copy.deepcopy(model))
    assert "model.embed_tokens.weight" not in deferred(model), "the embedding's own part is there at once"
    compare(model, truth, EXACT)


def test_adapters_wait_and_frozen_weights_get_nothing():
    model = get_peft_model(all_families.build("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    truth = plain_gradients(copy.deepcopy(model))
    assert deferred(model) == truth.keys()
    assert all("lora" in name for name in truth)
    compare(model, truth, EXACT)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("fields", [{"policy": "full"}, {}], ids=["full", "default"])
def test_what_is_run_again_for_its_backward_waits_as_well(fields):
    model = all_families.build("qwen3_moe")
    truth = plain_gradients(copy.deepcopy(model))
    strategies.edit(model, [strategies.get("recompute")(**fields)])
    assert deferred(model) == products(model)
    compare(model, truth, EXACT)


def test_outside_of_deferring_nothing_waits():
    model = all_families.build("mixtral")
    truth = plain_gradients(copy.deepcopy(model))
    with Store():
        loss(model).backward()
    compare(model, truth, EXACT)
