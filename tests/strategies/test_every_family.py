"""Strategies that run in chunks on every causal language model type that Transformers has: exact, or refused."""

from __future__ import annotations

import copy

import all_families
import families
import pytest
import sweep
import torch
import torch.nn.functional as F

import strategies
from distrib.errors import Refused

SOME = ("llama", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3")
HYBRID = ("mamba", "falcon_h1")


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, families.VOCABULARY, (2, 19), generator=generator)
    labels = ids.clone()
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels}


def plain_gradients(model):
    given = batch()
    logits = model(input_ids=given["input_ids"], use_cache=False).logits[:, :-1].double()
    F.cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", [*SOME, *HYBRID])
@pytest.mark.parametrize("name", sweep.NAMES)
def test_gradients_are_those_of_plain_autograd(name, family):
    model = families.build(family)
    truth = plain_gradients(copy.deepcopy(model))
    step = strategies.prepare(model, [strategies.get(name)(chunk=4)])
    if name == "seco" and family in HYBRID:
        with pytest.raises(Refused, match=r"layers .* cannot run in chunks: it"):
            step(batch())
        return
    step(batch())
    largest = max(x.norm() for x in truth.values())
    for parameter, right in truth.items():
        error = (model.get_parameter(parameter).grad - right).norm()
        if families.FAMILIES[family][1] == families.EXACT:
            assert error <= 1e-12 * max(right.norm(), 1e-3 * largest), parameter
        else:
            assert error <= 1e-6 * largest, parameter
    blocks = [vars(x)["_ebbtide_block"] for x in model.modules() if "_ebbtide_block" in vars(x)]
    assert all((block.layout.whole is not None) == (family in HYBRID) for block in blocks)
    assert all(block.backwards == 1 for block in blocks)


class Aside(torch.nn.Module):
    """A layer that leaves something on itself for the next one: not among its arguments, and it carries gradient."""

    def __init__(self, layer, before):
        super().__init__()
        self.layer, self.before = layer, [before]

    def forward(self, hidden_states, **others):
        self.left = hidden_states.sin()
        before = self.before[0]
        given = hidden_states if before is None else hidden_states + before.left
        # A sum over positions, so that it runs whole and is right by itself.
        return self.layer(given + given.cumsum(1) / 9, **others)


def test_what_layers_share_beside_their_arguments_is_refused():
    model = families.build("llama")
    model.model._no_split_modules = model._no_split_modules = ["Aside"]
    before = None
    for index, layer in enumerate(list(model.model.layers)):
        before = model.model.layers[index] = Aside(layer, before)
    step = strategies.prepare(model, [strategies.get("streambp")(chunk=4)])
    with pytest.raises(Refused, match="LlamaModel gives its embedding another gradient in chunks"):
        step(batch())


def test_experts_that_see_the_whole_sequence_do_not_run_in_chunks():
    model = all_families.build("doge", is_moe=True)
    with pytest.raises(Refused, match=r"2 of 2 layers \(DogeDecoderLayer\) cannot run in chunks"):
        strategies.prepare(model, [strategies.get("seco")(chunk=4)])(sweep.make_batch("prompt"))


@pytest.mark.parametrize("model_type", all_families.NOT_TEXT)
def test_what_is_no_text_model_is_refused_by_its_configuration(model_type):
    from transformers import AutoConfig

    from distrib.topology import Topology

    if model_type == "gemma4_assistant":
        pytest.skip("its default configuration does not build")
    with pytest.raises(Refused, match=f"model type '{model_type}'.*only decoder-only text models train"):
        strategies.check([strategies.get("plain")()], AutoConfig.for_model(model_type), Topology())


def test_the_page_has_every_type_and_enough_that_are_exact():
    page = sweep.committed()
    assert set(page) >= set(all_families.TYPES)
    assert sum(words[0] == "exact" for words in page.values()) >= 80
    assert sum(words[3] == "exact" for words in page.values()) >= 60
    assert {word for words in page.values() for word in words} <= {"exact", "refused", "no number"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_families.TYPES)
def test_every_type_is_exact_or_refused_as_the_page_says(model_type):
    row = sweep.row(model_type)
    now, page = [row[i] for i in sweep.WORDS], sweep.committed()[model_type]
    assert "WRONG" not in now, row
    assert now == page, f"{row}: if that is meant, write docs/families.md anew"


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"policy": "full"}, {"policy": "auto", "budget": 0.4}], ids=["full", "auto"])
@pytest.mark.parametrize("model_type", [name for name in all_families.TYPES if name not in all_families.NOT_TEXT])
def test_every_type_runs_again_as_it_ran(model_type, fields):
    try:
        all_families.build(model_type)
    except Refused:
        return
    truth = sweep.true_gradients(model_type, "prompt")
    verdict = sweep.measure(model_type, strategies.get("recompute")(**fields), "prompt", truth)
    assert verdict.word == "exact" or "budget" in verdict.why, verdict
