"""Linears in 4 and 8 bits: against the textbook's in float64, alone and in a model; what they draw; what they keep."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import families
import lowbit_reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import reference
from lowbit_reference import off, straighten
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import strategies
from distrib.contracts import Context
from distrib.engines.local import Local
from distrib.errors import Refused, UserError
from strategies.core import edits
from strategies.core.compare import Promise, differences, kept_parts
from strategies.core.edits import Wrap
from strategies.core.truth import true_gradients
from strategies.lowbit.draws import Draws
from strategies.lowbit.linear import UNIT, LowBitLinear, Shared, Unit, units
from strategies.lowbit.precision import PRECISIONS
from strategies.lowbit.schedule import Schedule

PRESETS = {
    "hq_bs": {"name": "int4"},
    "learned": {"name": "int4", "preset": "paper"},
    "paper": {"name": "fp4"},
    "nvfp4": {"name": "fp4", "preset": "nvfp4"},
    "mxfp4": {"name": "fp4", "preset": "mxfp4"},
}
each_preset = pytest.mark.parametrize("preset", PRESETS)
each_precision = pytest.mark.parametrize("precision", lowbit_reference.ROUNDED)
DRAWS = 1000
T, I, O = 40, 80, 36


# One linear.


def lowbit(precision: str, module: nn.Module, **changes: Any) -> nn.Module:
    unit = Unit(
        Shared(Draws(0), Schedule(0.0, False)),
        "one",
        replace(PRECISIONS[precision], **changes),
        precision,
        not isinstance(module, nn.Linear),
    )
    made = nn.Sequential(module.train())
    edits.apply(made, [("test", Wrap("0", LowBitLinear, {UNIT: unit}))])
    return made


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input with outliers, weight, bias, and the gradient of few tokens."""
    x, by = drawn(2, T // 2, I, seed=0), drawn(2, T // 2, O, seed=3)
    x[..., [3, 17, 40]] *= 10
    by[:, 5:] *= 1e-2
    return x, drawn(O, I, seed=1) / 8, drawn(O, seed=2), by


def made_linear(weight_OI: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(I, O, dtype=torch.float64)
    linear.weight.data, linear.bias.data = weight_OI.clone(), bias.clone()
    return linear


def by_textbook(precision: str) -> list[Tensor]:
    """Output, and the gradients of input, weight and bias."""
    x, weight, bias, by = factors()
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    y = lowbit_reference.linear(precision, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, by)]


def draws_of(model: nn.Module, count: int = DRAWS) -> list[Tensor]:
    """The gradients of input, weight and bias, so many of each."""
    x, _, _, by = factors()
    x.requires_grad_()
    y = model(x)
    leaves = (x, model[0].weight, model[0].bias)
    found = zip(*(torch.autograd.grad(y, leaves, by, retain_graph=True) for _ in range(count)), strict=True)
    return [torch.stack(of_one) for of_one in found]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted).norm() / wanted.norm())


@each_precision
def test_a_linear_against_the_textbooks(precision: str) -> None:
    x, weight, bias, _ = factors()
    y, *wanted = by_textbook(precision)
    model = lowbit(precision, made_linear(weight, bias))
    assert relative(model(x), y) < 1e-6
    assert relative(model(x), F.linear(x, weight, bias)) > 0.01
    of_x, of_weight, of_bias = draws_of(model)
    assert relative(of_bias[0], wanted[2]) < 1e-12
    for made, gradient in ((of_x.flatten(1, 2), wanted[0].flatten(0, 1)), (of_weight, wanted[1])):
        assert relative(made[0], gradient) > 1e-3
        assert off(made, gradient) < 1.3
        assert off(1.05 * made, gradient) > 1.3


@pytest.mark.parametrize("precision", [name for name in lowbit_reference.ROUNDED if name != "int4_learned"])
def test_a_backward_that_rounds_to_the_nearest_is_biased(precision: str) -> None:
    """All that is left to chance then are the signs of a Hadamard transform."""
    _, weight, bias, _ = factors()
    of_x, of_weight, _ = draws_of(lowbit(precision, made_linear(weight, bias), stochastic=False), 200)
    _, by_x, by_weight, _ = by_textbook(precision)
    assert off(of_x.flatten(1, 2), by_x.flatten(0, 1)) > 2
    assert off(of_weight, by_weight) > 1.3


@each_precision
def test_a_weight_that_lies_the_other_way(precision: str) -> None:
    """As GPT-2's: bit for bit the same."""
    x, weight, bias, _ = factors()
    other = Conv1D(O, I).double()
    other.weight.data, other.bias.data = weight.T.contiguous(), bias
    one, turned = lowbit(precision, made_linear(weight, bias)), lowbit(precision, other)
    torch.testing.assert_close(turned(x), one(x), rtol=1e-12, atol=1e-12)
    for a, b in zip(draws_of(turned, 2), draws_of(one, 2), strict=True):
        torch.testing.assert_close(a.mT if a.shape[1:] == (I, O) else a, b, rtol=1e-12, atol=1e-12)


@each_precision
def test_evaluation_and_the_target_precision_are_the_plain_linear(precision: str) -> None:
    x, weight, bias, by = factors()
    plain = made_linear(weight, bias)
    wanted = plain(x)
    wanted.backward(by)
    for prepare in (lambda unit, model: model.eval(), lambda unit, model: setattr(unit.shared.schedule, "since", 0)):
        model = lowbit(precision, made_linear(weight, bias))
        prepare(units(model)[0][0], model)
        found = model(x)
        found.backward(by)
        assert torch.equal(found, wanted)
        assert torch.equal(model[0].weight.grad, plain.weight.grad)


@pytest.mark.parametrize("precision", [name for name in lowbit_reference.ROUNDED if name != "int4_learned"])
def test_a_forward_in_the_target_precision_has_a_rounded_backward(precision: str) -> None:
    x, weight, bias, by = factors()
    plain = made_linear(weight, bias)
    wanted = plain(x)
    wanted.backward(by)
    model = lowbit(precision, made_linear(weight, bias))
    units(model)[0][0].shared.schedule.__dict__.update(since=0, forward_only=True)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    model(x).backward(by)
    assert 1e-3 < relative(model[0].weight.grad, plain.weight.grad) < 0.5


# A model.


def built(preset: str, **fields: Any) -> strategies.Strategy:
    kind, *_ = strategies.build([{**PRESETS[preset], **fields}])
    return kind


def llama(kind: str = "full", dropout: float = 0.0) -> Any:
    """Of float64, with norms that compute in it."""
    return reference.tiny_model(kind, dropout)


BATCHES = [reference.ragged(1, [12, 12], 12), reference.ragged(3, [9, 2, 7], 9, prompts=2)]
WEIGHT = float(sum(reference.learned_in(row) for batch in BATCHES for row in batch["labels"]))


def context(step: int = 0, seed: int = 0) -> Context:
    return Context(seed, step, WEIGHT)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def precision_in(preset: str, name: str) -> str | None:
    """Of the linears of a Llama of two layers."""
    if ".layers." not in name or "lora_" in name:
        return None
    chosen = strategies.get(PRESETS[preset]["name"]).presets[built(preset).preset]
    if chosen.plain_layers and ".layers.1." in name:
        return None
    return chosen.attention if "self_attn" in name else chosen.mlp


@pytest.mark.parametrize("kind", ["full", "lora"])
@each_preset
def test_what_a_model_is_held_to_is_the_textbooks(preset: str, kind: str) -> None:
    """On one document, as some scales are those of a whole matrix."""
    batch = [reference.ragged(1, [12], 12)]
    model = llama(kind)
    right = straighten(copy.deepcopy(model), partial(precision_in, preset))
    step = strategies.prepare(model.train(), [built(preset)])
    wanted = reference.truth(right.train(), batch, weight=WEIGHT)
    loss = true_gradients(Local(model), strategies.SFT(), batch, context())
    assert float(loss) == pytest.approx(float(wanted.loss), rel=1e-6)
    assert reference.difference(gradients(model), wanted.gradients) < 1e-4
    assert float(step(batch, context()).loss) == pytest.approx(float(wanted.loss), rel=1e-6)
    model.eval()
    assert abs(float(step(batch, context()).loss) / float(wanted.loss) - 1) > 1e-5


def is_unbiased(step: strategies.Prepared, batches: list[Any], wanted: dict[str, Tensor], draws: int = 32) -> bool:
    promise = Promise.of(step.strategies)
    run = lambda draw: step(batches, context(draw))  # noqa: E731
    flat = {name: gradient.reshape(-1) for name, gradient in wanted.items()}
    return differences(step.engine, flat, run, draws).right(promise, 1e-5)


# What is drawn.


@each_preset
def test_draws_are_a_function_of_what_they_are_for(preset: str) -> None:
    def found(seed: int, number: int, rank: int = 0) -> dict[str, Tensor]:
        units(model)[0][0].shared.draws.rank = rank
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        step(BATCHES, context(number, seed))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        return gradients(model)

    model = llama().train()
    step = strategies.prepare(model, [built(preset)])
    name = "model.layers.0.mlp.up_proj.weight"
    first = found(1, 4)
    torch.manual_seed(99)
    again = found(1, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = [found(1, 5)[name], found(2, 4)[name], found(1, 4, rank=1)[name]]
    for index, other in enumerate(others):
        assert 1e-4 < relative(other, first[name]) < 1.5
        assert not any(torch.equal(other, one) for one in others[:index])
    # As in a step of its own, each micro-batch draws anew.
    step([BATCHES[0]], context(4, 1))
    alone = gradients(model)[name]
    step([BATCHES[0]] * 2, context(4, 1))
    both = gradients(model)[name]
    assert relative(both - alone, alone) > 1e-4


def test_a_loop_that_says_nothing_draws_anew() -> None:
    model = llama().train()
    strategies.prepare(model, [built("hq_bs")])
    found = []
    for _ in range(2):
        model(**BATCHES[0]).loss.backward()
        found.append(gradients(model)["model.layers.0.mlp.up_proj.weight"])
    assert relative(found[0], found[1]) > 1e-4


# Beside other strategies.


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


AUTO = {"policy": "auto", "budget": 0.7}
RECOMPUTED = [(preset, policy) for preset in PRESETS for policy in ({}, {"policy": "full"})]


@pytest.mark.parametrize(
    ("preset", "policy"),
    [
        *RECOMPUTED,
        ("hq_bs", AUTO),
        *(pytest.param(name, AUTO, marks=pytest.mark.slow) for name in ("learned", "nvfp4")),
    ],
)
def test_recomputation_draws_the_same(preset: str, policy: dict[str, Any]) -> None:
    models = [llama(dropout=0.2).train() for _ in range(2)]
    again = [strategies.get("recompute")(**policy)]
    steps = [
        strategies.prepare(model, [built(preset), *extra]) for model, extra in zip(models, ([], again), strict=True)
    ]
    for number in range(3):
        losses = [step(BATCHES, context(number)).loss for step in steps]
        assert torch.equal(*losses)
        assert_same(gradients(models[1]), gradients(models[0]))
    assert steps[1].accounts()["recompute"]["recomputed"]


@pytest.mark.parametrize("reentrant", [False, True])
@each_preset
def test_transformers_checkpointing_draws_the_same(preset: str, reentrant: bool) -> None:
    models = [llama(dropout=0.2).train() for _ in range(2)]
    steps = [strategies.prepare(model, [built(preset)]) for model in models]
    models[1].activation_checkpointing_enable({"use_reentrant": reentrant})
    for number in range(2):
        for step in steps:
            step(BATCHES, context(number))
        assert_same(gradients(models[1]), gradients(models[0]))


CHUNKED = [("streambp", "hq_bs"), ("streambp", "mxfp4"), ("seco", "learned")]


@pytest.mark.parametrize(("name", "preset"), CHUNKED)
def test_in_chunks_it_is_unbiased_for_the_whole_sequence(name: str, preset: str) -> None:
    batch = [reference.ragged(1, [16], 16)]
    step = strategies.prepare(llama().train(), [built(preset), strategies.get(name)(chunk=8)])
    whole = strategies.prepare(llama().train(), [built(preset)])
    if preset == "learned":
        # They would be those of the first chunk.
        for one in (whole, step):
            shared = units(one.model)[0][0].shared
            whole(batch, context())
            shared.sizes.restore({"updates": 0, "sizes": learned_sizes(whole)}, torch.device("cpu"))
    assert float(step(batch, context()).loss) == pytest.approx(float(whole(batch, context()).loss), rel=1e-6)
    whole.engine.zero_grad()
    step.engine.zero_grad()
    true_gradients(whole.engine, strategies.SFT(), batch, context())
    assert is_unbiased(step, batch, kept_parts(whole.engine))


def learned_sizes(step: strategies.Prepared) -> dict[str, Any]:
    sizes = units(step.model)[0][0].shared.sizes.sizes
    return {name: [size.tolist(), [0.0] * 4] for name, size in sizes.items()}


@pytest.mark.parametrize("name", ["streambp", "seco"])
def test_scales_of_a_chunk_are_close_to_those_of_the_sequence(name: str) -> None:
    """Of a whole matrix, as NVFP4's: a chunk is another one."""
    batch = [reference.ragged(1, [16], 16)]
    model, other = llama().train(), llama().train()
    step = strategies.prepare(model, [built("nvfp4"), strategies.get(name)(chunk=8)])
    loss, whole = step(batch, context()).loss, strategies.prepare(other, [built("nvfp4")])(batch, context()).loss
    assert float(loss) == pytest.approx(float(whole), rel=5e-2)
    found, wanted = gradients(model), gradients(other)
    assert max(relative(found[name], wanted[name]) for name in wanted) < 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "1f1b+2bp"])
@each_preset
def test_weight_gradients_wait_and_are_the_same(preset: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from strategies.pipelining.store import Store, WaitingGradient

    waited: list[Any] = []
    put = Store.put

    def counting(self: Store, waiting: Any) -> None:
        if isinstance(waiting, WaitingGradient):
            waited.append(self._open is not None)
        put(self, waiting)

    models = [llama().train(), llama().train()]
    plain = strategies.prepare(models[0], [built(preset)])
    step = strategies.prepare(models[1], [built(preset), strategies.get("twobp")(schedule=schedule)])
    plain(BATCHES, context())
    monkeypatch.setattr(Store, "put", counting)
    step(BATCHES, context())
    found, wanted = gradients(models[1]), gradients(models[0])
    quantized = {f"{unit.name}.weight" for unit, _ in units(models[0])}
    assert_same({name: found[name] for name in quantized}, {name: wanted[name] for name in quantized})
    # In float64; the others' products are the same numbers in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    # Of seven linears a layer in two micro-batches; fp4 leaves the last layer as it is.
    later, linears = schedule == "1f1b+2bp", {"learned": 0, "hq_bs": 14}.get(preset, 7)
    assert waited == [later] * linears * len(BATCHES)


# When, which linears, and how many.


@pytest.mark.parametrize(
    ("share", "steps", "since"), [(0.5, 6, 3), (0.08, 100, 92), (0.08, 5, None), (1.0, 4, 0), (0.0, 4, None)]
)
def test_the_last_share_of_a_run_is_in_the_target_precision(share: float, steps: int, since: int | None) -> None:
    """What is tried before a run, and a loop that does not say how long it is, do not begin it."""
    schedule = Schedule(share, False)
    schedule.begin(-1, None)
    schedule.begin(10**6, None)
    assert (schedule.since, schedule.plain) == (None, share == 1)
    for step in range(steps):
        schedule.begin(step, steps)
        assert schedule.plain == (since is not None and step >= since)
    schedule.begin(steps, 100 * steps)
    assert schedule.since == since


def linears(model: nn.Module) -> dict[str, str]:
    return {unit.name: unit.label for unit, _ in units(model)}


def test_the_last_pattern_that_fits_decides() -> None:
    rules = {"*mlp*": "plain", "*.0.*": "nvfp4", "*.up_proj": "fp8", "model.layers.0.self_attn.q_proj": "plain"}
    for kind in ("full", "lora"):
        model = llama(kind)
        strategies.prepare(model, [built("hq_bs", rules=rules)])
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "down_proj")
        wanted = {f"model.layers.{index}.mlp.up_proj": "fp8" for index in (0, 1)}
        wanted |= {f"model.layers.0.self_attn.{name}": "nvfp4" for name in attention if name != "q_proj"}
        wanted |= {f"model.layers.1.self_attn.{name}": "int4" for name in attention}
        wanted |= {f"model.layers.0.mlp.{name}": "nvfp4" for name in mlp}
        assert linears(model) == wanted
        assert not any("lora" in name for name, module in model.named_modules() if UNIT in vars(module))


@pytest.mark.parametrize(("layers", "quantized"), [(1, 1), (2, 1), (7, 6), (20, 17)])
def test_the_last_layers_stay_as_they_are(layers: int, quantized: int) -> None:
    found = linears(prepared_family("llama", "nvfp4", num_hidden_layers=layers))
    assert {int(name.split(".")[2]) for name in found} == set(range(quantized))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"preset": "nvfp4"}, "strategy.preset='nvfp4': choose hq_bs, paper"),
    ({"rules": {"*": "int3"}}, "strategy.rules='int3': choose "),
    ({"rules": {"*.lm_head": "int4"}}, r"strategy.rules: '\*.lm_head' is the name of no linear in a layer"),
    ({"target_share": 1.5}, "target_share=1.5: a share of the steps, from 0 to 1"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_mistake_is_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        strategies.prepare(llama(), strategies.build([{"name": "int4", **fields}]))
    assert "\n" not in str(caught.value)


def prepared_family(family: str, preset: str, **changes: Any) -> Any:
    model = families.build(family, **changes)
    strategies.prepare(model, [built(preset)])
    return model


FAMILIES = {
    "gpt2": {"int4": 8},
    # Fused experts and their routers stay as they are.
    "mixtral": {"int4": 8},
    "qwen3_moe": {"int4": 8},
    "deepseek_v3": {"int4": 16},
    # Beside them an expert that all tokens go to, with a gate of its own.
    "qwen2_moe": {"int4": 14},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_experts_and_heads_stay_as_they_are(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {**families.MOE, "shared_expert_intermediate_size": 24}
    monkeypatch.setitem(families.FAMILIES, "qwen2_moe", (shared, families.EXACT))
    model = families.build(family)
    model.float()
    step = strategies.prepare(model, [built("hq_bs")])
    found = linears(model)
    assert not [name for name in found if "lm_head" in name or "router" in name or name.endswith("gate")]
    assert not [name for name in found if ".experts" in name]
    assert step.accounts()["int4"]["linears"] == FAMILIES[family]
    ids = torch.arange(12)[None]
    loss = step({"input_ids": ids, "labels": ids}, Context(0, 0, 11.0)).loss
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", ["hq_bs", "paper", "learned"])
def test_the_account_counts_products(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 linears: two products of a frozen weight, and three of one that trains."""
    from strategies.lowbit.backends import probe
    from strategies.lowbit.backends.cpu import CpuInt8

    for served, how in (([CpuInt8()], "exact-via-int8"), ([], "emulated")):
        monkeypatch.setattr(probe, "serving", lambda device, served=served: served)
        by_kind = {"hq_bs": {"int4": 14}, "learned": {"int4_learned": 14}, "paper": {"fp8": 4, "fp4": 3}}
        for kind, each in (("full", 3), ("lora", 2)):
            step = strategies.prepare(llama(kind), [built(preset)])
            expected = dict.fromkeys(("native", "exact-via-int8", "emulated"), 0)
            expected[how if preset == "hq_bs" else "emulated"] = sum(by_kind[preset].values()) * each
            account = step.accounts()[PRESETS[preset]["name"]]
            assert account["gemm"] == expected
            assert account["target_since"] is None
            assert account["linears"] == by_kind[preset]


def test_pipelines_and_tensor_parallel_engines_are_refused() -> None:
    from distrib.topology import Topology

    config = llama().config
    with pytest.raises(Refused, match=r"set engine\.tensor_parallel=1"):
        strategies.check([built("hq_bs")], config, Topology(world=2, tensor=2))
    with pytest.raises(Refused, match=r"strategy\.preset='paper' in a pipeline"):
        strategies.check([built("learned")], config, Topology(world=2, stages=2))
    strategies.check([built("paper")], config, Topology(world=2, stages=2))


# What is kept for the backward.


def kept_bytes(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> int:
    """Of storages that are no parameters'."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


# Of an input of T tokens and I numbers.
PACKED: dict[str, Callable[[int, int], int]] = {
    # A number for each row, a byte for each 32 of it.
    "hq_bs": lambda tokens, width: tokens * width // 2 + 4 * tokens + tokens * width // 32,
    # A byte for each block of 16, and one number for all of them.
    "nvfp4": lambda tokens, width: tokens * width // 2 + tokens * width // 16 + 4,
    "mxfp4": lambda tokens, width: tokens * width // 2 + tokens * width // 32,
}


@pytest.mark.parametrize("preset", PACKED)
def test_linears_with_one_input_keep_one_packed_copy(preset: str) -> None:
    layer = prepared_family("llama", preset, num_hidden_layers=1, hidden_size=64).train().model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    x = drawn(2, 10, 64, seed=1).requires_grad_()
    together = lambda *made: torch.cat([m.flatten() for m in made])  # noqa: E731
    expected = PACKED[preset](20, 64)
    for asked in (
        (attention.q_proj,),
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    ):
        call = lambda x, asked=asked: together(*(linear(x) for linear in asked))  # noqa: E731
        assert kept_bytes(layer, x, call) == expected
    # What has been written to since is another input.
    x = x.detach()

    def changed(x: Tensor) -> Tensor:
        first = mlp.gate_proj(x)
        return together(first, mlp.up_proj(x.mul_(2)))

    assert kept_bytes(layer, x, changed) == 2 * expected
    for frozen in layer.parameters():
        frozen.requires_grad_(False)
    assert kept_bytes(layer, x.requires_grad_(), mlp.gate_proj) == 0
