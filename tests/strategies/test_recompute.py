"""Recomputation: bitwise what autograd gives on the same model, whatever runs again, dropout on."""

from __future__ import annotations

import copy
import gc
import weakref

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import reference
from torch import nn

import strategies
from distrib.errors import Refused, UserError
from distrib.tracker import Tracker
from strategies.recomputation import block, tape
from strategies.recomputation.cost import study

Recompute = strategies.get("recompute")
POLICIES = {
    "none": {"policy": "none"},
    "attention": {"policy": "attention"},
    "norms": {"policy": "norms"},
    "activations": {"policy": "activations"},
    "mlp": {"policy": "mlp"},
    "full": {"policy": "full"},
    "every other layer": {"policy": "full", "every": 2},
    "by pattern": {"policy": {"*.h.1.*": ["norms", "attention"], "*mlp": "full"}},
    "auto 0.6": {"policy": "auto", "budget": 0.6},
    "auto 0.25": {"policy": "auto", "budget": 0.25},
}
SOME = ("llama", "qwen3", "gpt_neox", "mixtral", "gpt_oss", "gemma2", "deepseek_v3", "mamba", "falcon_h1")


def dropping(**changes):
    """GPT-2 as it is by default: dropout after the embedding, on attention, and on what each block adds."""
    dropout = {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}
    return families.build("gpt2", **{**dropout, "attn_implementation": "eager", **changes})


def batch(length=19, rows=2):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, families.VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def by_autograd(model, given, seed=0):
    torch.manual_seed(seed)
    logits = model(input_ids=given["input_ids"], use_cache=False).logits[:, :-1].double()
    F.cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten()).backward()
    return taken(model)


def taken(model):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def below_the_head(gradients):
    """The head's own is summed by chunks, and everything below follows from it."""
    return {name: g for name, g in gradients.items() if "lm_head" not in name and "wte" not in name}


def trained(model, given, seed=0):
    torch.manual_seed(seed)
    model(**given).loss.backward()
    return taken(model)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_dropout_is_drawn_once(fields):
    model, given = dropping(), batch()
    wanted = [by_autograd(copy.deepcopy(model), given, seed) for seed in range(3)]
    strategies.prepare(model, [Recompute(**fields)])
    # The first time is taken down whole; from then on what was chosen runs again.
    for seed, right in enumerate(wanted):
        assert reference.difference(trained(model, given, seed), right) < 1e-12


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_nothing_changes_by_a_bit(fields):
    """Against the same model under `plain`, whose head is the same."""
    model, given = dropping(), batch()
    other = copy.deepcopy(model)
    strategies.prepare(model, [Recompute(**fields)])
    strategies.prepare(other, [strategies.get("plain")()])
    for seed in range(3):
        found, right = trained(model, given, seed), trained(other, given, seed)
        assert all(torch.equal(found[name], gradient) for name, gradient in right.items())


def test_randomness_goes_on_as_it_would():
    model, given = dropping(), batch()
    states = []
    for strategy in (strategies.get("plain")(), Recompute(policy="full")):
        step = strategies.prepare(model, [strategy])
        trained(model, given, seed=3)
        states.append(torch.get_rng_state())
        step.undo()
    assert torch.equal(*states)


@pytest.mark.parametrize("fields", [{"policy": "full"}, {"policy": "auto", "budget": 0.3}], ids=["full", "auto"])
@pytest.mark.parametrize("family", SOME)
def test_families(family, fields):
    model, given = families.build(family), batch()
    wanted = by_autograd(copy.deepcopy(model), given)
    strategies.prepare(model, [Recompute(**fields)])
    largest = max(gradient.norm() for gradient in wanted.values())
    for _ in range(2):
        for name, gradient in trained(model, given).items():
            assert (gradient - wanted[name]).norm() <= families.FAMILIES[family][1] * largest, name


def test_autocast_and_lora():
    model = reference.tiny_model("lora").float()
    other, given = copy.deepcopy(model), reference.cases()["packing"][0]
    strategies.prepare(model, [Recompute(policy="full")])
    strategies.prepare(other, [strategies.get("plain")()])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [m(**given).loss for m in (model, other)]
        for loss in losses:
            loss.backward()
        found, right = taken(model), taken(other)
        assert all(torch.equal(found[name], gradient) for name, gradient in right.items())


def test_under_an_autocast_of_the_backward_the_forward_runs_again_as_it_was():
    model, given = reference.tiny_model("full").float(), reference.cases()["one"][0]
    other = copy.deepcopy(model)
    strategies.prepare(model, [Recompute(policy="full")])
    strategies.prepare(other, [strategies.get("plain")()])
    losses = [m(**given).loss for m in (model, other)]
    with torch.autocast("cpu", torch.bfloat16):
        for loss in losses:
            loss.backward()
    found, right = taken(model), taken(other)
    assert all(torch.equal(found[name], gradient) for name, gradient in right.items())


class InPlace(nn.Module):
    """A layer whose operators write where others have read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden, attention_mask=None):
        read = hidden * 2
        kept = read + 1
        read.mul_(3).add_(hidden)
        noise = torch.empty_like(read).bernoulli_(0.5)
        noise.div_(0.5)
        return self.linear(read.sin() * noise) + kept.cos()


@pytest.mark.parametrize("picked", ["everything", "reads", "nothing but writes", "sin"])
def test_what_is_written_in_place_runs_again_as_it_was(picked):
    rules = {
        "everything": lambda op: True,
        "reads": lambda op: "mul.Tensor" in op.key[1] or "add.Tensor" in op.key[1],
        "nothing but writes": lambda op: "_." in op.key[1],
        "sin": lambda op: "sin" in op.key[1],
    }
    torch.manual_seed(0)
    layer, given = InPlace().double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    right = torch.autograd.grad(layer(given).square().sum(), [given, *layer.parameters()])
    torch.manual_seed(1)
    taken_down = tape.Tape(lambda op: frozenset({"it"}) if rules[picked](op) else frozenset(), [layer], {})
    with torch.autograd.graph.saved_tensors_hooks(taken_down.pack, tape.unpack), taken_down:
        out = layer(given)
    found = torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_taking_its_time_leaves_what_is_written_in_place_as_it_was():
    layer, given = InPlace().double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    taken_down = tape.Tape(lambda op: frozenset({"full"}), [layer], {}, watch=True)
    with torch.autograd.graph.saved_tensors_hooks(taken_down.pack, tape.unpack), taken_down:
        layer(given)
    assert not study(taken_down).wrong


def test_a_tensor_changed_behind_its_layer_is_noticed():
    layer, given = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    hidden = given * 1
    taken_down = tape.Tape(lambda op: frozenset({"it"}), [layer], {})
    with torch.autograd.graph.saved_tensors_hooks(taken_down.pack, tape.unpack), taken_down:
        out = layer(hidden).sin().sin()
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="changed in place behind its layer"):
        out.sum().backward()


@pytest.mark.parametrize("fields", [{"policy": "full"}, {"policy": "none"}, {"policy": "auto", "budget": 0.5}])
def test_what_waits_may_be_away(fields, monkeypatch):
    monkeypatch.setattr(block, "LEAST_BYTES", 0)
    model, given = dropping(), batch()
    wanted = [by_autograd(copy.deepcopy(model), given, seed) for seed in range(3)]
    strategies.prepare(model, [Recompute(**fields, offload=True)])
    for seed, right in enumerate(wanted):
        assert reference.difference(trained(model, given, seed), right) < 1e-12


def test_the_graph_may_be_kept_and_is_freed(monkeypatch):
    alive = weakref.WeakSet()

    class Noticed(tape.Kept):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(tape, "Kept", Noticed)
    model, given = families.build("llama"), batch()
    strategies.prepare(model, [Recompute(policy="full")])
    gc.disable()
    try:
        loss = model(input_ids=given["input_ids"]).logits.square().mean()
        assert alive
        loss.backward(retain_graph=True)
        once = {name: gradient.clone() for name, gradient in taken(model).items()}
        loss.backward()
        assert reference.difference(taken(model), once) < 1e-15
        del loss
        assert not alive
        model(**given)
        assert not alive
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_switched_on_by_others_changes_nothing():
    model, given = families.build("llama"), batch()
    strategies.prepare(model, [Recompute(policy="full")])
    right = trained(model, given)
    model.gradient_checkpointing_enable()
    assert reference.difference(trained(model, given), right) < 1e-12


MISTAKES = {
    "choose none|attention, norms": {"policy": "norm"},
    "a budget belongs to policy auto": {"policy": "auto"},
    "budget='much'": {"policy": "auto", "budget": "much"},
    "budget=1.5: a share": {"policy": "auto", "budget": 1.5},
    "every=0": {"every": 0},
    "which chooses the layers itself": {"policy": "auto", "budget": 0.5, "every": 2},
}


@pytest.mark.parametrize(("line", "fields"), MISTAKES.items())
def test_mistakes_take_one_line(line, fields):
    with pytest.raises(UserError, match=line):
        strategies.build([{"name": "recompute", **fields}])


@pytest.mark.parametrize(("given", "nbytes"), [("12GiB", 12 << 30), ("1.5 MB", 3 << 19), ("300", 300), ("2k", 2048)])
def test_budgets_in_bytes(given, nbytes):
    assert Recompute(policy="auto", budget=given).most() == nbytes


class Unseen(torch.autograd.Function):
    """Tanh by a kernel that PyTorch's dispatcher knows nothing of."""

    @staticmethod
    def forward(ctx, x):
        made = torch.empty_like(x)
        made.detach().numpy()[...] = np.tanh(x.detach().numpy())
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx, by_output):
        (made,) = ctx.saved_tensors
        return by_output * (1 - made**2)


class Kernel(nn.Module):
    def forward(self, x):
        return Unseen.apply(x)


@pytest.mark.parametrize("fields", [{"policy": "full"}, {"policy": "auto", "budget": 0.3}, {"policy": "mlp"}])
def test_what_a_kernel_writes_unseen_is_kept(fields, capfd):
    model, given = families.build("llama"), batch()
    for layer in model.model.layers:
        layer.mlp.act_fn = Kernel()
    wanted = by_autograd(copy.deepcopy(model), given)
    strategies.prepare(model, [Recompute(**fields)])
    for _ in range(3):
        assert reference.difference(trained(model, given), wanted) < 1e-12
    assert "what mlp.act_fn makes is kept: kernels that PyTorch does not see" in capfd.readouterr().err


def together(model, names, given, seed=0):
    strategies.prepare(model, strategies.build([{"name": name} for name in names]))
    return [trained(model, given, seed) for _ in range(2)][-1]


@pytest.mark.parametrize("other", ["approx_bp", "few_bit"])
def test_it_composes_with_low_memory_activations(other):
    model, given = families.build("llama"), batch()
    alone = together(copy.deepcopy(model), [other], given)
    both = together(model, ["recompute", other], given)
    assert all(torch.equal(both[name], gradient) for name, gradient in alone.items())


def test_it_composes_with_chunks_of_the_sequence():
    model, given = families.build("llama"), batch()
    wanted = by_autograd(copy.deepcopy(model), given)
    step = strategies.prepare(model, [Recompute(policy="full"), strategies.get("seco")(chunk=4)])
    for _ in range(2):
        step(given)
        assert reference.difference(taken(model), wanted) < 1e-12


def test_two_ways_to_run_a_layer_are_one_too_many():
    with pytest.raises(Refused, match="strategies recompute and streambp both run the layers in their own way"):
        strategies.prepare(families.build("llama"), [Recompute(), strategies.get("streambp")()])


def shaped(attention="sdpa", dtype=torch.float32, layers=3):
    """Llama's proportions, small."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    changes = {**shape, "num_hidden_layers": layers, "attn_implementation": attention}
    return families.build("llama", **changes).to(dtype)


def held_bytes(model, given):
    """What is live when the last layer has run, above what was when the first one began; counted from outside."""
    tracker, live, layers = Tracker(fake=False), [], model.model.layers
    for parameter in model.parameters():
        tracker.count(parameter)
    handles = [
        layers[0].register_forward_pre_hook(lambda *_: live.append(tracker.live_bytes)),
        layers[-1].register_forward_hook(lambda *_: live.append(tracker.live_bytes)),
    ]
    with tracker:
        model(**given).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return live[1] - live[0]


def holds(fields, beside=(), **shape):
    """Of what plain holds."""
    given, found, strategy = batch(64), [], Recompute(**fields)
    for chosen in ([strategies.get("plain")()], [strategy, *beside]):
        model = shaped(**shape)
        strategies.prepare(model, chosen)
        trained(model, given)
        found.append(held_bytes(model, given))
    account = strategy.account(model)
    return found[1] / found[0], account["kept_bytes"]["predicted"] / found[1]


@pytest.mark.parametrize(
    ("fields", "shape", "most"),
    [
        ({}, {}, 0.60),
        ({}, {"dtype": torch.bfloat16}, 0.55),
        ({"policy": "norms"}, {}, 0.85),
        ({"policy": "attention"}, {"attention": "eager"}, 0.85),
        ({"policy": "mlp"}, {}, 0.50),
        ({"policy": "full"}, {}, 0.06),
        ({"policy": "auto", "budget": 0.7}, {}, 0.7),
        ({"policy": "auto", "budget": 0.3}, {}, 0.3),
        ({"policy": "auto", "budget": 0.1}, {"dtype": torch.bfloat16}, 0.1),
    ],
)
def test_what_is_held_is_less_and_as_predicted(fields, shape, most):
    share, predicted = holds(fields, **shape)
    assert share < most
    assert predicted == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "section", [{"name": "fp4"}, {"name": "fp4", "preset": "nvfp4"}, {"name": "int4"}], ids=lambda given: str(given)
)
def test_beside_linears_of_4_bits_it_holds_less_than_55_percent(section):
    share, predicted = holds({}, strategies.build([section]), dtype=torch.bfloat16)
    assert share < 0.55
    assert predicted == pytest.approx(1, abs=0.1)


def test_an_attention_that_is_one_operator_is_left_alone(capfd):
    assert holds({"policy": "attention"})[0] == 1
    assert "policy 'attention' finds nothing to run again (it is one operator" in capfd.readouterr().err


def test_what_is_away_is_not_held(monkeypatch):
    monkeypatch.setattr(block, "LEAST_BYTES", 0)
    assert holds({"offload": True})[0] < 0.05


@pytest.mark.parametrize(("budget", "smallest"), [(0.01, r"0\.0[45]\d"), ("10KB", "1MiB")])
def test_a_budget_that_nothing_meets_names_the_smallest_that_can(budget, smallest):
    model = shaped()
    strategies.prepare(model, [Recompute(policy="auto", budget=budget)])
    with pytest.raises(Refused, match=rf"^budget=.*128 tokens still hold .* set it to {smallest} or more"):
        trained(model, batch(64))


def test_a_longer_batch_is_chosen_for_anew():
    model = shaped()
    strategies.prepare(model, [Recompute(policy="auto", budget="600KB")])
    found = []
    for length in (8, 64, 8):
        trained(model, batch(length))
        found.append(held_bytes(model, batch(length)))
    assert found[2] < found[0]
    assert found[1] < 600 * 1024 * 1.05


def test_the_account_says_what_is_kept_and_what_runs_again():
    model = shaped()
    step = strategies.prepare(model, [Recompute()])
    assert step.accounts() == {}
    for _ in range(3):
        step(batch(64))
    account = step.accounts()["recompute"]
    assert account["recomputed"]["mlp.act_fn silu"] == 3
    assert "mlp.gate_proj mm" in account["kept"]
    assert account["kept_bytes"]["predicted"] == account["kept_bytes"]["measured"] == sum(account["kept"].values())
    assert account["seconds"]["measured"] > 0
    assert account["plain_bytes"] > account["kept_bytes"]["measured"]
