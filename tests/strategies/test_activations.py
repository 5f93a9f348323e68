"""Low-memory activations: what they keep, and how far off their gradients are, against autograd in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, OWN_CASTS, build
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

import strategies
from distrib.errors import UserError
from distrib.topology import Topology
from launch.sides import edit
from strategies import Strategy
from strategies.activations.coded import _derivative, coded_activations
from strategies.activations.norms import shared_norms
from strategies.activations.step_function import POINTS, _best_cuts, fitted
from strategies.approx_bp import ApproxBP
from strategies.core.edits import Edit
from strategies.few_bit import BOUNDS, FewBit

SMOOTH = ("gelu", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh")
SMOOTH += ("mish", "quick_gelu", "silu", "swish")
OTHERS = ("gelu_10", "laplace", "leaky_relu", "linear", "relu", "relu2", "relu6", "sigmoid", "tanh", "prelu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope(x: Tensor) -> Tensor:
    """Of GELU."""
    density = torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5
    return (1 + torch.erf(x / 2**0.5)) / 2 + x * density


GELU = slope(torch.tensor(POINTS)).numpy()


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_steps_begin_where_the_squares_are_least(runs: int) -> None:
    values = drawn(9).numpy()

    def squares(cuts: tuple[int, ...]) -> float:
        return sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))

    best = min(itertools.combinations(range(1, 9), runs - 1), key=squares)
    assert _best_cuts(values, runs) == [0, *best, 9]


@pytest.mark.parametrize("bits", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_is_multiplied_by_the_step_that_its_input_was_on(bits: int, dtype: torch.dtype) -> None:
    steps = fitted(GELU.tobytes(), bits)
    exact = torch.promote_types(dtype, torch.float32)
    wide = (3 * drawn(400, 700)).to(dtype)
    for x in (wide, wide[:, 350:], wide.t(), wide[:7, :3], wide[:, :0], wide[:0], wide[0, 0]):
        gradient, packed = (x + 1).to(dtype), steps.encode(x)
        cell = ((x.to(exact) + 16) * 128).clamp(0, 4095).long()
        level = torch.tensor(steps.levels, dtype=dtype)[torch.tensor(list(steps.codes))[cell]]
        assert torch.equal(steps.times(gradient, packed), gradient * level)
    assert steps.encode(wide).numel() == pytest.approx(wide.numel() * bits / 8, rel=0.01)


@pytest.mark.parametrize("bits", BOUNDS)
def test_steps_follow_the_derivative_at_every_scale(bits: int) -> None:
    steps = fitted(GELU.tobytes(), bits)
    allowed = {1: 0.9, 2: 0.3, 3: 0.12, 4: 0.07}[bits]
    for scale in (0.02, 0.1, 0.5, 1, 2, 8):
        x = scale * drawn(20000)
        error = steps.times(torch.ones_like(x), steps.encode(x)) - slope(x)
        assert error.norm() < allowed * slope(x).norm()


def test_what_is_no_number_is_left_to_the_loss() -> None:
    steps = fitted(GELU.tobytes(), 4)
    packed = steps.encode(torch.tensor([torch.nan, torch.inf, -torch.inf]))
    assert torch.allclose(steps.times(torch.ones(3), packed)[1:], torch.tensor([1.0, 0.0]), atol=0.01)


@pytest.mark.parametrize("name", [*SMOOTH, *OTHERS])
def test_every_spelling_is_found_and_nothing_else(name: str) -> None:
    module = ACT2FN[name]
    assert len(list(coded_activations(module, 4))) == (name in SMOOTH)
    if name in SMOOTH:
        x = torch.tensor(POINTS, requires_grad=True)
        module(x).sum().backward()
        assert np.allclose(np.frombuffer(_derivative(module) or b""), x.grad, atol=1e-12)


def test_a_function_that_overwrites_its_input_is_left_alone() -> None:
    assert not list(coded_activations(nn.Sequential(nn.SiLU(inplace=True)), 4))


def norms() -> dict[str, nn.Module]:
    """Of every kind that there is in Transformers, with weights that make it hard."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kinds = LlamaRMSNorm, GptOssRMSNorm, Gemma2RMSNorm, CohereLayerNorm
    made: dict[str, nn.Module] = {kind.__name__: kind(24, eps=1e-5) for kind in kinds}
    made |= {"LayerNorm": nn.LayerNorm(24), "LayerNorm without bias": nn.LayerNorm(24, bias=False)}
    made["RMSNorm"] = nn.RMSNorm(24, eps=1e-6)
    for module in made.values():
        offset = -1 if "Gemma" in type(module).__name__ else 0
        # Nothing, next to nothing, the other sign, and as it should be.
        scale = torch.cat([torch.tensor([0.0, 1e-40, -1e-3]), drawn(21).float()])
        module.weight.data = scale + offset
        if getattr(module, "bias", None) is not None:
            module.bias.data = drawn(24, seed=1).float()
    return made


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("name", norms())
def test_norms_go_backwards_from_their_output(name: str, dtype: torch.dtype, bound: float) -> None:
    plain = norms()[name].to(dtype)
    holder = nn.Sequential(copy.deepcopy(plain))
    (edit,) = shared_norms(holder)
    strategies.core.edits.apply(holder, [("shared", edit)])
    # Several pieces, and rows in which eps is not little.
    x = (drawn(3, 1001, 24, seed=2) * torch.logspace(0, -3, 3)[:, None, None]).to(dtype)
    by_output = drawn(3, 1001, 24, seed=3).to(dtype)
    found, exact = [], copy.deepcopy(plain).double()
    for module, values in ((exact, x.double()), (plain, x.clone()), (holder, x.clone())):
        y = module(values.requires_grad_())
        y.backward(by_output.to(y.dtype))
        found.append((y.detach(), values.grad, *(parameter.grad for parameter in module.parameters())))
    assert torch.equal(found[1][0], found[2][0])
    if dtype is torch.float64 and type(plain).__module__.startswith("transformers"):
        bound = OWN_CASTS
    for wanted, ours in zip(found[0][1:], found[2][1:], strict=True):
        assert (ours.double() - wanted).norm() < bound * wanted.norm()


class Gated(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid()


@pytest.mark.parametrize("module", [Gated(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm((2, 8))])
def test_norms_of_another_formula_are_left_alone(module: nn.Module) -> None:
    state = copy.deepcopy(module.state_dict())
    assert not list(shared_norms(nn.Sequential(module)))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def gradients(model: nn.Module, strategy: Strategy | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    made = copy.deepcopy(model)
    if strategy is not None:
        strategies.edit(made, [strategy])
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    logits = made(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """As `strategies/core/compare.py` has it."""
    assert found.keys() == wanted.keys()
    everything = torch.stack([g.norm() for g in wanted.values()]).norm()
    return max(float((found[name] - g).norm() / (g.norm() + 1e-3 * everything)) for name, g in wanted.items())


def moved(model: nn.Module) -> nn.Module:
    """With norms that do something."""
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            parameter.data += 0.3 * drawn(len(parameter), seed=len(name))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "cohere", "mixtral", "falcon_h1"])
def test_models_of_many_kinds(family: str) -> None:
    model = moved(build(family))
    loss, wanted = gradients(model)
    for strategy in (ApproxBP(activations=False), ApproxBP(), *(FewBit(bits=bits) for bits in BOUNDS)):
        same_loss, found = gradients(model, strategy)
        assert abs(same_loss - loss) < 1e-12
        own_casts = any("RMSNorm" in type(module).__name__ for module in model.modules())
        exact = OWN_CASTS if own_casts else max(FAMILIES[family][1], 1e-12)
        bound = exact if strategy == ApproxBP(activations=False) else strategy.bound
        assert worst(found, wanted) < bound
        assert bound == exact or worst(found, wanted) > 1e-4


@pytest.mark.parametrize(
    ("family", "layers", "spread"), [("llama", 12, 0.02), ("llama", 8, 0.5), ("gpt_neox", 24, 0.1), ("qwen2", 8, 0.2)]
)
def test_deep_models_of_small_and_large_weights_keep_the_bound(family: str, layers: int, spread: float) -> None:
    model = build(family, num_hidden_layers=layers, initializer_range=spread)
    wanted = gradients(model)[1]
    for strategy in (ApproxBP(), *(FewBit(bits=bits) for bits in BOUNDS)):
        assert worst(gradients(model, strategy)[1], wanted) < strategy.bound


SHAPE = {"vocab_size": 64, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
SHAPE |= {"max_position_embeddings": 256}
LLAMA = {"intermediate_size": 1536, "num_key_value_heads": 4}
GPT2 = {"n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 256, "activation_function": "gelu_pytorch_tanh"}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
LEAST = {
    "llama": (LLAMA, {"few_bit": 0.10, "approx_bp": 0.30}),
    "gpt2": (GPT2, {"few_bit": 0.18, "approx_bp": 0.30}),
    "gpt_neox": ({"intermediate_size": 2048}, {"few_bit": 0.18, "approx_bp": 0.20}),
    "opt": (
        {"ffn_dim": 2048, "activation_function": "gelu", "word_embed_proj_dim": 512},
        {"few_bit": 0.18, "approx_bp": 0.20},
    ),
}


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, parameters not counted."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        yield found


@pytest.mark.parametrize("family", LEAST)
def test_saved_bytes(family: str) -> None:
    shape, least = LEAST[family]
    config = AutoConfig.for_model(family, **(SHAPE | shape))
    model = AutoModelForCausalLM.from_config(config).train()
    bytes_kept = {}
    for name in ("plain", *least):
        made = copy.deepcopy(model)
        strategies.edit(made, [strategies.get(name)()])
        with saved(made) as found:
            made.base_model(input_ids=torch.arange(256)[None] % 64, use_cache=False)[0].sum()
        bytes_kept[name] = sum(found.values())
    for name, share in least.items():
        assert bytes_kept[name] < (1 - share) * bytes_kept["plain"]


@pytest.mark.parametrize("name", ["approx_bp", "few_bit"])
def test_under_autocast_the_loss_is_that_of_plain(name: str) -> None:
    model = moved(build("llama")).float()
    exact = gradients(model.double())[1]
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = gradients(model, strategies.get("plain")())
        same, found = gradients(model, strategies.get(name)())
    assert torch.equal(loss, same)
    assert worst({name: g.double() for name, g in found.items()}, exact) < strategies.get(name).bound


@pytest.mark.parametrize("name", ["approx_bp", "few_bit"])
@pytest.mark.parametrize("other", ["streambp", "seco", "checkpointing"])
def test_on_top_of_others(name: str, other: str) -> None:
    """Who runs the layers twice or in parts finds the same steps."""
    model = moved(build("llama"))
    chosen = [strategies.get(name)()] + ([] if other == "checkpointing" else [strategies.get(other)(chunk=8)])
    if other == "checkpointing":
        edit("gc", model)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = gradients(copy.deepcopy(model), chosen[0])[1]
    strategies.prepare(model, chosen)({"input_ids": ids, "labels": ids})
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(found, wanted) < 1e-6


@pytest.mark.parametrize("name", ["approx_bp", "few_bit"])
def test_dropout_is_that_of_plain(name: str) -> None:
    model = build("gpt_neox", hidden_dropout=0.2, attention_dropout=0.2)
    loss, wanted = gradients(model)
    same, found = gradients(model, strategies.get(name)())
    assert abs(same - loss) < 1e-12
    assert 1e-4 < worst(found, wanted) < strategies.get(name).bound


def test_nothing_to_change_is_said() -> None:
    relu = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **(SHAPE | {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}))
    )
    with pytest.raises(strategies.NoMatch, match="strategy few_bit found nothing to change in OPTForCausalLM"):
        strategies.edit(relu, [FewBit()])
    with pytest.raises(UserError, match="strategy='few_bit': bits=5: choose 1, 2, 3 or 4"):
        strategies.build([{"name": "few_bit", "bits": 5}])


@dataclass(frozen=True)
class Uphill(FewBit):
    """Derivatives with the wrong sign."""

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        for wrap in super().edits(model, topology):
            steps = wrap.settings["_ebbtide_steps"]
            yield replace(wrap, settings={"_ebbtide_steps": replace(steps, levels=tuple(-x for x in steps.levels))})


def final_loss(strategy: Strategy, seed: int) -> float:
    """Of the last ten steps: sequences in which each token follows from the two before, mostly."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 6, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **(SHAPE | shape | {"num_key_value_heads": 2}))
    model = AutoModelForCausalLM.from_config(config).train()
    step = strategies.prepare(model, [strategy])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    follows, losses = torch.randint(6, (6, 6)), []
    for _ in range(100):
        ids = [torch.randint(6, (12,)), torch.randint(6, (12,))]
        for _ in range(24):
            ids.append(torch.where(torch.rand(12) < 0.8, follows[ids[-2], ids[-1]], torch.randint(6, (12,))))
        batch = torch.stack(ids, 1)
        losses.append(float(step({"input_ids": batch, "labels": batch}).loss))
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_they_learn_what_plain_learns() -> None:
    """Over three seeds; one alone moves by 1.5% either way."""
    plain = [final_loss(strategies.get("plain")(), seed) for seed in range(3)]
    assert max(plain) < 1.2
    for strategy in (ApproxBP(), FewBit()):
        assert sum(final_loss(strategy, seed) for seed in range(3)) < 1.02 * sum(plain)
    assert final_loss(Uphill(), 0) > 1.1 * plain[0]
