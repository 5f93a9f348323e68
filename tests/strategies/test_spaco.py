"""SpaCO's estimate, by enumeration: every set of chunks that can be drawn, weighted by its probability."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import strategies
from distrib.contracts import Context
from strategies.streaming.draws import Published, Sticky, Taken

CHUNKS, WIDTH, VOCABULARY = 8, 6, 19
NONE_KEPT = [False] * CHUNKS
CONTEXT = Context(seed=0, step=0, weight=100.0)


def rows(seed, count):
    """The second half of a row repeats the first: what is learned reaches back through several chunks."""
    half = torch.randint(VOCABULARY, (count, CHUNKS * WIDTH // 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], 1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        ids = rows(step, 16)
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double()


@pytest.fixture(scope="module")
def batch():
    ids = rows(1000, 2)
    return {"input_ids": ids, "labels": ids}


def flat(model):
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture(scope="module")
def exact(trained, batch):
    model = copy.deepcopy(trained)
    logits = model(input_ids=batch["input_ids"]).logits
    (F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / 100).backward()
    return flat(model)


def probability(sticky, taken, must):
    """Of a draw, by the chain itself."""
    chance, later = 1.0, None
    for index in reversed(range(CHUNKS)):
        here = sticky.next_chance(must[index], later)
        chance *= here if taken[index] else 1 - here
        later = bool(taken[index])
    return chance


def enumerate_draws(model, batch, sticky, must, weigh):
    """(probability, gradient) of every set of chunks."""
    model = copy.deepcopy(model)
    prepared = strategies.prepare(model, [strategies.get("spaco")(chunk=WIDTH, p=sticky.p)])
    for taken in product((False, True), repeat=CHUNKS):
        chance = probability(sticky, taken, must)
        if chance == 0:
            continue
        model.zero_grad()
        prepared.step.draw = lambda *_, taken=taken: weigh(taken)
        prepared(batch, CONTEXT)
        yield chance, flat(model)


def moments(draws, exact):
    """Relative bias and standard deviation."""
    mean, square = torch.zeros_like(exact), 0.0
    for chance, gradient in draws:
        mean += chance * gradient
        square += chance * float((gradient - exact).square().sum())
    bias = float((mean - exact).norm() / exact.norm())
    return bias, math.sqrt(max(0.0, square / float(exact.square().sum()) - bias**2))


@pytest.mark.parametrize(("p", "kept"), [(0.5, ()), pytest.param(0.125, (), marks=pytest.mark.slow), (0.25, (2, 5))])
def test_the_mean_over_all_draws_is_the_gradient(trained, batch, exact, p, kept):
    sticky, must = Sticky(p), [index in kept for index in range(CHUNKS)]
    draws = enumerate_draws(trained, batch, sticky, must, lambda taken: sticky.weighted(taken, must))
    bias, std = moments(draws, exact)
    # Llama's norms compute in float32.
    assert bias < 1e-6
    if not kept:
        # Of independent chunks of one size it would be 1; what the model has learned depends on the processor.
        assert 0.7 < std / math.sqrt(1 / p - 1) < 1.6


def test_without_the_weights_of_pairs_the_mean_is_not_the_gradient(trained, batch, exact):
    sticky = Sticky(0.25)

    def weigh(taken):
        return [Taken(chunk.index, chunk.own) for chunk in sticky.weighted(taken, NONE_KEPT)]

    bias, _ = moments(enumerate_draws(trained, batch, sticky, NONE_KEPT, weigh), exact)
    assert bias > 1e-2


def test_draws_come_as_often_as_their_probability_says():
    sticky, must = Sticky(0.25), [False, True, *[False] * 6]
    draws = [{chunk.index for chunk in sticky(CHUNKS, must, Context(0, step, 1.0), 0)} for step in range(4000)]
    for index in range(CHUNKS):
        share = sum(index in drawn for drawn in draws) / len(draws)
        assert share == pytest.approx(sticky.chance(index, None, must), abs=0.03)
    pairs = [drawn for drawn in draws if 6 in drawn]
    assert sum(3 in drawn for drawn in pairs) / len(pairs) == pytest.approx(sticky.chance(3, 6, must), abs=0.06)


def test_answers_are_always_taken(trained, batch):
    labels = batch["labels"].clone()
    labels[:, :-WIDTH] = -100
    model = copy.deepcopy(trained)
    prepared = strategies.prepare(model, [strategies.get("spaco")(chunk=WIDTH, p=0.01, keep="answers")])
    reference = copy.deepcopy(trained)
    logits = reference(input_ids=batch["input_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    result = prepared({**batch, "labels": labels})
    # All that is learned is in chunks that are taken, so the loss is no estimate.
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_kept_by_number_from_either_end(trained, batch):
    strategy = strategies.get("spaco")(chunk=WIDTH, p=0.01, keep=[0, -1, 99])
    step = strategies.prepare(copy.deepcopy(trained), [strategy]).step
    assert step.must(step._chunked(batch)) == [True, *[False] * 6, True]


def test_published_weights_are_biased_and_say_so(trained, batch, exact):
    published = Published(0.5, scale_loss=False)
    drawn = published(CHUNKS, NONE_KEPT, CONTEXT, 0)
    assert len(drawn) == 4
    assert {(chunk.own, chunk.left) for chunk in drawn} == {(1.0, 2.0)}
    assert strategies.get("spaco_published").__doc__.startswith("BIASED.")
    assert strategies.get("spaco_published").fidelity is strategies.Fidelity.APPROXIMATE
    model, mean = copy.deepcopy(trained), torch.zeros_like(exact)
    prepared = strategies.prepare(model, [strategies.get("spaco_published")(chunk=WIDTH)])
    for step in range(40):
        model.zero_grad()
        prepared(batch, Context(0, step, 100.0))
        mean += flat(model) / 40
    # About half of the gradient, as its docstring says.
    assert 0.3 < float((mean - exact).norm() / exact.norm()) < 0.7


def test_nothing_drawn_still_leaves_a_gradient_of_zero(trained, batch):
    model = copy.deepcopy(trained)
    prepared = strategies.prepare(model, [strategies.get("spaco")(chunk=WIDTH, p=0.5)])
    prepared.step.draw = lambda *_: []
    result = prepared(batch)
    assert float(result.loss) == 0
    assert float(flat(model).abs().max()) == 0


@pytest.mark.parametrize("setting", [{"p": 0.0}, {"p": 1.5}, {"chunk": 0}])
def test_settings_that_make_no_sense(setting):
    with pytest.raises(ValueError, match=r"^(p|chunk)="):
        strategies.get("spaco")(**setting)
