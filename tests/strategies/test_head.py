"""The head: its three ways back, chunks, precisions, and everything a caller may pass."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, build

import strategies
from distrib.errors import Refused
from strategies import SFT, Stats
from strategies.core import passes, statistics

PLAIN = [strategies.get("plain")()]


def batch(seed=3, rows=2, width=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, width), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def prepared(family="llama", **changes):
    reference = build(family, **changes)
    model = copy.deepcopy(reference)
    strategies.prepare(model, PLAIN)
    return model, reference


def logits_and_targets(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    return logits[targets != -100], targets[targets != -100]


def worst(model, reference):
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    assert all((found is None) == (right is None) for found, right in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b is not None)


@dataclass(frozen=True)
class Everything:
    """Uses every statistic, not linearly."""

    separable: bool
    needs = frozenset({"logsumexp", "entropy", "mean_logprob"})

    def weight(self, batch):
        return 5.0

    def __call__(self, stats: Stats, batch):
        terms = stats.logprob_n**2 + stats.logsumexp_n**2 + stats.entropy_n**3 + stats.mean_logprob_n**2
        return (terms * stats.take(batch["factors"]) * stats.take_row(batch["advantages"])).sum()


def set_chunk(monkeypatch, size_bytes):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", size_bytes)
    monkeypatch.setattr(statistics, "LEAST_ROWS", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_every_statistic_every_way_back(monkeypatch, family, frozen, separable, rows):
    set_chunk(monkeypatch, rows * 4 * VOCABULARY)
    model, reference = prepared(family)
    for each in (model, reference):
        for parameter in each.get_output_embeddings().parameters():
            parameter.requires_grad_(not frozen)
    given = batch()
    extras = {"factors": torch.rand(2, 9).double(), "advantages": torch.tensor([0.5, -2.0]).double()}
    loss = model(**given, objective=Everything(separable), extras=extras).loss
    loss.backward()

    logits, targets = logits_and_targets(reference, given)
    logits = logits.double()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    terms = chosen**2 + logits.logsumexp(-1) ** 2 + entropy**3 + logp.mean(-1) ** 2
    learned = given["labels"][:, 1:] != -100
    factor = (extras["factors"][:, 1:] * extras["advantages"][:, None])[learned]
    wanted = (terms * factor).sum() / 5
    wanted.backward()
    allowed = 1e-6 if family == "gemma2" else 1e-12
    assert abs(loss - wanted) < allowed * abs(wanted)
    assert worst(model, reference) < allowed


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("separable", [False, True])
def test_the_way_back_is_the_cheapest(monkeypatch, frozen, separable):
    taken = []
    for way in (passes._Fused, passes._UnitRows, passes._Recompute):
        monkeypatch.setattr(way, "forward", _noting(way, taken))
    model, _ = prepared()
    model.lm_head.requires_grad_(not frozen)
    extras = {"factors": torch.ones(2, 9), "advantages": torch.ones(2)}
    model(**batch(), objective=Everything(separable), extras=extras)
    assert taken == ["_Fused" if separable else "_UnitRows" if frozen else "_Recompute"]
    with torch.no_grad():
        model(**batch(), objective=Everything(separable), extras=extras)
    assert len(taken) == 1


def _noting(way, taken):
    original = way.forward

    def forward(ctx, *args):
        taken.append(way.__name__)
        return original(ctx, *args)

    return staticmethod(forward)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_label_smoothing_and_z_loss(smoothing, z_loss):
    model, reference = prepared()
    given = batch()
    loss = model(**given, objective=SFT(label_smoothing=smoothing, z_loss=z_loss)).loss
    loss.backward()
    logits, targets = logits_and_targets(reference, given)
    wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    wanted = wanted + z_loss * (logits.logsumexp(-1) ** 2).mean()
    wanted.backward()
    assert abs(loss - wanted) < 1e-12 * wanted
    assert worst(model, reference) < 1e-12


def test_no_more_than_one_chunk_of_logits_is_alive(monkeypatch):
    vocabulary, rows = 5000, 4
    set_chunk(monkeypatch, rows * 4 * vocabulary)
    model, _ = prepared(vocab_size=vocabulary)
    alive, most = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (vocabulary,) and out.shape[:-1] not in ((), (32,)):
                alive.append(weakref.ref(out))
                most.append(max(x().shape[:-1].numel() for x in alive if x() is not None))
            return out

    given = batch(width=40, rows=3)
    with Watch():
        model(**given).loss.backward()
    assert max(most) <= rows


def error(model, exact):
    squares = [(p.grad.double() - exact[name]).square().sum() for name, p in model.named_parameters() if name in exact]
    return torch.stack(squares).sum().sqrt()


@pytest.mark.parametrize("way", ["fused", "unit rows", "recompute"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_close_to_float64_as_plain_bf16(way, autocast):
    given = batch(rows=4, width=24)
    _, reference = prepared()
    reference.lm_head.requires_grad_(way != "unit rows")
    F.cross_entropy(*logits_and_targets(reference, given)).backward()
    exact = {name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}
    reference.zero_grad()
    plain = reference.float() if autocast else reference.to(torch.bfloat16)
    model = copy.deepcopy(plain)
    strategies.prepare(model, PLAIN)
    objective = SFT()
    object.__setattr__(objective, "separable", way == "fused")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**given, objective=objective).loss
        logits, targets = logits_and_targets(plain, given)
        wanted = F.cross_entropy(logits.float(), targets)
    loss.backward()
    wanted.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - wanted) < 1e-6 * wanted
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    assert error(model, exact) < 1.1 * error(plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["fused", "unit rows", "recompute"])
def test_bf16_on_an_accelerator_is_close_to_float64(way):
    given = {name: value.cuda() for name, value in batch(rows=4, width=600).items()}
    model, reference = prepared(max_position_embeddings=600, vocab_size=40000)
    reference.cuda().lm_head.requires_grad_(way != "unit rows")
    F.cross_entropy(*logits_and_targets(reference, given)).backward()
    exact = {name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}
    reference.zero_grad()
    plain = reference.to(torch.bfloat16)
    model.cuda().to(torch.bfloat16).lm_head.requires_grad_(way != "unit rows")
    objective = SFT()
    object.__setattr__(objective, "separable", way == "fused")
    model(**given, objective=objective).loss.backward()
    logits, targets = logits_and_targets(plain, given)
    F.cross_entropy(logits.float(), targets).backward()
    assert error(model, exact) < 1.1 * error(plain, exact)


def test_many_bf16_chunks_add_up_in_float32(monkeypatch):
    set_chunk(monkeypatch, 4 * VOCABULARY)
    given = batch(rows=8, width=64)
    model, _ = prepared()
    low = copy.deepcopy(model).to(torch.bfloat16)
    low(**given).loss.backward()
    one_chunk = copy.deepcopy(low)
    one_chunk.zero_grad()
    set_chunk(monkeypatch, 2**26)
    one_chunk(**given).loss.backward()
    found, wanted = low.lm_head.weight.grad.float(), one_chunk.lm_head.weight.grad.float()
    assert (found - wanted).norm() < 3e-3 * wanted.norm()


def test_the_backward_reads_the_live_weight_after_the_hooks_of_the_heads_output():
    """As a sharding engine does it: the weight is gone between forward and backward, and comes back when the
    gradient of the head's output is known."""
    model, reference = prepared()
    given = batch()
    extras = {"factors": torch.ones(2, 9).double(), "advantages": torch.ones(2).double()}
    kept = model.lm_head.weight.detach().clone()

    def gather(gradient):
        model.lm_head.weight.data.copy_(kept)

    def shard(module, args, output):
        model.lm_head.weight.data.zero_()
        output.register_hook(gather)

    model.lm_head.register_forward_hook(shard)
    model(**given, objective=Everything(False), extras=extras).loss.backward()
    strategies.prepare(reference, PLAIN)
    reference(**given, objective=Everything(False), extras=extras).loss.backward()
    assert worst(model, reference) == 0


def test_scaled_losses_and_a_second_backward():
    model, reference = prepared()
    given = batch()
    loss = model(**given).loss
    (3 * loss).backward(retain_graph=True)
    (3 * F.cross_entropy(*logits_and_targets(reference, given))).backward()
    assert worst(model, reference) < 1e-12
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


@pytest.mark.parametrize("weight", [7.0, torch.tensor(7), torch.tensor(7.0)])
@pytest.mark.parametrize("name", ["weight", "num_items_in_batch"])
def test_w_is_what_the_caller_says(name, weight):
    model, reference = prepared()
    given = batch()
    loss = model(**given, **{name: weight}).loss
    loss.backward()
    logits, targets = logits_and_targets(reference, given)
    wanted = F.cross_entropy(logits, targets, reduction="sum") / 7
    wanted.backward()
    assert abs(loss - wanted) < 1e-12 * wanted
    assert worst(model, reference) < 1e-12


def test_shift_labels_name_the_token_after_each_position():
    model, reference = prepared()
    given = batch()
    shifted = F.pad(given["labels"][:, 1:], (0, 1), value=5)
    loss = model(input_ids=given["input_ids"], shift_labels=shifted).loss
    logits = reference(input_ids=given["input_ids"]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    assert abs(loss - wanted) < 1e-12 * wanted


def test_a_batch_without_learned_tokens_costs_nothing_and_reaches_every_parameter():
    model, _ = prepared()
    given = batch()
    given["labels"][:] = -100
    for weight in (None, 12.0):
        model.zero_grad()
        loss = model(**given, weight=weight).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_output_is_the_classes_own_with_the_loss_first():
    model, reference = prepared()
    output = model(**batch())
    assert type(output) is type(reference(**batch()))
    assert output.logits.shape == (2, 9, VOCABULARY)
    assert output.past_key_values is None
    first, *_ = model(**batch(), return_dict=False)
    assert torch.equal(first, output.loss)
    assert torch.equal(output[0], output["loss"])
    assert len(model(input_ids=batch()["input_ids"], return_dict=False)[0].shape) == 3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_loss_counts_by_the_share_of_the_batch(family):
    model, reference = prepared(family, output_router_logits=True, router_aux_loss_coef=0.5)
    batches = [batch(3), batch(4, rows=1)]
    result = strategies.prepare(model, PLAIN)(batches)
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    total = 0.0
    for given, count in zip(batches, counts, strict=True):
        output = reference(input_ids=given["input_ids"])
        logits = output.logits[:, :-1].flatten(0, 1)
        cross = F.cross_entropy(logits, given["labels"][:, 1:].flatten(), reduction="sum")
        total = total + (cross + 0.5 * output.aux_loss * count) / sum(counts)
    total.backward()
    assert abs(result.loss - total) < 1e-6 * total
    # Transformers computes the auxiliary loss through float32 tensors.
    assert worst(model, reference) < 1e-6


def test_a_model_that_does_not_call_its_head_fails():
    model, _ = prepared()
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.t()
    with pytest.raises(RuntimeError, match="without calling its head"):
        model(**batch())
    del model.lm_head.forward
    assert model(**batch()).loss > 0


def test_labels_that_do_not_fit_fail():
    model, _ = prepared()
    with pytest.raises(ValueError, match=r"labels \[2, 9\] do not match the hidden states \[2, 3\]"):
        model(**batch(), logits_to_keep=3)


def test_float16_is_refused():
    model, _ = prepared()
    with pytest.raises(Refused, match="float16: gradients underflow"):
        model.half()(**batch())


def test_models_without_a_known_head_are_refused():
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(Refused, match=r"output head is torch's Sequential: only a plain nn\.Linear"):
        strategies.prepare(model, PLAIN)
    backbone = build("llama").model
    with pytest.raises(Refused, match="LlamaModel has no output head: only causal language models"):
        strategies.prepare(backbone, PLAIN)


def test_what_comes_after_the_head_must_act_row_by_row():
    model = build("llama")

    class Mixing(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - output.logits.mean(1, keepdim=True)
            return output

    model.__class__ = Mixing
    with pytest.raises(Refused, match="mixes positions"):
        strategies.prepare(model, PLAIN)
