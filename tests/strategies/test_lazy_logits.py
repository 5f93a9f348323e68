"""Logits that come with a loss: right when they are read, absent when they are not, and never quietly wrong."""

from __future__ import annotations

import copy

import engine_cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import FAMILIES, VOCABULARY, build
from torch.nn.parallel import DistributedDataParallel

import strategies
from distrib.errors import UserError
from distrib.topology import Topology, ensure_group
from strategies.core.lazy_logits import LazyLogits, Reading

PLAIN = [strategies.get("plain")()]


def batch():
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def both(family="llama", **changes):
    """A prepared model's output, the model, and the model as it was."""
    plain = build(family, **changes)
    model = copy.deepcopy(plain)
    strategies.prepare(model, PLAIN)
    return model(**batch()), model, plain


def logits_of(plain):
    return plain(input_ids=batch()["input_ids"], use_cache=False).logits


@pytest.fixture
def formed(monkeypatch):
    """The shapes of the hidden states whose logits were formed."""
    shapes = []
    form = Reading.form

    def noting(reading, hidden):
        shapes.append(tuple(hidden.shape))
        return form(reading, hidden)

    monkeypatch.setattr(Reading, "form", noting)
    return shapes


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt2", "phi", "mixtral"])
def test_they_are_the_models_own(family):
    output, _, plain = both(family)
    wanted = logits_of(plain)
    assert output.logits.shape == wanted.shape
    assert output.logits.dtype == wanted.dtype
    assert (output.logits - wanted).abs().max() <= FAMILIES[family][1] * wanted.abs().max()


def test_shape_type_and_detaching_form_nothing(formed):
    output, *_ = both()
    logits = output.logits.detach().float()
    assert isinstance(logits, LazyLogits)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.ndim, len(logits), logits.size(1)) == ((2, 9, VOCABULARY), 3, 2, 9)
    assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.float32, "cpu", False)
    assert not formed
    assert logits.sum().dtype == torch.float32
    assert formed == [(2, 9, 32)]


LEARNED = batch()["labels"] != -100
AT = torch.tensor([0, 1]), torch.tensor([3, 8])


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, (9, 32)),
        (-1, (9, 32)),
        ((slice(None), slice(-1)), (2, 8, 32)),
        ((Ellipsis, slice(-1), slice(None)), (2, 8, 32)),
        ((1, 3), (32,)),
        ((slice(None), -1), (2, 32)),
        (LEARNED, (int(LEARNED.sum()), 32)),
        (AT, (2, 32)),
        ((0, Ellipsis), (9, 32)),
        ((slice(None), slice(None), slice(5)), (2, 9, 32)),
        ((Ellipsis, 4), (2, 9, 32)),
        ((1, 3, 4), (2, 9, 32)),
        ((None, 1), (2, 9, 32)),
        ((AT[0], slice(None), AT[1]), (2, 9, 32)),
        ([0, 1], (2, 9, 32)),
    ],
)
def test_an_index_over_rows_and_positions_forms_only_what_it_takes(formed, index, rows):
    output, _, plain = both()
    part = output.logits[index]
    assert torch.equal(torch.as_tensor(part.shape), torch.as_tensor(logits_of(plain)[index].shape))
    assert torch.allclose(part.clone(), logits_of(plain)[index], rtol=1e-12, atol=0)
    assert formed == [rows]


def test_slices_of_slices():
    output, _, plain = both()
    assert torch.allclose(output.logits[1][2:5][-1] + 0, logits_of(plain)[1][2:5][-1], rtol=1e-12)


def test_loops_over_chunks_of_positions_hold_one_chunk(formed):
    output, _, plain = both()
    with torch.no_grad():
        right = torch.cat([part.argmax(-1) for part in (output.logits[:, at : at + 3] for at in range(0, 9, 3))], 1)
    assert torch.equal(right, logits_of(plain).argmax(-1))
    assert formed == [(2, 3, 32)] * 3


@pytest.mark.parametrize("frozen", [False, True])
def test_with_gradients_on_they_carry_theirs(frozen):
    output, model, plain = both()
    for each in (model, plain):
        each.lm_head.requires_grad_(not frozen)
    output = model(**batch())
    wanted = logits_of(plain)
    labels = batch()["labels"][:, 1:].flatten()
    loss = F.cross_entropy(wanted[:, :-1].flatten(0, 1), labels) + wanted.softmax(-1).square().mean()
    loss.backward()
    (output.loss + output.logits.softmax(-1).square().mean()).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is None or (p.grad - q.grad).norm() < 1e-12 * q.grad.norm(), name


def test_detached_ones_have_none():
    output, *_ = both()
    assert output.logits.requires_grad is False
    assert (output.logits + 0).requires_grad
    assert not (output.logits.detach() + 0).requires_grad
    with torch.no_grad():
        assert not (output.logits + 0).requires_grad
        bookkeeping = output.logits.detach()
        assert not (bookkeeping + 0).requires_grad
    with pytest.raises(UserError, match="lost their gradient: read them under"):
        bookkeeping.sum()


def test_without_gradients_a_forward_keeps_no_graph():
    _, model, _ = both()
    with torch.no_grad():
        logits = model(**batch()).logits
    assert not (logits + 0).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.div_(2),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x[0].zero_(),
        lambda x: x.__itruediv__(2),
        lambda x: torch.relu_(x),
        lambda x: torch.add(torch.ones(()), 1, out=x),
        lambda x: setattr(x, "data", torch.ones(2)),
        lambda x: x.register_hook(print),
    ],
)
def test_changing_them_is_refused(change):
    output, *_ = both()
    with pytest.raises(UserError, match=r"read-only, so clone\(\) them first"):
        change(output.logits)
    assert output.logits.clone().div_(2).shape == (2, 9, VOCABULARY)


def test_after_the_optimizers_step_they_are_refused_unless_the_head_is_frozen():
    for frozen in (False, True):
        _, model, plain = both()
        model.lm_head.requires_grad_(not frozen)
        output = model(**batch())
        output.loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
        with torch.no_grad():
            if frozen:
                assert torch.allclose(output.logits + 0, logits_of(plain), rtol=1e-12)
                continue
            with pytest.raises(UserError, match="weights changed since these logits' forward: read them before"):
                output.logits.argmax(-1)


def test_after_undo_they_are_refused_and_nothing_is_left_behind():
    output, model, _ = both()
    strategies.undo(model)
    with pytest.raises(UserError, match="no longer prepared"):
        output.logits.sum()
    assert vars(model.lm_head).keys() == vars(build("llama").lm_head).keys()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_under_autocast_they_are_as_the_model_would_have_made_them(family):
    _, model, plain = both(family)
    model.float(), plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        output, wanted = model(**batch()), logits_of(plain)
    found = output.logits
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(found.float(), wanted.float())


def test_numbers_arrays_and_copies(formed):
    output, _, plain = both()
    wanted = logits_of(plain).detach()
    with torch.no_grad():
        assert output.logits[0, 0, 0].item() == pytest.approx(wanted[0, 0, 0].item(), rel=1e-12)
        assert output.logits.cpu().numpy() == pytest.approx(wanted.numpy(), rel=1e-12)
        assert torch.allclose(copy.deepcopy(output.logits), wanted, rtol=1e-12)
        assert torch.allclose(torch.stack([output.logits, wanted])[0], wanted, rtol=1e-12)
        assert "LazyLogits" not in repr(output.logits)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_with_adapters_the_live_head_forms_them(saved):
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)
    plain = get_peft_model(model, config).double()
    if saved:
        torch.nn.init.normal_(plain.base_model.model.lm_head.modules_to_save["default"].weight)
    model = copy.deepcopy(plain)
    strategies.prepare(model, PLAIN)
    assert torch.allclose(model(**batch()).logits + 0, logits_of(plain), rtol=1e-12)
    with plain.disable_adapter(), model.disable_adapter():
        assert torch.allclose(model(**batch()).logits + 0, logits_of(plain), rtol=1e-12)


ENGINES = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero2": {"name": "zero", "stage": 2},
    "zero3": {"name": "zero", "stage": 3},
}


@pytest.mark.parametrize("strategy", ["plain", "streambp"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_leave_them_unread_and_readable(two_ranks, engine, strategy):
    dtype, near = (torch.float32, 2e-6) if "zero" in engine else (torch.float64, 1e-12)
    rows = engine_cases.padded(engine_cases.ragged_rows(2))
    made_from = engine_cases.recipe(engine=ENGINES[engine], config_overrides={"tie_word_embeddings": False})
    plain = reference_model(made_from, dtype)
    wanted = plain(input_ids=rows["input_ids"]).logits
    labels = rows["labels"][:, 1:].flatten()
    (2 * F.cross_entropy(wanted[:, :-1].flatten(0, 1), labels, reduction="sum") / 10).backward()
    given = ("logits_cases:read", made_from, dtype, rows, strategy)
    for seen, unread in zip(two_ranks(*given, True), two_ranks(*given, False), strict=True):
        assert seen.formed == 0
        assert (seen.read - wanted[:, :-1]).norm() < near * wanted.norm()
        for name, parameter in plain.named_parameters():
            assert (seen.gradients[name] - parameter.grad).norm() < near * parameter.grad.norm(), name
        # Reading leaves nothing behind that the steps after it would see.
        assert seen.next_losses == unread.next_losses
        assert torch.equal(seen.evaluated, unread.evaluated)
        log_probs = seen.evaluated[:, :-1].double().log_softmax(-1)
        chosen = log_probs.gather(2, rows["input_ids"][:, 1:, None])[..., 0][rows["labels"][:, 1:] != -100]
        assert -chosen.sum() / 10 < seen.next_losses[1] < seen.next_losses[0]


@pytest.fixture
def one_rank():
    """A group, unless an engine has made one in this process before."""
    own = not dist.is_initialized()
    ensure_group(Topology())
    yield
    if own:
        dist.destroy_process_group()


def test_ddp_that_looks_for_unused_parameters_leaves_them_unread(one_rank, formed):
    plain = build("llama")
    model = copy.deepcopy(plain)
    strategies.prepare(model, PLAIN)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    output = parallel(**batch())
    output.loss.backward()
    assert not formed
    wanted = logits_of(plain)
    with torch.no_grad():
        assert torch.allclose(output.logits.clone(), wanted, rtol=1e-12)
    wanted.square().sum().backward()
    model.zero_grad()
    output = parallel(**batch())
    output.logits.square().sum().backward()
    for name, p in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, p.grad, rtol=1e-9), name


def reference_model(made_from, dtype):
    from distrib.units import units
    from launch.models import Weights, build, load_config

    config = load_config(made_from)
    model = build(made_from, config, dtype)
    for name, _ in units(model):
        Weights(made_from, config, Topology()).fill(model, name)
    return model.double()
