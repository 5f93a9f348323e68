"""The head on the families of Transformers: scaled, capped, biased, tied, mixtures of experts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VOCABULARY, build

import strategies
from distrib.errors import Refused

# Their Transformers code builds no mask between documents, or has a state that crosses them.
LEAKING = {"gpt_oss": "GptOss", "mamba": "Mamba", "falcon_h1": "FalconH1"}
PLAIN = [strategies.get("plain")()]


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "labels": labels}


def plain_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def compare(model, reference, allowed):
    for (name, found), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        if right.grad is None:
            assert found.grad is None or not found.grad.any(), name
        else:
            assert (found.grad - right.grad).abs().max() <= allowed * right.grad.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_logits(family):
    reference = build(family)
    model = copy.deepcopy(reference)
    allowed = FAMILIES[family][1]
    loss = plain_loss(reference, batch())
    loss.backward()
    result = strategies.prepare(model, PLAIN)(batch())
    assert abs(result.loss - loss) <= allowed * loss
    compare(model, reference, allowed)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEAKING])
def test_packed_documents_do_not_see_each_other(family):
    reference = build(family)
    model = copy.deepcopy(reference)
    ids = batch()["input_ids"][:1]
    documents = [ids[:, :4], ids[:, 4:]]
    logits = [reference(input_ids=document, use_cache=False).logits[0, :-1].double() for document in documents]
    loss = sum(F.cross_entropy(x, d[0, 1:], reduction="sum") for x, d in zip(logits, documents, strict=True)) / 7
    loss.backward()
    labels = ids.clone()
    labels[0, 4] = -100
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    result = strategies.prepare(model, PLAIN)({"input_ids": ids, "labels": labels, "position_ids": positions})
    allowed = FAMILIES[family][1]
    assert abs(result.loss - loss) <= allowed * loss
    compare(model, reference, allowed)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("family", "name"), LEAKING.items())
def test_a_model_that_lets_documents_see_each_other_is_refused(family, name, rows):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).repeat(rows, 1)
    packed = {**{name: x[:rows] for name, x in batch().items()}, "position_ids": positions}
    model = build(family)
    step = strategies.prepare(model, PLAIN)
    with pytest.raises(Refused, match=f"packing=true: packed documents see each other in {name}ForCausalLM"):
        step(packed)
    assert model.training
    step({**packed, "position_ids": torch.arange(9).repeat(rows, 1)})
