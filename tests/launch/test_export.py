"""`final/` and `ebbtide export`: what Transformers and PEFT load is the trainer's model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_cases import ENGINES, SHAPE, contents, pretrained, recipe, run, trained

from distrib.errors import UserError
from launch.export import export

IDS = torch.tensor([[104, 101, 108, 108, 111, 256]])
EVERY = [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def kept(made: Any, folder: Path, world: int) -> dict[str, Tensor]:
    """The trainer's own weights after the same steps: runs repeat bit for bit."""
    again = made.model_copy(update={"output_dir": str(folder)})
    arrays = trained(again, world, do="train_and_keep")
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def assert_same_weights(model: Any, expected: dict[str, Tensor]) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].detach(), value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("engine", "world"), EVERY)
def test_final_is_the_trainers_model(tmp_path: Path, dataset: str, engine: str, world: int, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    changes = {"config_overrides": {"tie_word_embeddings": tied}, "learning_rate": 1e-2}
    made = recipe(tmp_path / "run", dataset, engine=ENGINES[engine], **changes)
    weights = kept(made, tmp_path / "run", world)
    final = tmp_path / "run" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.float32
    assert_same_weights(model, weights)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    plain = LlamaForCausalLM(LlamaConfig(**json.loads((final / "config.json").read_text()))).eval()
    plain.load_state_dict(weights, strict=not tied)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer("héllo")["input_ids"] == list("héllo".encode())
    assert "<|assistant|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("strategy", [{"name": "int4", "preset": "paper"}, {"name": "fp4", "preset": "nvfp4"}])
def test_a_model_trained_in_few_bits_is_an_ordinary_one(
    tmp_path: Path, dataset: str, strategy: dict[str, Any], lora_r: int
) -> None:
    """As it is in evaluation, bit for bit; its names and types are those of a run without."""
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"learning_rate": 1e-2, "lora_r": lora_r, "config_overrides": {"num_hidden_layers": 2}}
    found = trained(recipe(tmp_path / "few", dataset, strategy=strategy, **common), do="lowbit_cases:train_and_look")
    trained(recipe(tmp_path / "plain", dataset, **common))
    loader = AutoPeftModelForCausalLM if lora_r else AutoModelForCausalLM
    few = loader.from_pretrained(tmp_path / "few" / "final").eval()
    with torch.no_grad():
        assert torch.equal(few(torch.arange(7)[None] + 99).logits, torch.from_numpy(found["logits"]))
    file = "adapter_model.safetensors" if lora_r else "model.safetensors"
    states = [load_file(tmp_path / name / "final" / file) for name in ("few", "plain")]
    assert [{name: (x.dtype, x.shape) for name, x in state.items()} for state in states[:1]] == [
        {name: (x.dtype, x.shape) for name, x in state.items()} for state in states[1:]
    ]
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_learned_scales_are_the_same_on_every_rank(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path, dataset, strategy={"name": "int4", "preset": "paper"})
    one, other = (end.result["state"]["int4"] for end in run(made, 2, do="lowbit_cases:train_and_look"))
    assert one == other
    assert (one["updates"], len(one["sizes"])) == (4, 14)


def test_the_written_configuration_is_the_models_own(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    changes: dict[str, Any] = {"model_name_or_path": str(model_folder), "bf16": True}
    trained(recipe(tmp_path, dataset, **changes, config_overrides={"attention_dropout": 0.1}))
    before = json.loads((model_folder / "config.json").read_text())
    after = json.loads((tmp_path / "final" / "config.json").read_text())
    assert after.pop("attention_dropout") == 0.1
    assert before.pop("attention_dropout") == 0.0
    assert after == before
    assert after["architectures"] == ["LlamaForCausalLM"]
    assert after["use_cache"] is True
    assert after["dtype"] == "float32"


@pytest.mark.parametrize("based", ["random", "folder"])
@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_an_adapter_loads_with_peft(
    tmp_path: Path, dataset: str, model_folder: Path, engine: str, world: int, based: str
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base = {"model_name_or_path": str(model_folder)} if based == "folder" else {}
    made = recipe(tmp_path / "run", dataset, lora_r=4, learning_rate=1e-2, engine=ENGINES[engine], **base)
    weights = kept(made, tmp_path / "run", world)
    final = tmp_path / "run" / "final"
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    model = AutoPeftModelForCausalLM.from_pretrained(final)
    assert_same_weights(model, weights)
    place = model_folder if based == "folder" else final / "base"
    assert model.peft_config["default"].base_model_name_or_path == str(place)
    assert_same_weights(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), final), weights)

    merged = export(tmp_path / "run", None, merge=True)
    assert merged == {"folder": str(tmp_path / "run" / "merged"), "step": 4, "kind": "model"}
    whole = AutoModelForCausalLM.from_pretrained(merged["folder"])
    with torch.no_grad():
        adapted, alone = model(IDS).logits, whole(IDS).logits
        untouched = AutoModelForCausalLM.from_pretrained(place)(IDS).logits
    # In float32; processors add up in their own order.
    assert (adapted - alone).abs().max() < 2e-6
    assert (adapted - untouched).abs().max() > 1e-3


def test_a_relative_model_folder_is_found_from_anywhere(
    tmp_path: Path, dataset: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    from distrib.topology import Topology
    from launch.train import train

    monkeypatch.chdir(model_folder.parent)
    train(recipe(tmp_path / "run", dataset, lora_r=2, model_name_or_path=model_folder.name), Topology())
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.peft_config["default"].base_model_name_or_path == str(model_folder)


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize(("engine", "world"), EVERY)
def test_an_interrupted_run_is_exported_from_its_newest_checkpoint(
    tmp_path: Path, dataset: str, engine: str, world: int, model: str
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"engine": ENGINES[engine], "lr_scheduler_type": "constant", "save_steps": 3}
    common |= {"lora_r": 4} if model == "lora" else {"config_overrides": {"tie_word_embeddings": False}}
    made = recipe(tmp_path / "run", dataset, max_steps=9, **common)
    run(made, world, ("kill_at", 5))
    before = contents(tmp_path / "run")
    result = export(tmp_path / "run", tmp_path / "out", merge=False)
    kind = "adapter" if model == "lora" else "model"
    assert result == {"folder": str(tmp_path / "out"), "step": 3, "kind": kind}
    assert contents(tmp_path / "run") == before
    weights = kept(made.model_copy(update={"max_steps": 3}), tmp_path / "short", world)
    loader = AutoPeftModelForCausalLM if model == "lora" else AutoModelForCausalLM
    assert_same_weights(loader.from_pretrained(tmp_path / "out"), weights)


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_bf16_run_is_exported_with_its_master_weights(
    tmp_path: Path, dataset: str, engine: str, world: int, lora_r: int
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    made = recipe(tmp_path / "run", dataset, bf16=True, lora_r=lora_r, engine=ENGINES[engine])
    trained(made, world)
    loader = AutoPeftModelForCausalLM if lora_r else AutoModelForCausalLM
    final = dict(loader.from_pretrained(tmp_path / "run" / "final").named_parameters())
    export(tmp_path / "run", tmp_path / "out", merge=False)
    again = dict(loader.from_pretrained(tmp_path / "out").named_parameters())
    trained_names = [name for name in final if "lora_" in name or not lora_r]
    assert [name for name in final if not torch.equal(final[name], again[name])] == []
    assert {final[name].dtype for name in trained_names} == {torch.float32}
    rounded = [name for name in trained_names if torch.equal(final[name], final[name].bfloat16().float())]
    assert not [name for name in rounded if "norm" not in name and bool(final[name].any())]
    if lora_r:
        assert {value.dtype for name, value in final.items() if "lora_" not in name} == {torch.bfloat16}


def test_what_cannot_be_exported_is_said(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset)
    for folder, merge, said in (
        (tmp_path, False, "is not a run: it has no recipe.lock.yaml"),
        (tmp_path / "run", True, r"--merge: this run trained the whole model \(lora_r=0\)"),
        (tmp_path / "young", False, "has no checkpoint yet: train for save_steps=500 steps first"),
    ):
        if folder.name == "run":
            trained(made)
        if folder.name == "young":
            run(recipe(folder, dataset), 1, ("kill_at", 1))
        with pytest.raises(UserError, match=said):
            export(folder, None, merge)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"--output .*mine exists: name a folder that does not"):
        export(tmp_path / "run", tmp_path / "mine", merge=False)


def test_a_tied_folder_stays_tied(tmp_path: Path, dataset: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = pretrained(tmp_path / "model", tie_word_embeddings=True)
    made = recipe(tmp_path / "run", dataset, model_name_or_path=str(folder), engine="fsdp2")
    weights = kept(made, tmp_path / "run", 2)
    assert "lm_head.weight" not in weights
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final"), weights)
    assert SHAPE["num_hidden_layers"] == 2
