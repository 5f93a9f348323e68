"""`load_in_4bit`: folders of bitsandbytes as they are, runs that go on, and what is exported and planned."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_reference import decode_base, decoded, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_cases import (
    ENGINES,
    contents,
    exact,
    lines,
    live_bytes,
    preferences,
    pretrained,
    recipe,
    run,
    trained,
    write_rows,
)

from distrib.errors import UserError
from distrib.topology import Topology
from launch.assemble import Parts, described
from launch.export import export
from launch.flops import token_flops
from launch.models import build, load_config
from launch.recipe import Recipe
from launch.shares import sizes_of
from strategies.lowbit.frozen import four_bit, quantize

IDS = torch.tensor([[104, 101, 108, 108, 111, 256]])
FOUR: dict[str, Any] = {"lora_r": 2, "load_in_4bit": True}
FORMATS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
UP = "model.layers.1.mlp.up_proj.weight"


def settings(kind: str, double: bool) -> dict[str, Any]:
    return {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}


def in_layers(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


def stored(source: Path, folder: Path, kind: str = "nf4", double: bool = False, **more: Any) -> Path:
    """The folder as Transformers saves it with bitsandbytes, of other matrices: quantizing again would show."""
    shutil.copytree(source, folder)
    plain = load_file(folder / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name, value in plain.items():
        kept = any(part in name for part in more.get("llm_int8_skip_modules", ()))
        if in_layers(name) and not kept:
            value = value * torch.linspace(0.5, 2, value.numel()).view_as(value)
            state |= state_of(name, value, kind, double)
            # A scale that no number of its block reaches.
            if not double:
                state[f"{name}.absmax"] *= 1.25
        else:
            state[name] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = {"load_in_4bit": True, "quant_method": "bitsandbytes", **settings(kind, double), **more}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return folder


def filled(made_from: Recipe) -> Any:
    return Parts.of(made_from, Topology()).model().engine.model


def from_folder(folder: Path, dataset: str, **changes: Any) -> Recipe:
    return recipe(folder / "run", dataset, model_name_or_path=str(folder), **{**FOUR, **changes})


@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_a_folder_of_bitsandbytes_is_taken_as_it_is(
    tmp_path: Path, dataset: str, model_folder: Path, kind: str, double: bool
) -> None:
    folder = stored(model_folder, tmp_path / "model", kind, double)
    model = filled(from_folder(folder, dataset, **settings(kind, double)))
    there = load_file(folder / "model.safetensors")
    found = dict(four_bit(model.get_base_model()))
    assert len(found) == 14
    for name, held in found.items():
        name = name.replace(".base_layer", ".weight")
        assert torch.equal(held.weight, there[name])
        scales = there[f"{name}.absmax"].view(torch.uint8)
        assert torch.equal(held.scales[-len(scales) :], scales)
    plain = dict(model.named_parameters())
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(plain[f"base_model.model.{name}"], there[name])


def test_it_decodes_as_bitsandbytes_does(tmp_path: Path, dataset: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes.functional as theirs
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = pretrained(tmp_path / "base", tie_word_embeddings=False)
    for kind, double in FORMATS:
        asked = BitsAndBytesConfig(load_in_4bit=True, **settings(kind, double))
        saved = AutoModelForCausalLM.from_pretrained(base, quantization_config=asked, device_map="cpu")
        folder = tmp_path / f"{kind}-{double}"
        saved.save_pretrained(folder)
        shutil.copy(base / "tokenizer.json", folder)
        shutil.copy(base / "tokenizer_config.json", folder)
        ours = dict(four_bit(filled(from_folder(folder, dataset, **settings(kind, double))).get_base_model()))
        for name, held in ours.items():
            weight = saved.get_submodule(name.removesuffix(".base_layer")).weight
            # Its own CPU kernel is wrong for rows shorter than a block: the same numbers as one long row.
            weight.quant_state.shape = torch.Size([1, held.in_features * held.out_features])
            values = theirs.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
            assert torch.equal(values.view(held.out_features, held.in_features), held.dequantized(torch.float32))


def test_what_a_folder_leaves_out_stays_as_it_is(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    folder = stored(model_folder, tmp_path / "model", llm_int8_skip_modules=["lm_head", "up_proj"])
    model = filled(from_folder(folder, dataset))
    assert len(list(four_bit(model))) == 12
    name = f"base_model.model.{UP.replace('.weight', '.base_layer.weight')}"
    assert torch.equal(model.get_parameter(name), load_file(folder / "model.safetensors")[UP])


def test_packed_weights_in_another_place_are_decoded(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    folder = stored(model_folder, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    head = state.pop("lm_head.weight")
    save_file(state | state_of("lm_head.weight", head, "nf4", False), folder / "model.safetensors", {"format": "pt"})
    model = filled(from_folder(folder, dataset))
    assert torch.equal(model.get_base_model().lm_head.weight, decoded(head, "nf4", False))


def _without(key: str) -> Any:
    def spoil(state: dict[str, Tensor]) -> None:
        del state[key]

    return spoil


def _in_blocks_of_128(state: dict[str, Tensor]) -> None:
    key = f"{UP}.quant_state.bitsandbytes__nf4"
    text = bytes(state[key].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128')
    state[key] = torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        (
            None,
            {"load_in_4bit": False},
            "holds 4-bit weights, which are trained with an adapter only: set ",
        ),
        (None, {"bnb_4bit_quant_type": "fp4"}, 'bnb_4bit_quant_type="nf4", not fp4: set it to that'),
        (None, {"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant=false, not true: set it to that"),
        (
            None,
            {"config_overrides": {"intermediate_size": 64}},
            r"is \(48, 32, 'nf4', False\) there, the",
        ),
        (_without(f"{UP}.absmax"), {}, f"{UP} is not in 4 bits there"),
        (_without(f"{UP}.quant_state.bitsandbytes__nf4"), {}, "has neither quant_state.bitsandbytes__nf4 nor"),
        (_without("model.norm.weight"), {}, "model.norm.weight is not in it under this name"),
        (_in_blocks_of_128, {}, "is in blocks of 128 and 256"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, dataset: str, model_folder: Path, spoil: Any, changes: dict[str, Any], said: str
) -> None:
    folder = stored(model_folder, tmp_path / "model")
    if spoil:
        state = load_file(folder / "model.safetensors")
        spoil(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said) as caught:
        filled(from_folder(folder, dataset, **changes))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=true with lora_r=0: 4-bit weights do not train"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type=fp4 with load_in_4bit=false: set load_in_4bit=true"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant=True with load_in_4bit=false"),
        ({**FOUR, "engine": {"name": "fsdp2", "tensor_parallel": 2}}, "4-bit weights are not split"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Recipe(**changes)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_model_without_linear_layers_is_refused() -> None:
    overrides = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    from transformers import GPT2Config

    config = GPT2Config(**overrides)
    with pytest.raises(UserError, match=r"GPT2Config has no nn\.Linear in its layers"):
        build(Recipe(lora_target_modules=["c_attn"], **FOUR), config)


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 1, {}),
    ("fsdp2", 2, {"bf16": True}),
    ("zero3", 2, {"bf16": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world", "changes"), CASES)
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, dataset: str, engine: str, world: int, changes: dict[str, Any]
) -> None:
    common = {**FOUR, "engine": ENGINES[engine], "max_steps": 5, "save_steps": 2, "learning_rate": 1e-2, **changes}
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    cut = recipe(tmp_path / "cut", dataset, **common)
    assert run(cut, world, ("kill_at", 3))[0].code == -signal.SIGKILL
    trained(cut, world)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    weights = "adapter_model.safetensors"
    assert contents(tmp_path / "cut" / "final")[weights] == contents(tmp_path / "whole" / "final")[weights]
    assert lines(tmp_path / "cut")[-1]["loss"] < lines(tmp_path / "cut")[0]["loss"]


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path, dataset: str) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    untied = {"tie_word_embeddings": False}
    trained(recipe(tmp_path, dataset, **FOUR, engine="fsdp2", config_overrides=untied), 2)
    (folder,) = (tmp_path / "checkpoints").glob("step-*/engine")
    names = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    assert any("lora_" in name for name in names)
    assert [name for name in names if name.startswith("model.") and "lora_" not in name] == []


@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_of_random_weights_brings_what_it_was_trained_on(tmp_path: Path, dataset: str, bf16: bool) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    made = recipe(tmp_path / "run", dataset, **FOUR, bf16=bf16, learning_rate=1e-2)
    trained(made)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    plain = filled(made.model_copy(update={"load_in_4bit": False, "bf16": False}))
    decode_base(plain, "nf4", False)
    base = {name: value for name, value in model.get_base_model().named_parameters() if "lora_" not in name}
    expected = dict(plain.get_base_model().named_parameters())
    assert [n for n, value in base.items() if not torch.equal(value, expected[n].to(value.dtype))] == []
    merged = export(tmp_path / "run", None, merge=True)
    assert merged["base"] == f"decoded from nf4, merged in {torch.bfloat16 if bf16 else torch.float32}"
    whole = AutoModelForCausalLM.from_pretrained(merged["folder"])
    with torch.no_grad():
        assert (model(IDS).logits - whole(IDS).logits).abs().max() < (0.05 if bf16 else 1e-5)


def test_a_run_on_a_4_bit_folder_is_exported(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = stored(model_folder, tmp_path / "model", "nf4", True)
    made = from_folder(folder, dataset, **settings("nf4", True), learning_rate=1e-2)
    trained(made)
    final = folder / "run" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    merged = export(folder / "run", None, merge=True)["folder"]
    assert "quantization_config" not in json.loads((Path(merged) / "config.json").read_text())
    # The folder's values in ordinary layers, as nobody can read it here without bitsandbytes.
    state = load_file(model_folder / "model.safetensors")
    for name, held in four_bit(filled(made).get_base_model()):
        state[name.replace(".base_layer", ".weight")] = held.dequantized(torch.float32)
    shutil.copytree(model_folder, tmp_path / "plain")
    save_file(state, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), final)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
        assert (found - adapted(IDS).logits).abs().max() < 1e-5
        assert (found - adapted.get_base_model()(IDS).logits).abs().max() < 1e-5


def test_dpo_starts_from_its_reference(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", preferences(6))
    trained(recipe(tmp_path / "run", rows, **FOUR, objective="dpo", learning_rate=1e-2, verify=True))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_no_more_than_a_block_is_unpacked_while_loading(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 256}
    parts = Parts.of(recipe(tmp_path, dataset, **FOUR, config_overrides=wide), Topology())
    held = sum(p.nbytes for p in build(parts.recipe, parts.config).parameters())
    block = (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256) * 4
    before, peak = live_bytes(), 0

    def watched(*given: Any) -> Any:
        nonlocal peak
        peak = max(peak, live_bytes() - before)
        return quantize(*given)

    monkeypatch.setattr("launch.models.quantize", watched)
    step = parts.model()
    assert sum(1 for _ in four_bit(step.engine.model)) == 8 * 7
    assert block < peak < held + 1.1 * block


def test_a_plan_counts_bytes(dataset: str, tmp_path: Path) -> None:
    made = recipe(tmp_path, dataset, **FOUR, config_overrides={"hidden_size": 128, "intermediate_size": 256})
    config = load_config(made)
    plain = made.model_copy(update={"load_in_4bit": False})
    model, whole = build(made, config), build(plain, config)
    inside = sum(p.numel() for n, p in whole.named_parameters() if n.endswith("base_layer.weight"))
    sizes, before = sizes_of(model), sizes_of(whole)
    assert before.weight_bytes - sizes.weight_bytes == inside * (4 - 4.5 / 8)
    assert sizes.whole.packed == inside * 4.5 / 8
    assert sizes.whole.bytes_in(2) == 2 * (before.whole.elements - inside) + inside * 4.5 / 8
    assert token_flops(model, config) == token_flops(whole, config)
    parts = Parts.of(made, Topology())
    assert described(parts)["parameters"] == described(Parts.of(plain, Topology()))["parameters"]
    assert described(parts)["dtype"] == "float32, frozen layers in nf4"
