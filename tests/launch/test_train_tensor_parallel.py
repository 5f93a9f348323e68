"""Runs whose layers are split over ranks compute what one process does, and stop and go on like any other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import assert_same_curve, curve
from train_cases import exact, lines, preferences, recipe, run, trained, write_rows
from transformers import AutoModelForCausalLM

from distrib.errors import Refused
from launch.device import Device
from launch.export import export
from launch.plan import plan

TWO = {"name": "fsdp2", "tensor_parallel": 2}


@pytest.mark.parametrize(
    ("world", "model"),
    [
        (2, "full"),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(4, "full", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(tmp_path: Path, dataset: str, world: int, model: str) -> None:
    fields: dict[str, Any] = {"max_steps": 4, "max_grad_norm": 0.5, "weight_decay": 0.1, "eval_dataset": dataset}
    fields |= {"eval_steps": 4, "eval_rows": 7, "eval_samples": 1}
    fields |= {"lora_r": 4, "bf16": True} if model == "bf16" else {}
    bound = 3e-3 if model == "bf16" else 1e-5
    trained(recipe(tmp_path / "one", dataset, **fields))
    trained(recipe(tmp_path / "split", dataset, engine=TWO, verify=True, **fields), world)
    assert_same_curve(tmp_path / "split", tmp_path / "one", bound)
    mine, theirs = (lines(tmp_path / name, "evaluations") for name in ("split", "one"))
    assert [line["eval_loss"] for line in mine] == pytest.approx([line["eval_loss"] for line in theirs], rel=bound)
    assert [line["eval_texts"] for line in mine] == [line["eval_texts"] for line in theirs]


def test_final_and_export_are_whole(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    fields: dict[str, Any] = {"model_name_or_path": str(model_folder), "optimizer": "sgd", "learning_rate": 0.1}
    trained(recipe(tmp_path / "one", dataset, **fields))
    trained(recipe(tmp_path / "split", dataset, engine=TWO, **fields), 2)
    export(tmp_path / "split", tmp_path / "exported", merge=False)
    one, split, exported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one/final", "split/final", "exported")
    )
    begun = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for name, weight in one.items():
        assert torch.equal(split[name], exported[name])
        torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-7)
        assert (weight - begun[name]).norm() > 1e-4 * begun[name].norm()


def test_preferences_with_a_reference_that_is_split_too(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(14))
    trained(recipe(tmp_path / "one", data, objective="dpo"))
    trained(recipe(tmp_path / "split", data, objective="dpo", engine=TWO), 2)
    assert_same_curve(tmp_path / "split", tmp_path / "one", 1e-5)


@pytest.mark.parametrize(
    ("world", "model"),
    [
        (2, {"lora_r": 4, "lora_dropout": 0.2}),
        pytest.param(4, {"config_overrides": {"attention_dropout": 0.2}}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dataset: str, world: int, model: dict[str, Any]) -> None:
    common = {"engine": TWO, "max_steps": 5, "save_steps": 2, **model}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    assert run(cut, world, ("kill_at", 3))[0].code == -signal.SIGKILL
    trained(cut, world)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [((TWO, 2), ({"name": "fsdp2"}, 1)), (({"name": "fsdp2"}, 2), (TWO, 4))])
def test_a_checkpoint_goes_on_with_other_parts(tmp_path: Path, dataset: str, before: Any, after: Any) -> None:
    common = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    trained(recipe(tmp_path / "one", dataset, engine=before[0], **common), before[1])
    chosen = str(tmp_path / "one" / "checkpoints" / "step-2")
    trained(recipe(tmp_path / "two", dataset, engine=after[0], resume_from_checkpoint=chosen, **common), after[1])
    for mine, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one")[2:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_signal_to_any_rank_stops_all(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset, engine=TWO)
    ends = run(made, 2, ("stop_at", 2, 1))
    assert all(end.error.startswith("Interrupted: stopped after step 2") for end in ends)
    trained(made, 2)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_what_is_refused(tmp_path: Path, dataset: str) -> None:
    for name in ("ddp", "zero"):
        with pytest.raises(
            Refused, match=rf"^engine.tensor_parallel is a key of fsdp2, not of {name}: set engine.name"
        ):
            recipe(tmp_path, dataset, engine={"name": name, "tensor_parallel": 2})
    made = recipe(tmp_path / "run", dataset, engine=TWO)
    assert run(made)[0].error == "Refused: engine.tensor_parallel=2 with a world of 1: start a multiple of 2 ranks"
    odd = recipe(tmp_path / "run", dataset, engine=TWO, config_overrides={"num_key_value_heads": 1})
    said = "Refused: engine.tensor_parallel=2 does not divide the model's num_key_value_heads=1: choose 1"
    assert [end.error for end in run(odd, 2)] == [said, said]
    with pytest.raises(Refused, match=r"^engine.tensor_parallel=2: a plan does not count what is split over ranks"):
        plan(made, Device("cpu", 2**34, 2, flops=1e9, here=False))
