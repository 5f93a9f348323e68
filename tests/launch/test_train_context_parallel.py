"""Runs whose sequences lie over several ranks compute what one process does, and stop and go on like any other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from curves import assert_same_curve, curve
from train_cases import exact, lines, preferences, recipe, run, trained, write_rows

from distrib.errors import Refused
from launch.device import Device
from launch.plan import plan

SHARED = {"name": "fsdp2", "context_parallel": 2}


@pytest.mark.parametrize(
    ("world", "model"),
    [
        (2, "full"),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(4, "full", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(tmp_path: Path, dataset: str, world: int, model: str) -> None:
    fields: dict[str, Any] = {"max_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.1, "eval_dataset": dataset}
    fields |= {"eval_steps": 3, "eval_rows": 7, "eval_samples": 1}
    fields |= {"lora_r": 4, "bf16": True} if model == "bf16" else {}
    bound = 3e-3 if model == "bf16" else 1e-5
    trained(recipe(tmp_path / "one", dataset, **fields))
    trained(recipe(tmp_path / "shared", dataset, engine=SHARED, verify=True, **fields), world)
    assert_same_curve(tmp_path / "shared", tmp_path / "one", bound)
    mine, theirs = (lines(tmp_path / name, "evaluations") for name in ("shared", "one"))
    assert [line["eval_loss"] for line in mine] == pytest.approx([line["eval_loss"] for line in theirs], rel=bound)
    assert [line["eval_texts"] for line in mine] == [line["eval_texts"] for line in theirs]


@pytest.mark.slow
def test_preferences_with_a_reference(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(14))
    trained(recipe(tmp_path / "one", data, objective="dpo"))
    trained(recipe(tmp_path / "shared", data, objective="dpo", engine=SHARED), 2)
    assert_same_curve(tmp_path / "shared", tmp_path / "one", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["plain", {"name": "streambp", "chunk": 8}, {"name": "seco", "chunk": 8}])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dataset: str, strategy: Any) -> None:
    common = {"engine": SHARED, "max_steps": 5, "save_steps": 2, "strategy": strategy}
    common |= {"lora_r": 4, "lora_dropout": 0.2}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), 2)
    assert run(cut, 2, ("kill_at", 3))[0].code == -signal.SIGKILL
    trained(cut, 2)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


ONE, DDP = {"name": "fsdp2"}, {"name": "ddp", "context_parallel": 2}


@pytest.mark.parametrize(
    ("before", "after"),
    [((SHARED, 2), (ONE, 1)), pytest.param(({"name": "ddp"}, 1), (DDP, 2), marks=pytest.mark.slow)],
)
def test_a_checkpoint_goes_on_with_other_shares(tmp_path: Path, dataset: str, before: Any, after: Any) -> None:
    common = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    trained(recipe(tmp_path / "one", dataset, engine=before[0], **common), before[1])
    chosen = str(tmp_path / "one" / "checkpoints" / "step-2")
    trained(recipe(tmp_path / "two", dataset, engine=after[0], resume_from_checkpoint=chosen, **common), after[1])
    for mine, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one")[2:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_what_is_refused(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset, engine=SHARED)
    assert run(made)[0].error == "Refused: engine.context_parallel=2 with a world of 1: start a multiple of 2 ranks"
    with pytest.raises(Refused, match=r"^engine.context_parallel=2: a plan does not count what is split over ranks"):
        plan(made, Device("cpu", 2**34, 2, flops=1e9, here=False))
