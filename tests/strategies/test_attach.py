"""A bare loop under `attach`: gradients of any loss against autograd in float64, what is drawn at random, what is
refused; and what a trainer hands to strategies around its steps."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import VOCABULARY, build
from loop_cases import STRATEGIES, trainer_of
from transformers import DynamicCache

import strategies
from distrib.errors import Refused
from distrib.topology import Topology
from strategies import Strategy
from strategies.loops.attach import CarriedBackbone

SECO = [strategies.get("seco")(chunk=4)]


def ids(rows=2, length=13):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def padded():
    """The first row begins late, the second ends early."""
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = mask[1, 9:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def packed():
    return {"input_ids": ids(), "position_ids": torch.cat([torch.arange(6), torch.arange(7)]).repeat(2, 1)}


BATCHES = {"whole": {"input_ids": ids()}, "padded": padded(), "packed": packed()}


def own_loss(model, batch):
    """No sum over tokens, and not of log-probabilities alone."""
    # With a cache, Transformers does not keep packed documents apart.
    logits = model(**batch, use_cache=False).logits
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, :, None]
    logprobs = (logits * seen).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs * seen).sum()
    scores = logprobs.gather(2, batch["input_ids"][:, :, None])[:, :, 0].sum(1)
    return torch.tanh((scores[0] - scores[1]) / 20) + 0.01 * entropy


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, wanted, near=1e-10):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= near * gradient.norm(), name


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_any_loss_of_a_bare_loop(shape, name):
    plain, model = build("llama"), build("llama")
    fields = {**STRATEGIES[name], **({"chunk": 4} if "chunk" in STRATEGIES[name] else {})}
    attached = strategies.attach(model, [strategies.get(name)(**fields)])
    for each in (plain, model):
        for _ in range(2):
            loss = own_loss(each, BATCHES[shape])
            (3 * loss).backward()
    assert_equal(gradients(model), gradients(plain))
    attached.assert_ran()
    assert (attached.carrier is None) == (name in ("plain", "recompute", "streambp"))
    assert attached.carrier is None or attached.carrier.backwards == 2


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma2"])
def test_other_families(family):
    plain, model = build(family), build(family)
    strategies.attach(model, SECO)
    for each in (plain, model):
        own_loss(each, BATCHES["whole"]).backward()
    assert_equal(gradients(model), gradients(plain), near=1e-5)


def test_labels_go_to_the_head_that_makes_no_logits():
    plain, model = build("llama"), build("llama")
    strategies.attach(model, SECO)
    for each in (plain, model):
        each(input_ids=ids(), labels=ids()).loss.backward()
    # Transformers' own loss is in float32.
    assert_equal(gradients(model), gradients(plain), near=1e-5)


def test_nothing_of_the_layers_waits_for_the_backward():
    kept = []
    for chosen in (None, SECO):
        model, noted = build("llama"), {}
        if chosen:
            strategies.attach(model, chosen)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, n=noted: n.update({x.data_ptr(): x.numel()}), id):
            model(input_ids=ids(4, 40), use_cache=False).logits.sum()
        kept.append(sum(noted.values()) - sum(p.numel() for p in model.parameters() if p.data_ptr() in noted))
    assert kept[1] == ids(4, 40).numel() * 32, "the final hidden states, for the head's own gradient"
    assert kept[0] > 10 * kept[1]


@pytest.mark.parametrize("name", ["seco", "twobp"])
def test_a_head_alone_may_be_trained(name):
    pair = [build("llama", tie_word_embeddings=False) for _ in range(2)]
    strategies.attach(pair[1], [strategies.get(name)(**STRATEGIES[name])])
    for model in pair:
        model.model.requires_grad_(False)
        own_loss(model, BATCHES["whole"]).backward()
    assert gradients(pair[0]).keys() == {"lm_head.weight"}
    assert_equal(gradients(pair[1]), gradients(pair[0]))


def test_dropout_is_drawn_as_the_loop_would_and_drawn_again_in_the_backward():
    pair = [build("gpt2", resid_pdrop=0.3, embd_pdrop=0.3) for _ in range(2)]
    strategies.attach(pair[1], [strategies.get("seco")(chunk=16)])
    found = []
    for model in pair:
        torch.manual_seed(8)
        loss = own_loss(model, BATCHES["whole"])
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        found.append((loss, gradients(model), state))
    (wanted, right, state), (loss, gradient, own_state) = found
    assert torch.equal(state, own_state)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert_equal(gradient, right)


@pytest.mark.slow
def test_a_part_of_the_chunks_gives_the_gradient_in_expectation():
    plain, model = build("llama"), build("llama")
    attached = strategies.attach(model, [strategies.get("spaco")(chunk=4, p=0.5)])
    own_loss(plain, BATCHES["whole"]).backward()
    right = torch.cat([g.flatten() for g in gradients(plain).values()])
    draws = []
    for _ in range(100):
        model.zero_grad()
        own_loss(model, BATCHES["whole"]).backward()
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    drawn = torch.stack(draws)
    assert attached.carrier.backwards == 100
    assert drawn.std(0).norm() > 0.1 * right.norm(), "every chunk was taken"
    assert (drawn.mean(0) - right).norm() < 4 * drawn.std(0).norm() / 100**0.5


def test_what_must_be_taken_is_what_the_loss_reads():
    model = build("llama")
    strategies.attach(model, [strategies.get("spaco")(chunk=4, p=1e-6, keep="answers")])
    plain = build("llama")
    for each in (plain, model):
        # The first chunk alone: nothing comes through others.
        each(input_ids=ids()).logits[:, 1].sum().backward()
    assert_equal(gradients(model), gradients(plain), near=1e-9)


def test_undo_and_a_second_attach():
    model = build("llama")
    kind = type(model.model)
    first = strategies.attach(model, SECO)
    again = strategies.attach(model, SECO)
    assert again.carrier is first.carrier
    with pytest.raises(Refused, match="already prepared for seco"):
        strategies.attach(model, [strategies.get("seco")(chunk=8)])
    first.undo()
    assert type(model.model) is kind
    strategies.attach(model, [strategies.get("streambp")(chunk=4)])


def test_a_loop_that_goes_around_it_is_told():
    model = build("llama")
    attached = strategies.attach(model, SECO)
    with pytest.raises(RuntimeError, match="did not run as edited"):
        attached.assert_ran()
    model(input_ids=ids(), past_key_values=DynamicCache()).logits.sum().backward()
    with pytest.raises(RuntimeError, match="strategy seco: the loop's first step did not go through it"):
        attached.assert_ran()
    loss = model(input_ids=ids()).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


@dataclass(frozen=True)
class Whole(Strategy):
    """A step that cannot be halved."""

    def step(self, model, engine, objective):
        return lambda batches, context: None


def test_what_a_bare_loop_cannot_have_is_refused_at_once():
    several = Topology(world=2)
    refused = [
        (SECO, several, "strategy seco with 2 processes: it runs the backward itself"),
        ([strategies.get("twobp")()], several, "strategy twobp with 2 processes"),
        ([strategies.get("twobp")(stages=2)], Topology(), "strategy.stages=2 with 1 ranks"),
        ([Whole()], Topology(), "strategy Whole runs whole steps only"),
        ([*SECO, strategies.get("streambp")()], Topology(), "strategies seco and streambp both cut the sequence"),
    ]
    model = build("llama")
    before = {name: type(part) for name, part in model.named_modules()}
    for chosen, topology, why in refused:
        with pytest.raises(Refused, match=why):
            strategies.attach(model, chosen, topology)
        assert {name: type(part) for name, part in model.named_modules()} == before


def test_arguments_that_chunks_cannot_follow_are_refused():
    model = build("llama")
    strategies.attach(model, SECO)
    embeds = model.get_input_embeddings()(ids())
    with pytest.raises(Refused, match="inputs_embeds with strategy seco"):
        model(inputs_embeds=embeds)
    with pytest.raises(Refused, match="attention_mask of more than two dimensions"):
        model(input_ids=ids(), attention_mask=torch.zeros(2, 1, 13, 13, dtype=torch.double))
    with pytest.raises(Refused, match="output_hidden_states with strategy seco"):
        model(input_ids=ids(), output_hidden_states=True)


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(Refused, match="strategy seco with PROMPT_TUNING"):
        strategies.attach(model, SECO)


REFUSED = {
    "fp16": ({"fp16": True}, "fp16=True: gradients underflow"),
    "compiled": ({"torch_compile": True}, "torch_compile=True with strategy seco"),
    "within the backward": ({"optim": "lomo"}, "optim='lomo' with strategy seco"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_trainer_cannot_have_is_refused_before_training(tmp_path, case):
    changes, why = REFUSED[case]
    with pytest.raises(Refused, match=why):
        trainer_of("trainer", tmp_path, SECO, **changes)


@dataclass(frozen=True)
class Noting(Strategy):
    """Keeps when its steps were."""

    noted: ClassVar[list] = []
    restored: ClassVar[list] = []

    @contextmanager
    def running(self, model, context):
        self.noted.append((context.step, context.steps))
        yield
        self.noted.append("end")

    def state(self, model):
        return {"steps": len(self.noted)}

    def restore(self, model, state):
        self.restored.append(state)


def test_a_window_of_micro_batches_is_one_step_and_checkpoints_keep_what_strategies_remember(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer = trainer_of("trainer", tmp_path, [Noting(), *SECO], **changes)
    trainer.train()
    assert [x for x in Noting.noted if x != "end"] == [(step, 3) for step in range(3)]
    assert Noting.noted[1::2] == ["end"] * 3
    assert trainer.attached.carrier.forwards == 2
    going_on = trainer_of("trainer", tmp_path, [Noting(), *SECO], **changes)
    going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Noting.restored == [{"steps": 4}]
    for a, b in zip(trainer.model.parameters(), going_on.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_of_it_is_left_in_a_saved_model(tmp_path):
    model = build("llama")
    strategies.attach(model, SECO)
    assert isinstance(model.model, CarriedBackbone)
    model.save_pretrained(tmp_path)
    assert "ebbtide" not in (tmp_path / "config.json").read_text()
