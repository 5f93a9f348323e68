"""Preparing a model from Python: in whose hands it is, before and after PEFT, and what is said when it is
wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, build
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import strategies
from distrib.contracts import Context
from distrib.engines.local import Local
from distrib.errors import Refused, UserError
from distrib.topology import Topology
from strategies.core.edits import original_class

PLAIN = [strategies.get("plain")()]


def batch():
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def adapters(**more):
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more)


def reference_gradients(model):
    model.zero_grad()
    logits = model(input_ids=batch()["input_ids"]).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, batch()["labels"][:, 1:].flatten()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(model, wanted):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items()) < 1e-12


@pytest.mark.parametrize("order", ["peft first", "prepare first"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_before_and_after(order, saved):
    """`modules_to_save` trains a copy of the head beside the adapters."""
    model = build("llama")
    strategies.prepare(model, PLAIN) if order == "prepare first" else None
    torch.manual_seed(2)
    model = get_peft_model(model, adapters(modules_to_save=saved)).double()
    step = strategies.prepare(model, PLAIN)
    wanted = reference_gradients(model)
    assert any("modules_to_save" in name for name in wanted) is bool(saved)
    step(batch())
    assert_same_gradients(model, wanted)
    model.zero_grad()
    model(**batch()).loss.backward()
    assert_same_gradients(model, wanted)
    with model.disable_adapter(), torch.no_grad():
        base = model(**batch()).loss
        logits = model(input_ids=batch()["input_ids"]).logits[:, :-1].flatten(0, 1)
    assert abs(base - F.cross_entropy(logits, batch()["labels"][:, 1:].flatten())) < 1e-12
    step.undo()
    assert all(original_class(m) is type(m) for m in model.modules())
    assert type(model.get_base_model()) is LlamaForCausalLM


def test_adapters_on_the_head_are_refused_before_and_after():
    config = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(
        Refused,
        match=r"output head is peft's Linear: only a plain nn\.Linear is exact \(take LoRA off the head\)",
    ):
        strategies.prepare(get_peft_model(build("llama"), config), PLAIN)
    model = build("llama")
    strategies.prepare(model, PLAIN)
    model = get_peft_model(model, config)
    with pytest.raises(Refused, match="the output head became peft's Linear after `prepare`"):
        model(**batch())


def test_saved_models_name_their_architecture(tmp_path):
    model = build("llama")
    strategies.prepare(model, PLAIN)(batch())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert type(loaded) is LlamaForCausalLM
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_meta_models_are_edited_before_they_have_weights():
    with torch.device("meta"):
        model = build("gemma2")
    strategies.edit(model, PLAIN, Topology(world=2))
    assert all(p.is_meta for p in model.parameters())
    assert model._ebbtide_identity is False


def test_an_engine_gets_a_model_that_was_edited():
    model = build("llama")
    with pytest.raises(Refused, match=r"call strategies\.edit before making the engine"):
        strategies.prepare(model, PLAIN, engine=Local(model))
    strategies.edit(model, PLAIN)
    step = strategies.prepare(model, PLAIN, engine=Local(model))
    wanted = reference_gradients(model)
    step([batch()], Context(seed=0, step=0, weight=strategies.SFT().weight(batch())))
    assert_same_gradients(model, wanted)
    assert {name for name, _, placement in step.engine.gradients()} == set(wanted)
    strategies.undo(model)
    assert type(model) is LlamaForCausalLM


def test_extras_reach_the_objective_untouched():
    seen = {}

    class Recording(strategies.SFT):
        def __call__(self, stats, batch):
            seen.update(batch)
            return super().__call__(stats, batch)

    given = {**batch(), "advantages": torch.rand(2).float(), "reference_logprobs": torch.rand(2, 7).double()}
    strategies.prepare(build("llama"), PLAIN, Recording())(given)
    assert seen.keys() == {"labels", "advantages", "reference_logprobs"}
    assert all(seen[name] is given[name] for name in seen)


def test_autocast_is_the_loops_own():
    model = build("llama").float()
    step = strategies.prepare(model, PLAIN)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    step(batch())
    with torch.autocast("cpu", torch.bfloat16):
        step(batch())
        step.logprobs(batch())
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_what_is_wrong_is_said():
    step = strategies.prepare(build("llama"), PLAIN)
    nothing = {**batch(), "labels": torch.full((2, 7), -100)}
    with pytest.raises(UserError, match="no loss tokens: every label of the global batch is -100"):
        step(nothing)
    step.engine.topology = Topology(world=2)
    with pytest.raises(UserError, match="a step over several ranks needs a Context"):
        step(batch())


def test_a_prepared_copy_trains_apart():
    model = build("llama")
    step = strategies.prepare(model, PLAIN)
    other = copy.deepcopy(model)
    wanted = reference_gradients(model)
    strategies.prepare(other, PLAIN)(batch())
    assert all(p.grad is None for p in model.parameters())
    assert_same_gradients(other, wanted)
    step(batch())
    assert_same_gradients(model, wanted)
