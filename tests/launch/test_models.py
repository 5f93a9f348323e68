"""Where weights come from: folders of every layout, families with other names on disk, and seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_cases import ENGINES, SHAPE, pretrained, recipe, trained

from distrib.engines import Settings, make
from distrib.errors import UserError
from distrib.topology import Topology
from launch.models import Weights, build, load_config
from launch.recipe import Recipe
from launch.tokenizer import byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 264,
    **SHAPE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def saved(folder: Path, family: str, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.normal_()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    """What Transformers itself makes of the folder."""
    from transformers import AutoModelForCausalLM

    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def filled(made_from: Recipe) -> dict[str, Tensor]:
    config = load_config(made_from)
    model = build(made_from, config)
    topology = Topology()
    make("ddp", model, Weights(made_from, config, topology).fill, topology, Settings(optimizer=None))
    state: dict[str, Tensor] = model.state_dict()
    return state


def from_folder(folder: Path, **changes: Any) -> Recipe:
    return Recipe(model_name_or_path=str(folder), max_length=64, **changes)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "deepseek_v3": DEEPSEEK,
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_what_transformers_reads(tmp_path: Path, family: str, sharded: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "model", family, **FAMILIES[family])
    expected = loaded(folder)
    if sharded:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (folder / "model.safetensors").unlink()
        whole.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_same(filled(from_folder(folder)), expected)


def test_some_of_these_families_have_other_names_on_disk(tmp_path: Path) -> None:
    """Otherwise the conversion above would not have been tried."""
    for family in ("mixtral", "deepseek_v3"):
        folder = saved(tmp_path / family, family, **FAMILIES[family])
        assert not loaded(folder).keys() <= load_file(folder / "model.safetensors").keys()
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in load_file(
        tmp_path / "deepseek_v3" / "model.safetensors"
    )


def test_half_precision_on_disk_is_read_into_fp32_masters(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, tie_word_embeddings=False)
    halves = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    found = filled(from_folder(folder))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same(found, {name: value.float() for name, value in halves.items()})
    adapted = filled(from_folder(folder, bf16=True, lora_r=2))
    assert {value.dtype for name, value in adapted.items() if "lora_" in name} == {torch.float32}
    assert {value.dtype for name, value in adapted.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_converted_weights_reach_every_rank(tmp_path: Path, dataset: str, engine: str, family: str) -> None:
    folder = saved(tmp_path / "model", family, **FAMILIES[family])
    changes: dict[str, Any] = {"model_name_or_path": str(folder), "learning_rate": 0.0, "max_steps": 1}
    trained(recipe(tmp_path / "run", dataset, engine=ENGINES[engine], **changes), 2)
    assert_same(loaded(tmp_path / "run" / "final"), loaded(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pretrained(tmp_path / "model", tie_word_embeddings=False)


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def _lose(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(UP))


def _grow(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({UP: torch.zeros(49, 32)}))


def _lose_and_grow(folder: Path) -> None:
    _grow(folder)
    rewrite(folder, lambda weights: weights.update({"other.name": weights.pop("model.norm.weight")}))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _lose_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": dict.fromkeys(loaded(folder), "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    )


def _nothing(folder: Path) -> None:
    pass


BROKEN: list[tuple[Any, dict[str, Any], str]] = [
    (_lose, {}, f"lacks 1 weights, the first is {UP}"),
    (_grow, {}, rf"{UP} has shape \(49, 32\), the configuration wants \(48, 32\)"),
    (_lose_and_grow, {}, rf"{UP} has shape \(49, 32\), the configuration wants \(48, 32\)"),
    (
        _pickle,
        {},
        "has no model.safetensors: give a folder with its weights as safetensors, or `init: random`",
    ),
    (_truncate, {}, "model.safetensors cannot be read: "),
    (_lose_a_shard, {}, "has no part.safetensors"),
    (_quantize, {}, "holds quantized weights"),
    (_nothing, {"num_hidden_layers": 3}, r"lacks \d+ weights, the first is model.layers.2"),
    (_nothing, {"intermediate_size": 64}, r"has shape \(48, 32\), the configuration wants \(64, 32\)"),
]


@pytest.mark.parametrize(("spoil", "overrides", "said"), BROKEN)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    folder: Path, spoil: Any, overrides: dict[str, Any], said: str
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        filled(from_folder(folder, config_overrides=overrides))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tied_folder_has_no_head_of_its_own(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, tie_word_embeddings=True)
    found = filled(from_folder(folder))
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is lm_head\.weight"):
        filled(from_folder(folder, config_overrides={"tie_word_embeddings": False}))


def test_random_weights_need_no_file_and_follow_the_seed(folder: Path) -> None:
    before = loaded(folder)
    (folder / "model.safetensors").unlink()
    first = filled(from_folder(folder, init="random"))
    assert_same(filled(from_folder(folder, init="random")), first)
    other = filled(from_folder(folder, init="random", seed=7))
    for name, value in first.items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert not torch.equal(value, other[name])
            assert not torch.equal(value, before[name])
            # As the family draws them: normal, with the configuration's width.
            assert value.std().item() == pytest.approx(0.1, rel=0.15)
    matrices = [value.flatten()[:8].tolist() for name, value in first.items() if "norm" not in name]
    assert len({tuple(start) for start in matrices}) == len(matrices)


@pytest.mark.parametrize(("tied", "lora_r"), [(True, 0), (False, 4)])
def test_random_weights_do_not_depend_on_the_engine_or_the_ranks(
    tmp_path: Path, dataset: str, tied: bool, lora_r: int
) -> None:
    changes = {"config_overrides": {"tie_word_embeddings": tied}, "lora_r": lora_r}
    changes |= {"max_steps": 1, "learning_rate": 0.0}
    expected: dict[str, Any] = {}
    for engine, world in (("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)):
        made = recipe(tmp_path / f"{engine} {world}", dataset, engine=ENGINES[engine], **changes)
        found = trained(made, world, do="train_and_keep")
        expected = expected or found
        assert found.keys() == expected.keys()
        assert [name for name in found if (found[name] != expected[name]).any()] == []
    assert any("lora_A" in name and value.any() for name, value in expected.items()) is bool(lora_r)


@pytest.mark.parametrize("source", ["random", "folder"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_no_rank_holds_the_whole_model_while_it_is_filled(
    tmp_path: Path, dataset: str, engine: str, source: str
) -> None:
    layers, vocabulary = 12, 264
    changes: dict[str, Any] = {"config_overrides": {"num_hidden_layers": layers, "tie_word_embeddings": False}}
    if source == "folder":
        made = recipe(tmp_path / "made", dataset, max_steps=1, **changes)
        trained(made)
        shutil.copytree(tmp_path / "made" / "final", tmp_path / "model")
        changes = {"model_name_or_path": str(tmp_path / "model")}
    made = recipe(tmp_path / "run", dataset, max_steps=1, engine=ENGINES[engine], **changes)
    peak, whole = trained(made, 2, do="peak_while_filling")
    ends = 2 * vocabulary * 32 * 4
    block = (whole - ends) / layers
    # Half of all blocks at the end, one whole one besides, embedding and head; a block's worth of slack.
    assert peak < ends + (layers / 2 + 3) * block
    assert peak > (whole - ends) / 2
    assert peak < 0.85 * whole
