"""Runs whose layers are a pipeline compute what one process does, and stop and go on like any other."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import assert_same_curve
from train_cases import exact, lines, preferences, recipe, run, trained, write_rows
from transformers import AutoModelForCausalLM

from distrib.pipeline import record
from launch.export import export

SHAPE = {"num_hidden_layers": 3}


def twobp(**fields: Any) -> list[dict[str, Any]]:
    return [{"name": "twobp", **fields}]


@pytest.mark.parametrize(
    ("world", "fields", "model"),
    [
        (2, {}, {}),
        (4, {"stages": 2, "schedule": "1f1b+2bp"}, {"engine": "fsdp2", "lora_r": 4}),
        pytest.param(4, {"stages": 2}, {"engine": "fsdp2", "bf16": True}, marks=pytest.mark.slow),
        pytest.param(3, {"schedule": "greedy"}, {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(
    tmp_path: Path, dataset: str, world: int, fields: dict[str, Any], model: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"max_grad_norm": 0.5, "weight_decay": 0.1, "eval_dataset": dataset, "eval_steps": 4}
    common |= {"eval_rows": 7, "config_overrides": SHAPE, "global_batch_size": 6} | model
    bound = 5e-3 if model.get("bf16") else 1e-5
    trained(recipe(tmp_path / "one", dataset, **common))
    result = trained(recipe(tmp_path / "stages", dataset, strategy=twobp(**fields), verify=True, **common), world)
    assert_same_curve(tmp_path / "stages", tmp_path / "one", bound)
    mine, theirs = (lines(tmp_path / name, "evaluations") for name in ("stages", "one"))
    assert [line["eval_loss"] for line in mine] == pytest.approx([line["eval_loss"] for line in theirs], rel=bound)
    stages = fields.get("stages", world)
    account = result["accounts"]["twobp"]
    assert (account["ranks"], sum(account["layers"]), len(account["layers"])) == (stages, 3, stages)
    recorded = record.read(tmp_path / "stages")
    assert recorded.step == 4
    assert len(recorded.ranks) == stages
    ops = {str(span.op) for spans in recorded.ranks for span in spans}
    assert {f"{stage}F{number}" for stage in range(stages) for number in range(account["micro_batches"])} <= ops


def test_final_and_export_are_whole(tmp_path: Path, dataset: str, model_folder: Path) -> None:
    fields: dict[str, Any] = {"model_name_or_path": str(model_folder), "optimizer": "sgd", "learning_rate": 0.1}
    trained(recipe(tmp_path / "one", dataset, **fields))
    trained(recipe(tmp_path / "stages", dataset, strategy=twobp(), **fields), 2)
    export(tmp_path / "stages", tmp_path / "exported", merge=False)
    one, stages, exported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one/final", "stages/final", "exported")
    )
    begun = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for name, weight in one.items():
        assert torch.equal(stages[name], exported[name])
        torch.testing.assert_close(stages[name], weight, rtol=1e-5, atol=1e-7)
        assert (weight - begun[name]).norm() > 1e-4 * begun[name].norm()


def test_preferences_with_a_reference_in_stages_too(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(14))
    trained(recipe(tmp_path / "one", data, objective="dpo"))
    trained(recipe(tmp_path / "stages", data, objective="dpo", strategy=twobp()), 2)
    assert_same_curve(tmp_path / "stages", tmp_path / "one", 1e-5)


@pytest.mark.parametrize(
    ("world", "fields"),
    [
        (2, {"lora_r": 4, "lora_dropout": 0.2, "strategy": twobp()}),
        (2, {"config_overrides": SHAPE | {"attention_dropout": 0.2}, "strategy": [*twobp(), {"name": "recompute"}]}),
        pytest.param(4, {"engine": "fsdp2", "strategy": twobp(stages=2)}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dataset: str, world: int, fields: dict[str, Any]) -> None:
    common = {"max_steps": 5, "save_steps": 2, **fields}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    ends = run(cut, world, ("kill_at", 3))
    assert ends[0].code == -signal.SIGKILL
    assert all(end.code for end in ends)
    trained(cut, world)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_stages(tmp_path: Path, dataset: str, engine: str) -> None:
    common: dict[str, Any] = {"save_steps": 2, "config_overrides": SHAPE, "engine": engine}
    trained(recipe(tmp_path / "one", dataset, max_steps=8, **common))
    courses = [(2, twobp()), (3, twobp(schedule="1f1b")), (1, [{"name": "plain"}]), (4, twobp(stages=2))]
    for number, (world, strategy) in enumerate(courses):
        steps = {"max_steps": 2 * number + 2, "lr_scheduler_type": "constant"}
        trained(recipe(tmp_path / "stages", dataset, strategy=strategy, **common | steps), world)
    whole = recipe(tmp_path / "whole", dataset, max_steps=8, lr_scheduler_type="constant", **common)
    trained(whole)
    assert_same_curve(tmp_path / "stages", tmp_path / "whole", 1e-5)


def test_a_signal_to_any_rank_stops_all(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset, strategy=twobp())
    ends = run(made, 2, ("stop_at", 2, 1))
    assert all(end.error.startswith("Interrupted: stopped after step 2") for end in ends)
    trained(made, 2)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("world", "changes", "said"),
    [
        (3, {"strategy": twobp(stages=2)}, "a pipeline of 2 stages with a world of 3: start a multiple of 2 ranks"),
        (2, {"engine": "zero", "strategy": twobp()}, "a pipeline of 2 stages with engine.name='zero': choose ddp or"),
        (2, {"strategy": twobp(layers=[1, 2])}, "strategy.layers=[1, 2]: give 2 numbers of at least 1, one a stage"),
        (2, {"strategy": twobp(schedule="h2")}, "strategy.schedule='h2': choose naive, gpipe, 1f1b"),
        (2, {"strategy": [*twobp(), {"name": "seco"}]}, "strategies twobp and seco each run the whole step"),
        (2, {"compile": True, "strategy": twobp()}, "compile=true with strategy twobp: set compile=false"),
        (
            2,
            {"model_name_or_path": "GPT2", "strategy": twobp()},
            "model type 'gpt2' declares no pipeline plan (base_model_pp_plan) in this version of Transformers",
        ),
        (2, {"strategy": twobp(), "eval_samples": 1, "eval_steps": 1}, "eval_samples=1: a pipeline does not generate"),
    ],
)
def test_what_is_refused(tmp_path: Path, dataset: str, world: int, changes: dict[str, Any], said: str) -> None:
    if changes.get("model_name_or_path") == "GPT2":
        (tmp_path / "gpt2").mkdir()
        (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8}))
        changes = changes | {"model_name_or_path": str(tmp_path / "gpt2"), "init": "random"}
    fields = {"eval_dataset": dataset} if "eval_steps" in changes else {}
    ends = run(recipe(tmp_path / "run", dataset, **changes, **fields), world)
    assert all(said in end.error for end in ends), ends[0].error
    assert not (tmp_path / "run").exists()


def test_a_schedule_file(tmp_path: Path, dataset: str) -> None:
    good = tmp_path / "good.csv"
    good.write_text("0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1I1,1W0,1W1\n")
    fields: dict[str, Any] = {"global_batch_size": 2}
    trained(recipe(tmp_path / "one", dataset, **fields))
    trained(recipe(tmp_path / "file", dataset, strategy=twobp(schedule=str(good)), **fields), 2)
    assert_same_curve(tmp_path / "file", tmp_path / "one", 1e-5)
    more = recipe(tmp_path / "more", dataset, strategy=twobp(schedule=str(good)), global_batch_size=3)
    assert "is for 2 micro-batches, the step has 3" in run(more, 2)[0].error
    for text, said in {
        "0F0,0B0\n1F0,1W0,1I0\n": "rank 1: 1W0 stands without 1I0 before it",
        "0F0,0B0\n1F0\n": "rank 1: 1F0",
        "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n": "never ends: rank 0 waits at 0B0 for 1B0 of rank 1, rank 1 waits at 1F1",
        "0B0,0F0\n1F0,1B0\n": "rank 0: 0B0 stands without 0F0 before it",
    }.items():
        good.write_text(text)
        made = recipe(tmp_path / "bad", dataset, strategy=twobp(schedule=str(good)), **fields)
        assert all(said in end.error for end in run(made, 2))
